"""Jobs: what is asked for, the one bounded queue before the workers, and what is kept of it."""
