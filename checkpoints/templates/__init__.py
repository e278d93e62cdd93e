"""The graphs of architectures in circulation, without weights: shipped, and found for a checkpoint."""
