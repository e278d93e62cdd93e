"""Torch modules to ONNX graphs, and what is done to them."""
