"""Models to measure: the demo, recipes with random weights, skeletons."""
