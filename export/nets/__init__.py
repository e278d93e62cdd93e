"""The nets of a checkpoint as torch modules."""
