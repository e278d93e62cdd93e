"""A tiny checkpoint in every form, and the graph templates of its architecture, made once a run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from latentrt.checkpoints.files.net_reads import net_tensors
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.export.architectures import Architecture
from tests.export.ldm_files import Recipe, build, one_file, text, unet, vae
from tests.traced_graphs import make_archive

# The whole vocabulary of CLIP, so that it draws real prompts.
SMALL = Recipe(
    unet=unet(
        (32, 64),
        "x-",
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        sample_size=16,
    ),
    vae=vae(32, 32),
    text_encoder=text(64, 48, 2, "quick_gelu", 64, 49408),
)

_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def shared(factory: pytest.TempPathFactory, name: str, make: Any) -> Path:
    """A file that one worker makes for all."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    path = root / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph templates of SMALL, in both types."""
    modules = small_modules()
    parts = {name: dict(module.config) for name, module in modules.items() if name != "text_encoder"}
    parts["text_encoder"] = SMALL.text_encoder or {}
    architecture = Architecture(parts=parts)
    return shared(tmp_path_factory, "small.zip", lambda path: make_archive(path, {"small": architecture}))


def small_modules() -> dict[str, Any]:
    """The nets of SMALL, their weights random."""
    return {name: module.half() for name, module in build(SMALL).items()}


def write_small(path: Path, *, dtype: torch.dtype = torch.float16, **changed: torch.Tensor) -> Path:
    """SMALL as a one-file checkpoint; `changed` tensors replace its own, or join them."""
    from safetensors.torch import save_file

    tensors = one_file(small_modules(), "sd1")
    tensors = {
        name: torch.arange(77)[None] if tensor.is_meta else tensor.to(dtype).contiguous()
        for name, tensor in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **changed}, path)
    return path


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SMALL as a one-file checkpoint in fp16, to look at or to copy."""
    return shared(tmp_path_factory, "small.safetensors", write_small)


def write_lora(
    path: Path,
    source: Path,
    inside: Mapping[str, str],
    *,
    seed: int = 0,
    scale: float = 0.5,
    metadata: dict[str, str] | None = None,
    **more: torch.Tensor,
) -> Path:
    """A LoRA of rank 2 with kohya's names, on the weights of each component whose names have `inside`."""
    values, tensors = np.random.default_rng(seed), dict[str, torch.Tensor]()
    checkpoint = Checkpoint.open(source)
    for component, part in inside.items():
        for name, header in net_tensors(checkpoint, component).items():
            if part in name and name.endswith(".weight") and len(header.shape) in (2, 4):
                key = _PREFIXES[component] + name.removesuffix(".weight").replace(".", "_")
                made, read, *kernel = header.shape
                down = values.normal(0, (read * np.prod(kernel)) ** -0.5, (2, read, *kernel))
                up = values.normal(0, scale, (made, 2, *(1 for _ in kernel)))
                tensors[f"{key}.lora_down.weight"] = torch.tensor(down, dtype=torch.float32)
                tensors[f"{key}.lora_up.weight"] = torch.tensor(up, dtype=torch.float32)
                tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file({**tensors, **more}, path, metadata)
    return path
