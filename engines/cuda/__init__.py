"""The CUDA runtime behind the seam `engines/device.py`."""
