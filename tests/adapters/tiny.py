"""Tiny models of every family, and adapters' files for them."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from latentrt.adapters.binding import BoundAdapter, bind
from latentrt.adapters.files import read_adapter
from latentrt.adapters.merging import merged
from tests.export.ldm_files import TINY, Tensors, build, tensors_of

PARTS = ("unet", "text_encoder", "text_encoder_2")
Shapes = dict[str, dict[str, tuple[int, ...]]]


@cache
def modules(family: str) -> dict[str, Any]:
    """The nets of a family that adapters change, of random weights. Not to be changed."""
    return {part: module for part, module in build(TINY[family]).items() if part in PARTS}


@cache
def weights(family: str) -> dict[str, Tensors]:
    return {part: tensors_of(part, module) for part, module in modules(family).items()}


def targets(family: str) -> Shapes:
    return {
        part: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for part, tensors in weights(family).items()
    }


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def bound(path: Path, shapes: Shapes, *, allow_unused: bool = False) -> BoundAdapter:
    return bind(read_adapter(path), shapes, allow_unused=allow_unused)


def one(
    folder: Path, base: torch.Tensor, parts: Mapping[str, torch.Tensor], strength: float = 1.0
) -> np.ndarray[Any, Any]:
    """A tensor of a model that has no other, with a file of one module's parts in it."""
    name = "conv_in" if base.ndim == 4 and base.shape[1] in (8, 9) else "layer"
    path = write(folder / "one.safetensors", {f"lora_unet_{name}.{part}": x for part, x in parts.items()})
    found = bound(path, {"unet": {f"{name}.weight": tuple(base.shape)}})
    assert found.unused == ()
    assert found.applied == found.total == len(parts)
    return merged(base.numpy(), [(found.changes["unet"][f"{name}.weight"], strength)])


def assert_near(found: np.ndarray[Any, Any], expected: torch.Tensor) -> None:
    """Within two units in the last place, as float32 has it, of the largest number."""
    wanted = expected.detach().double().numpy()
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2 * np.spacing(np.float32(np.abs(wanted).max()))
