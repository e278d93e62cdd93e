"""checkpoint -> package: graphs that ship, or torch nets traced to graphs. torch is imported on first use."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .export import Progress, export_package

__all__ = ["Progress", "export_package"]


def __getattr__(name: str) -> object:
    """Import the exporter on first use: `export.pickles` works without an ONNX library."""
    if name in __all__:
        from . import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
