"""What `latentrt bench` can measure, a module a verb."""
