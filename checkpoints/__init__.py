"""What a user downloaded: read, and its graphs prepared. torch is imported by few functions, when called."""
