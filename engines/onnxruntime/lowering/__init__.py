"""Graphs rewritten for one ONNX Runtime provider."""
