"""A server: one bounded queue of jobs, and what of it others may see. Only the command line imports it."""
