"""From prompts to the context that the UNet attends to."""
