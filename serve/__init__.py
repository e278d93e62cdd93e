"""A server: one bounded queue of jobs, and what others may see of it."""
