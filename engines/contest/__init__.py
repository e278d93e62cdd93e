"""Which backend draws the fastest on the host, measured with a model on this machine."""
