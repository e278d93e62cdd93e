"""The small Stable-Diffusion-shaped model that ships with latentrt, and how it was trained."""
