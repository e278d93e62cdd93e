"""Stable Diffusion as exported graphs, driven by a small runtime without torch.

    import latentrt

    with latentrt.Pipeline.open("demo") as pipe:
        result = pipe("a red circle on a blue background", seed=1)
        result.save("circle.png")

`dir(latentrt)` is the table of contents, docs/api.md has an example of each name. Nothing is imported before
it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.errors import AdapterError as AdapterError
    from .engines.errors import BackendError as BackendError
    from .engines.errors import CancelledError as CancelledError
    from .engines.errors import CheckpointError as CheckpointError
    from .engines.errors import DownloadError as DownloadError
    from .engines.errors import EngineError as EngineError
    from .engines.errors import LatentrtError as LatentrtError
    from .engines.errors import MemoryLimitError as MemoryLimitError
    from .engines.errors import ModelError as ModelError
    from .engines.errors import NumericError as NumericError
    from .engines.errors import PackageError as PackageError
    from .engines.errors import SamplerError as SamplerError
    from .engines.errors import StorageError as StorageError
    from .engines.errors import UsageError as UsageError
    from .engines.package import Package as Package
    from .export.export import export_package as export_package
    from .runtime.controls.control import Control as Control
    from .runtime.controls.image_prompt import ImagePrompt as ImagePrompt
    from .runtime.model import CheckpointOptions as CheckpointOptions
    from .runtime.pictures.infotext import parse_infotext as parse_infotext
    from .runtime.pictures.write import PictureMetadata as PictureMetadata
    from .runtime.pictures.write import read_metadata as read_metadata
    from .runtime.pipeline import Pipeline as Pipeline
    from .runtime.pipeline import Step as Step
    from .runtime.redraw import redraw as redraw
    from .runtime.refine import refine as refine
    from .runtime.request.parameters import Parameters as Parameters
    from .runtime.result import Result as Result
    from .runtime.sampling.samplers import SAMPLERS as SAMPLERS

    __version__: str

_HOMES = {
    "Pipeline": "runtime.pipeline",
    "Step": "runtime.pipeline",
    "CheckpointOptions": "runtime.model",
    "Control": "runtime.controls.control",
    "ImagePrompt": "runtime.controls.image_prompt",
    "Result": "runtime.result",
    "Parameters": "runtime.request.parameters",
    "refine": "runtime.refine",
    "redraw": "runtime.redraw",
    "read_metadata": "runtime.pictures.write",
    "PictureMetadata": "runtime.pictures.write",
    "parse_infotext": "runtime.pictures.infotext",
    "SAMPLERS": "runtime.sampling.samplers",
    "Package": "engines.package",
    "export_package": "export.export",
    "LatentrtError": "engines.errors",
    "UsageError": "engines.errors",
    "SamplerError": "engines.errors",
    "ModelError": "engines.errors",
    "CheckpointError": "engines.errors",
    "AdapterError": "engines.errors",
    "DownloadError": "engines.errors",
    "PackageError": "engines.errors",
    "EngineError": "engines.errors",
    "BackendError": "engines.errors",
    "MemoryLimitError": "engines.errors",
    "CancelledError": "engines.errors",
    "StorageError": "engines.errors",
    "NumericError": "engines.errors",
}

__all__ = [
    "SAMPLERS",
    "AdapterError",
    "BackendError",
    "CancelledError",
    "CheckpointError",
    "DownloadError",
    "EngineError",
    "LatentrtError",
    "MemoryLimitError",
    "ModelError",
    "NumericError",
    "Package",
    "PackageError",
    "Parameters",
    "PictureMetadata",
    "Pipeline",
    "Result",
    "SamplerError",
    "Step",
    "StorageError",
    "UsageError",
    "__version__",
    "export_package",
    "parse_infotext",
    "read_metadata",
    "redraw",
    "refine",
]


if not TYPE_CHECKING:  # for a type checker, it would make a value of every misspelt name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module(".engines.installed", __name__).latentrt_version()
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
