"""checkpoint -> package. The only folder that imports torch, diffusers or transformers."""

from .package_writer import export_package
from .progress import Progress

__all__ = ["Progress", "export_package"]
