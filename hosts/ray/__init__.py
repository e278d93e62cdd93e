"""Ray: replicas of the server behind one address, and prompts of a file drawn by many workers."""
