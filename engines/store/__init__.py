"""Engines on disk, found by everything that decides what they are."""
