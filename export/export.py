"""Checkpoint -> package folder: the stages of an export, in order.

One net at a time is in memory. The package is written to a temporary folder beside its place and renamed at
the end, so a failed export leaves nothing behind, and a package that was there before stays (`beside.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, cast

import onnx_ir as ir
import torch

from ..checkpoints.beside import beside, put
from ..checkpoints.files.open import Checkpoint
from ..checkpoints.graphs import weights
from ..checkpoints.graphs.controls import add_controls
from ..checkpoints.graphs.extra_embeddings import add_extra_embeddings
from ..checkpoints.graphs.hoist import hoist
from ..checkpoints.graphs.step import write_step
from ..checkpoints.precision.calibration import Calibration
from ..checkpoints.precision.islands import Found, find_islands, island_names, upcast_attention
from ..engines import spec
from ..engines.errors import StorageError, UsageError
from ..engines.package import MANIFEST, NetFile, Package, write_manifest
from ..engines.processors import usable_processors
from .graphs import passes
from .graphs.to_onnx import to_onnx
from .manifest import make_manifest, request_defaults
from .nets.build import NETS, components
from .verify import Comparison, verify_component

Dtype = Literal["fp16", "fp32"]
_TORCH_TYPES = {"fp16": torch.float16, "fp32": torch.float32}
_ONNX_TYPES = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
# The file of a net's graph, where it is not "model".
_FILES = {
    "unet": "loop",
    "unet_context": "context",
    "unet_time": "time",
    "unet_controlled": "controlled",
    "step_masked": "masked",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One stage begins: the `index`-th (from 0) of `total`."""

    stage: str
    index: int
    total: int


def export_package(
    checkpoint: Path,
    package: Path,
    *,
    dtype: Dtype = "fp16",
    verify: bool = True,
    progress: Callable[[Progress], None] | None = None,
    report: Callable[[Comparison], None] | None = None,
    report_islands: Callable[[Found], None] | None = None,
    note: Callable[[str], None] | None = None,
    overwrite: bool = False,
    vae: Path | None = None,
    tiny_vae: Path | None = None,
    prediction_type: str | None = None,
) -> Package:
    """Write the package of a checkpoint.

    Args:
        checkpoint: a diffusers folder, or a `.safetensors` file of a whole checkpoint.
        package: the folder to make. It may exist if it is empty.
        dtype: the arithmetic of the graphs.
        verify: compare every net with torch, and fail below the bars of `verify.py`.
        progress: called with each stage as it begins.
        report: called with each comparison that verifying makes.
        report_islands: called with what measuring each component's ranges found (fp16 only).
        note: called with each line on what had to be assumed about the checkpoint.
        overwrite: replace an existing package, once the new one is complete.
        vae: a folder or file of another autoencoder, in place of the checkpoint's.
        tiny_vae: a folder or file of a tiny autoencoder (TAESD): the net `preview_decoder`.
        prediction_type: "epsilon" or "v_prediction", where the checkpoint is one file and does not say.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a family not supported.
        UsageError: `package` exists and is not to be replaced, or `dtype` is unknown.
        NumericError: a net differs from torch by more than its bar, is not finite, or has an output beyond
            fp16 where that is asked for.
        StorageError: the disk is full, or the folder cannot be written.
    """
    if dtype not in _TORCH_TYPES:
        raise UsageError(
            f"dtype is {dtype!r}", expected="fp16 or fp32", fix="Pass --dtype with one of these."
        )
    source = Checkpoint.open(
        checkpoint,
        prefer_fp16=dtype == "fp16",
        vae=vae,
        tiny_vae=tiny_vae,
        prediction_type=prediction_type,
    )
    defaults = request_defaults(source)
    _check_target(package, overwrite)
    if note is not None:
        for line in source.notes:
            note(line)
    calibration = Calibration(source) if dtype == "fp16" else None
    begin = _stages(len(components(source)) * (1 + (calibration is not None) + verify) + 1, progress)
    with _torch_threads():
        for component in components(source):  # weights that do not fit are named before anything is traced
            NETS[component].build(source, _TORCH_TYPES[dtype])
    with _complete(package, overwrite) as folder, _torch_threads():
        for name, write_tokenizer in source.tokenizers.items():
            write_tokenizer(folder / name)
        nets: dict[str, NetFile] = {}
        for component in components(source):
            files = _export_component(source, component, folder, dtype, begin, calibration, report_islands)
            if verify:
                begin(f"verify {component}")
                for comparison in verify_component(source, component, folder, files, dtype):
                    if report is not None:
                        report(comparison)
            nets |= files
        begin("package")
        nets |= _write_steps(folder, nets["unet"].spec)
        write_manifest(folder, make_manifest(source, dtype, nets, defaults))
    return Package.open(package)


