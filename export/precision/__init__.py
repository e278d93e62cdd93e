"""Which values fp16 cannot hold."""
