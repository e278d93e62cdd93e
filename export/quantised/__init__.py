"""Packages whose products are in eight bits, or whose weights are in four."""
