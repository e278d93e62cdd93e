"""A user's checkpoint as a package: read, bound to graph templates, opened without torch."""
