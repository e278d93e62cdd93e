"""Rewrites graphs for the libraries that run them, with onnx and onnx-ir, imported on first use."""
