"""Controls of a request, as the loop takes them: what was loaded, and a file for each kind."""
