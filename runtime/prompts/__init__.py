"""Text to the context that the UNet attends to."""
