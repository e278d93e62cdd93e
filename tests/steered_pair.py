"""A pipeline over tiny models that opens tiny controls: of architectures that no template ships for."""

from collections.abc import Mapping
from pathlib import Path

from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.engines.package import Package
from latentrt.export.architectures import Architecture
from latentrt.export.templates import make_archive
from latentrt.runtime import Pipeline


def steerable(plain: Pipeline, architectures: Mapping[str, Architecture], folder: Path) -> Pipeline:
    """The same pipeline, which opens controls of these architectures; templates and cache are in `folder`."""
    archive = folder / "controls.zip"
    make_archive(archive, architectures, dtypes=["fp32"])

    def opened(path: Path, image_encoder: Path | None) -> Package:
        reads = BACKENDS["onnxruntime"].reads
        options = Options(dtype="fp32", reads=reads, templates=archive, image_encoder=image_encoder)
        return open_control(path, options, store=folder / "cache")

    return Pipeline.over(plain.package, plain.loop, plain.backend, open_control=opened)
