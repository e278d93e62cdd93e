"""checkpoint -> package. The only folder that imports torch, diffusers or transformers."""

from .export import export_package
from .progress import Progress

__all__ = ["Progress", "export_package"]
