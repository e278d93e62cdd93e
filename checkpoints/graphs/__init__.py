"""Graphs after tracing: pointed at their weights, and cut into loop, context and time."""
