"""TensorRT 10 and 11, and TensorRT-RTX: one implementation, the library is a parameter."""
