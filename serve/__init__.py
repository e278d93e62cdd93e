"""The server: who may call, one bounded queue of jobs, and the threads that draw them side by side."""
