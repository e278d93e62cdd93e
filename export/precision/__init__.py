"""Which values fp16 cannot hold, and the nodes that compute in float32 for them."""