@contextmanager
def _torch_threads() -> Generator[None]:
    """No more threads than there are processors for them: torch does not look at quotas."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, usable_processors()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stages(total: int, report: Callable[[Progress], None] | None) -> Callable[[str], None]:
    """A function that reports each stage of one export as it begins."""
    numbers = count()

    def begin(stage: str) -> None:
        if report is not None:
            report(Progress(stage=stage, index=next(numbers), total=total))

    return begin


def _export_component(
    source: Checkpoint,
    component: str,
    folder: Path,
    dtype: Dtype,
    begin: Callable[[str], None],
    calibration: Calibration | None,
    report_islands: Callable[[Found], None] | None,
) -> dict[str, NetFile]:
    """Write the weights and the graphs of one torch net."""
    begin(f"export {component}")
    target = folder / component
    target.mkdir()
    net = NETS[component].build(source, _TORCH_TYPES[dtype])
    state = net.module.state_dict()
    tensors = {name: state[key] for key, (name, _) in net.tensors.items()}
    types = {name: weights.stored_type(found, _ONNX_TYPES[dtype]) for name, found in net.tensors.values()}
    slots = weights.write_weights(target / weights.WEIGHTS, tensors, types)
    model = to_onnx(net)
    weights.attach(model, target, slots)
    contract = net.spec
    del net, state, tensors
    gc.collect()  # torch's weights and ONNX Runtime's need not be in memory together
    passes.clean(model)
    if calibration is not None:
        begin(f"measure {component}")
        if component == "unet" and source.unet.config.get("upcast_attention"):
            upcast_attention(model)
        found = find_islands(model, component, target, partial(NETS[component].calibrate, calibration))
        if report_islands is not None:
            report_islands(found)
    return _write_graphs(component, folder, model, contract, dtype)


def _write_graphs(
    component: str, folder: Path, model: ir.Model, contract: spec.NetSpec, dtype: Dtype
) -> dict[str, NetFile]:
    """Write the graph of a component, or the five of the UNet, which is cut after its islands are set."""
    graphs = {component: (model, contract)}
    if component == "unet":
        graphs = {"unet_whole": (model, contract), **hoist(model)}
        graphs["unet_controlled"] = add_controls(*graphs["unet"])
    elif component in spec.TEXT_ENCODERS:
        graphs[component] = model, add_extra_embeddings(model, contract)
    files: dict[str, NetFile] = {}
    for name, (graph, boundary) in graphs.items():
        path = f"{component}/{_FILES.get(name, 'model')}.onnx"
        weights.forget_shapes(graph)
        cast(Any, ir).save(graph, folder / path)
        files[name] = NetFile(
            graph=path,
            weights=f"{component}/{weights.WEIGHTS}",
            spec=boundary,
            fp32_islands=island_names(graph) if dtype == "fp16" else (),
        )
    return files


def _write_steps(folder: Path, unet: spec.NetSpec) -> dict[str, NetFile]:
    """Write the row updates between two calls of this UNet: plain, and keeping a picture outside a mask."""
    prediction = unet.outputs[0]
    (folder / "step").mkdir()
    files: dict[str, NetFile] = {}
    channels = prediction.shape[1]
    assert isinstance(channels, int)
    for name, make in (("step", spec.step), ("step_masked", spec.step_masked)):
        contract = make(channels=channels, float_dtype=prediction.dtype)
        path = f"step/{_FILES.get(name, 'model')}.onnx"
        write_step(folder / path, contract)
        files[name] = NetFile(graph=path, weights=None, spec=contract)
    return files


def _check_target(package: Path, overwrite: bool) -> None:
    is_package = (package / MANIFEST).is_file()
    empty = not package.exists() or (package.is_dir() and not any(package.iterdir()))
    if not empty and not (is_package and overwrite):
        raise UsageError(
            f"{package} {'is a package already' if is_package else 'exists and is no package'}",
            expected="a folder that does not exist yet, or an empty one",
            fix=f"{'Pass --overwrite to replace it, or choose' if is_package else 'Choose'} another path.",
        )


@contextmanager
def _complete(package: Path, overwrite: bool) -> Generator[Path]:
    """A folder that takes the place of `package` if the block succeeds."""
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        with beside(package) as folder:
            yield folder
            _check_target(package, overwrite)  # once more: minutes have passed
            put(folder, package, folder)
    except OSError as error:
        raise StorageError(
            f"{package} cannot be written ({error.strerror or error})",
            expected="a writable folder with room for twice the checkpoint",
            fix="Free some space, or choose another path.",
        ) from error
