"""Checkpoints read: folders, single files, tokenizers."""
