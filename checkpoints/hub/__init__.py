"""Models of a hub: what people write for one, which of its files are needed, and how they are fetched."""
