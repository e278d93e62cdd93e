"""The door: who may call, and how much they may send."""
