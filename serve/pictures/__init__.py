"""Pictures that strangers send, and those that leave."""
