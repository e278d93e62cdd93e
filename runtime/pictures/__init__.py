"""Pictures: reading, resizing, masks, tiles, writing."""
