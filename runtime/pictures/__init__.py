"""Pixels: read, resized, masked, tiled, written."""
