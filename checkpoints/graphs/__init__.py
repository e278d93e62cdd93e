"""What is done to graphs when a checkpoint is bound to them."""
