"""Noise schedules, samplers as tables, and the noise itself."""
