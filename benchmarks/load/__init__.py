"""Load on a server: requests that arrive by themselves, ways to draw them, and the same with made-up cost."""
