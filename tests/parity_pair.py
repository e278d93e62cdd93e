"""The same random weights twice: a diffusers pipeline in torch, and ours on the exported package."""

import os
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from latentrt.export.export import export_package
from latentrt.runtime import Pipeline
from tests.recipes import RECIPES, architecture, make_checkpoint
from tests.traced_graphs import make_archive

# dB. Random weights answer weakly to their conditions: a wrong crop or picture still leaves 45 to 49.
BAR = 60.0
PROMPTS = ["a red circle on a blue background", "large green star", "ring"]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB over uint8; refuses pictures without contrast, which everything would resemble."""
    assert one.shape == other.shape
    assert one.std() > 10, "the reference picture is too flat to compare"
    error = float(((one.astype(float) - other) ** 2).mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with sharp edges on them."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    shades = 0.5 + 0.5 * np.sin(9 * x[..., None] + 7 * y[..., None] * [1, -1, 0.5] + phase)
    shades[height // 4 : height // 2, width // 5 : width // 2] = np.random.default_rng(seed + 1).uniform(
        0, 1, 3
    )
    return Image.fromarray((shades * 255).astype(np.uint8))


def blob(height: int, width: int) -> Image.Image:
    """A mask: white, round, off the centre."""
    y, x = np.mgrid[:height, :width]
    inside = ((y - 0.6 * height) / (0.28 * height)) ** 2 + ((x - 0.4 * width) / (0.25 * width)) ** 2 < 1
    return Image.fromarray((inside * 255).astype(np.uint8))


def exported(factory: pytest.TempPathFactory, recipe: str) -> Path:
    """A folder with `checkpoint` and `package` (fp32) of a recipe, made once for all workers of a run."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "pairs" / recipe
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "package").exists():
            # One of them as 1.x is published: in fp16, which an fp32 package stores and widens at load.
            older = recipe == "tiny1"
            stored = torch.float16 if older else torch.float32
            make_checkpoint(RECIPES[recipe], folder / "checkpoint", dtype=stored, old_names=older)
            graphs = folder / "graphs.zip"
            make_archive(graphs, {recipe: architecture(RECIPES[recipe])}, dtypes=["fp32"])
            export_package(
                folder / "checkpoint", folder / "package", dtype="fp32", verify=False, templates=graphs
            )
    return folder


class Pair:
    """A checkpoint of random weights, with its package."""

    def __init__(self, folder: Path, backend: str = "auto") -> None:
        self.checkpoint = folder / "checkpoint"
        self.ours = Pipeline.open(folder / "package", backend=backend)
        self._references: dict[str, Any] = {}

    def reference(self, kind: str, scheduler: str | None = None, **options: Any) -> Any:
        """The diffusers pipeline of that class, with another scheduler if one is named."""
        if kind not in self._references:
            unsafe = {"safety_checker": None, "requires_safety_checker": False}
            checked = "XL" not in kind and "UnCLIP" not in kind
            more = {"unet": self._unet(), **(unsafe if checked else {})}
            pipe = getattr(diffusers, kind).from_pretrained(self.checkpoint, dtype=torch.float32, **more)
            pipe.set_progress_bar_config(disable=True)
            self._references[kind] = pipe, pipe.scheduler
        pipe, own = self._references[kind]
        pipe.scheduler = (
            own if scheduler is None else getattr(diffusers, scheduler).from_config(own.config, **options)
        )
        return pipe

    def _unet(self) -> Any:
        """Its UNet; pipelines that start from pictures take no sample size of two numbers."""
        unet = diffusers.UNet2DConditionModel.from_pretrained(self.checkpoint / "unet")
        size = unet.config.sample_size
        unet.register_to_config(sample_size=size if isinstance(size, int) else max(size))
        return unet


def drawn(pipe: Any, seeds: list[int], **parameters: Any) -> np.ndarray:
    """What diffusers draws: (N, H, W, 3) uint8."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    generator = generators if len(seeds) > 1 else generators[0]
    return np.stack([np.asarray(image) for image in pipe(generator=generator, **parameters).images])


def ours(pipe: Pipeline, seeds: list[int], **parameters: Any) -> np.ndarray:
    """What we draw: (N, H, W, 3) uint8."""
    return np.asarray(pipe(seed=seeds, output_type="np", **parameters).images)
