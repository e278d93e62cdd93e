"""NVIDIA Triton: a model repository whose one model draws whole pictures, many at a time."""
