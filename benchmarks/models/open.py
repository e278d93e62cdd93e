"""The models that are measured, by name: the demo model, a package, or a full-size one that is made.

    demo                     the shipped package; its checkpoint where the repository is at hand
    a package's folder       with the checkpoint it was exported from, if the caller has it
    a checkpoint             a file or a diffusers folder, opened as it is
    sd15-fp32, sd21-fp16, …  exact shapes with random weights, made once into a cache folder; never downloaded

A full-size model is exported from a checkpoint that `checkpoints.py` makes. Without the extra [export] it is
filled from a skeleton (`skeletons.py`), which a checkout has for some of them; then no peer that needs a
checkpoint can run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ...checkpoints.beside import beside
from ...engines.errors import BackendError, CheckpointError, UsageError
from ...engines.installed import install_command
from ...engines.package import MANIFEST, Package
from ...engines.store.folder import default_root
from ...runtime.model import SHIPPED
from .. import skeletons
from ..sides.contract import Task, missing_modules, open_package
from . import full_size

# Recipes, and what each takes in the cache as checkpoint, and as much again as package of any dtype: weights
# are stored as fp16 (`du -sb`: 2.13 and 2.14 GB, 2.58 and 2.58 GB).
SIZES: Mapping[str, str] = {"sd15": "2.1 GB", "sd21": "2.6 GB"}
NAMES = ("demo", *(f"{recipe}-{dtype}" for recipe in SIZES for dtype in ("fp32", "fp16")))
_INDEX = "model_index.json"
_EXPORT_NEEDS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is measured.

    Attributes:
        package: opened, its files' sizes checked.
        path: what was opened: the package's folder, or the checkpoint.
        checkpoint: the diffusers folder with the same weights; None where that is not at hand.
        name: that `find_model` got; of a path its last part.
    """

    package: Package
    path: Path
    checkpoint: Path | None
    name: str


def find_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    backend: str = "auto",
    said: Callable[[str], None] = lambda line: None,
) -> Model:
    """The model of that name, made if it is not in the cache yet.

    Args:
        name: of `NAMES`, a package's folder, or a checkpoint's file or folder.
        checkpoint: what a package was exported from; default: what this module knows of.
        backend: the one of latentrt's own that a checkpoint is opened for, or "auto".
        said: gets a line about what making one costs, before it is made, and what opening a checkpoint notes.

    Raises:
        UsageError: no such model.
        CheckpointError: `checkpoint` is none, or the model is one that cannot be opened.
        BackendError: it would have to be made, and the extra [export] is not installed; or the backend that a
            checkpoint is opened for is unknown.
        ModelError: it cannot be made, or the package is damaged.
        StorageError: a checkpoint is opened for the first time, and the disk is full.
    """
    if checkpoint is not None and not (checkpoint / _INDEX).is_file():
        raise CheckpointError(
            f"{checkpoint} is no checkpoint: it has no {_INDEX}",
            expected="the diffusers folder that the package was exported from",
            fix="Name another one: --checkpoint FOLDER.",
        )
    own: Path | None = None
    if name == "demo":  # a checkout has its checkpoint, an installed wheel has not
        path, own = SHIPPED["demo"], SHIPPED["demo"].parent / "checkpoint"
    elif name in NAMES:
        path, own = _full_size(name, said)
    elif Path(name).exists():
        path = own = Path(name).absolute()
        name = path.resolve().name if path.is_dir() else path.stem
    else:
        raise UsageError(
            f"there is no model {name!r}",
            expected=f"{', '.join(NAMES)}, a package's folder, or a checkpoint's file or folder",
            fix="Choose one of these.",
        )
    found = own if own and (own / _INDEX).is_file() else None
    package = open_package(Task(model=path, backend=backend), note=said)
    return Model(package=package, path=path, checkpoint=checkpoint or found, name=name)


def _full_size(name: str, said: Callable[[str], None]) -> tuple[Path, Path | None]:
    """Package and checkpoint from the cache, or made into it by one process while others wait."""
    cache, (recipe, _, dtype) = default_root() / "benchmarks", name.rpartition("-")
    checkpoint, package, filled = cache / recipe, cache / name, cache / f"{name}-skeleton"
    if (package / MANIFEST).is_file():
        return package, checkpoint
    missing = missing_modules(*_EXPORT_NEEDS)
    folders = filled, skeletons.FOLDER / name
    if missing and not any((folder / MANIFEST).is_file() for folder in folders):
        raise BackendError(
            f"{name} must be exported first; {missing}",
            expected=f"the extras [cpu,export], or its skeleton {skeletons.FOLDER / name}",
            fix="Use a checkout of the repository, which has skeletons of sd15-fp16 and sd21-fp16, or install"
            f" them: {install_command('cpu,export')}",
        )
    cache.mkdir(parents=True, exist_ok=True)
    size = SIZES[recipe]
    # what is there by now is complete; another process may have made it meanwhile
    with FileLock(cache / ".making.lock"):
        if missing:
            if not filled.exists():
                said(f"making {filled}: random weights without torch, {size} of disk and a minute, once")
                with beside(filled) as folder:
                    skeletons.fill_skeleton(name, folder / name).root.rename(filled)
            return filled, None  # no checkpoint has its weights
        if not (checkpoint / _INDEX).is_file():
            said(f"making {checkpoint}: a checkpoint with random weights, {size} of disk, once")
            full_size.make_checkpoint(recipe, checkpoint)
        if not (package / MANIFEST).is_file():
            said(f"making {package}: exported from {checkpoint}, {size} of disk and minutes, once")
            full_size.export(checkpoint, package, dtype)
    return package, checkpoint
