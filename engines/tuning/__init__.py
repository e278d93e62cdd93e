"""Which of several ways to run a net is the fastest here, whoever runs it."""
