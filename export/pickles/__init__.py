"""Pickled checkpoints, read without running them."""
