"""Is it fast, how much memory, is it still right."""
