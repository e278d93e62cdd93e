"""prompt -> picture. NumPy; knows the nets by their contract alone."""
