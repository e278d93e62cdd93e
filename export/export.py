"""Checkpoint -> package folder: the stages of an export, in order.

One component at a time is in memory. The package is written beside its place and renamed at the end, so a
failed export leaves nothing behind and what was there before stays.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..engines import spec
from ..engines.errors import StorageError, UsageError
from ..engines.package import MANIFEST, NetFile, Package, write_manifest
from .checkpoint.open import Checkpoint
from .manifest import make_manifest
from .progress import Progress, Stages

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..engines.spec import NetSpec
    from .precision.calibration import Calibration
    from .precision.ranges import Found
    from .verify import Comparison

Dtype = Literal["fp16", "fp32"]

# A net's folder -> the part of the checkpoint it is made of, in the order in which nets feed each other.
_SOURCES = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "image_encoder": "image_encoder",
    "image_noiser": "image_normalizer",
    "vae_encoder": "vae",
    "unet": "unet",
    "vae_decoder": "vae",
    "preview_decoder": "tiny_vae",
}


def components(source: Checkpoint) -> tuple[str, ...]:
    """The folders of nets, with weights, that the package of this checkpoint has."""
    return tuple(folder for folder, part in _SOURCES.items() if part in source.parts)


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
        progress: is told of each stage as it begins.
        report: is told of each comparison that verifying makes.
        report_islands: is told what measuring each component's ranges found (fp16 only).
        note: is told what had to be assumed of the checkpoint, a line each.
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
    if dtype not in ("fp16", "fp32"):
        raise UsageError(
            f"dtype is {dtype!r}", expected="fp16 or fp32", fix="Pass --dtype fp16 or --dtype fp32."
        )
    source = Checkpoint.open(
        checkpoint,
        prefer_fp16=dtype == "fp16",
        vae=vae,
        tiny_vae=tiny_vae,
        prediction_type=prediction_type,
    )
    _check_target(package, overwrite)
    if note is not None:
        for line in source.notes:
            note(line)
    calibration = _calibration(source) if dtype == "fp16" else None
    each = 1 + (calibration is not None) + verify
    stages = Stages(len(components(source)) * each + 1, progress)
    with _beside(package, overwrite) as folder:
        nets: dict[str, NetFile] = {}
        for component in components(source):
            files = _component(source, component, folder, dtype, stages, calibration, report_islands)
            if verify:
                _verify(source, component, folder, files, dtype, stages, report)
            nets |= files
        stages.begin("package")
        nets |= _steps(folder, nets["unet"].spec)
        for name, tokenizer in source.tokenizers.items():
            tokenizer.write(folder / name)
        write_manifest(folder, make_manifest(source, dtype, nets))
    return Package.open(package)


def _component(
    source: Checkpoint,
    component: str,
    folder: Path,
    dtype: Dtype,
    stages: Stages,
    calibration: Calibration | None,
    report_islands: Callable[[Found], None] | None,
) -> dict[str, NetFile]:
    """Trace one torch net and write its weights and graphs."""
    stages.begin(f"export {component}")
    model, net, contract = _traced(source, component, folder / component, dtype)
    if calibration is not None:
        stages.begin(f"measure {component}")
        _islands(source, component, folder / component, model, calibration, report_islands)
    return _graphs(component, folder, model, net, contract, dtype)


def _calibration(source: Checkpoint) -> Calibration:
    from .precision.calibration import Calibration

    return Calibration(source)


def _traced(source: Checkpoint, component: str, target: Path, dtype: Dtype) -> tuple[ir.Model, str, NetSpec]:
    """The graph, name and contract of a net. Its weights are written; the torch module is gone."""
    import onnx_ir as ir
    import torch

    from .graphs import passes as surgery
    from .graphs import weights
    from .graphs.to_onnx import to_onnx
    from .nets.build import BUILD

    target.mkdir()
    net = BUILD[component](source, torch.float16 if dtype == "fp16" else torch.float32)
    compute = ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.FLOAT
    state = net.module.state_dict()
    stored = {name: state[key] for key, (name, _) in net.tensors.items()}
    types = {name: weights.stored_type(found, compute) for name, found in net.tensors.values()}
    slots = weights.write_weights(target / weights.WEIGHTS, stored, types)
    model = to_onnx(net)
    weights.attach(model, target, slots)
    surgery.clean(model)
    return model, net.name, net.spec


def _islands(
    source: Checkpoint,
    component: str,
    folder: Path,
    model: ir.Model,
    calibration: Calibration,
    report: Callable[[Found], None] | None,
) -> None:
    """Let what needs it compute in float32. Before the UNet is cut, so that all its graphs agree."""
    from .precision import islands
    from .precision.ranges import find_islands

    gc.collect()  # torch's weights and ONNX Runtime's need not be in memory together
    if component == "unet" and source.unet.config.get("upcast_attention"):
        islands.upcast_attention(model)
    found = find_islands(model, component, folder, calibration.drive)
    if report is not None:
        report(found)


def _graphs(
    component: str, folder: Path, model: ir.Model, net: str, contract: NetSpec, dtype: Dtype
) -> dict[str, NetFile]:
    """Write the graphs of a component."""
    import onnx_ir as ir

    from .graphs import passes as surgery
    from .graphs import weights
    from .precision import islands

    files: dict[str, NetFile] = {}
    for name, (graph, boundary, file) in _cut(net, model, contract).items():
        surgery.forget_shapes(graph)
        cast(Any, ir).save(graph, folder / component / file)
        files[name] = NetFile(
            graph=f"{component}/{file}",
            weights=f"{component}/{weights.WEIGHTS}",
            spec=boundary,
            fp32_islands=islands.find(graph) if dtype == "fp16" else (),
        )
    return files


def _steps(folder: Path, unet: NetSpec) -> dict[str, NetFile]:
    """The row updates between two calls of that UNet: plain, and keeping a picture outside a mask."""
    from .graphs.step import write_step

    prediction = unet.outputs[0]
    channels = prediction.shape[1]
    assert isinstance(channels, int)
    (folder / "step").mkdir()
    files: dict[str, NetFile] = {}
    for name, make, file in (("step", spec.step, "model"), ("step_masked", spec.step_masked, "masked")):
        contract = make(channels=channels, float_dtype=prediction.dtype)
        write_step(folder / "step" / f"{file}.onnx", contract)
        files[name] = NetFile(graph=f"step/{file}.onnx", weights=None, spec=contract)
    return files


def _verify(
    source: Checkpoint,
    component: str,
    folder: Path,
    files: Mapping[str, NetFile],
    dtype: Dtype,
    stages: Stages,
    report: Callable[[Comparison], None] | None,
) -> None:
    from .verify import verify_component

    stages.begin(f"verify {component}")
    for comparison in verify_component(source, component, folder, files, dtype):
        if report is not None:
            report(comparison)


def _cut(net: str, model: ir.Model, contract: NetSpec) -> dict[str, tuple[ir.Model, NetSpec, str]]:
    """Net -> its graph, contract and file: four for the UNet."""
    from .graphs.hoist import hoist

    if net != "unet_whole":
        return {net: (model, contract, "model.onnx")}
    split = hoist(model)
    return {
        "unet_whole": (model, contract, "model.onnx"),
        "unet": (split.loop, split.loop_spec, "loop.onnx"),
        "unet_context": (split.context, split.context_spec, "context.onnx"),
        "unet_time": (split.time, split.time_spec, "time.onnx"),
    }


def _check_target(package: Path, overwrite: bool) -> None:
    if not package.exists() or (package.is_dir() and not any(package.iterdir())):
        return
    if not (package / MANIFEST).is_file():
        raise UsageError(
            f"{package} exists and is no package",
            expected="a folder that does not exist yet, or an empty one",
            fix="Choose another path.",
        )
    if not overwrite:
        raise UsageError(
            f"{package} is a package already",
            expected="a folder that does not exist yet, or an empty one",
            fix="Choose another path, or pass --overwrite.",
        )


@contextmanager
def _beside(package: Path, overwrite: bool) -> Generator[Path]:
    """A temporary folder next to `package` that takes its place if the block succeeds."""
    try:
        package.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{package.name}-", dir=package.parent))
    except OSError as error:
        raise _storage(package, error) from error
    try:
        try:
            yield folder
            folder.chmod(0o755)
            _replace(folder, package, overwrite)
        except OSError as error:
            raise _storage(package, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, package: Path, overwrite: bool) -> None:
    _check_target(package, overwrite)  # once more: minutes have passed
    old = None
    if package.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{package.name}-old-", dir=package.parent))
        os.replace(package, old)
    try:
        os.replace(folder, package)
    except OSError:
        if old is not None:
            os.replace(old, package)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _storage(package: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{package} cannot be written ({error.strerror or error})",
        expected="a writable folder with room for twice the checkpoint",
        fix="Free some space, or choose another path.",
    )
