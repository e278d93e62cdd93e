"""fp16 graphs that do not overflow: ranges measured on a small picture."""
