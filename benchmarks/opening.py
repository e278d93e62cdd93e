"""Pipelines for measurements: prompts are not cached, for a user draws another one each time."""

from __future__ import annotations

from pathlib import Path

from ..engines.package import Package
from ..runtime.loop.open import LoopOptions, open_loop
from ..runtime.pipeline import Pipeline


def open_pipeline(root: Path, options: LoopOptions) -> Pipeline:
    """A package's, as `Pipeline.open` opens it."""
    package = Package.open(root)
    return Pipeline.over(package, *open_loop(package, options), cache_bytes=0)
