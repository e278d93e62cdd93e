"""The denoising loop, on the host or on a device."""
