"""Checkpoint folder -> package folder: the stages of an export, in order.

One component at a time is in memory. The package is written beside its place and renamed at the end, so a
failed export leaves nothing behind and what was there before stays.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..engines import spec
from ..engines.errors import CheckpointError, StorageError, UsageError
from ..engines.package import MANIFEST, Defaults, Manifest, NetFile, Package, write_manifest
from .checkpoint import Checkpoint
from .progress import Progress, Stages

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..engines.spec import NetSpec
    from .calibration import Calibration
    from .ranges import Found
    from .verify import Comparison

Dtype = Literal["fp16", "fp32"]

_COMPONENTS = ("text_encoder", "unet", "vae_decoder")
_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


def export_package(
    checkpoint: Path,
    package: Path,
    *,
    dtype: Dtype = "fp16",
    verify: bool = True,
    progress: Callable[[Progress], None] | None = None,
    report: Callable[[Comparison], None] | None = None,
    report_islands: Callable[[Found], None] | None = None,
    overwrite: bool = False,
) -> Package:
    """Write the package of a checkpoint.

    Args:
        checkpoint: a diffusers folder.
        package: the folder to make. It may exist if it is empty.
        dtype: the arithmetic of the graphs.
        verify: compare every net with torch, and fail below the bars of `verify.py`.
        progress: is told of each stage as it begins.
        report: is told of each comparison that verifying makes.
        report_islands: is told what measuring each component's ranges found (fp16 only).
        overwrite: replace an existing package, once the new one is complete.

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
    source = Checkpoint.open(checkpoint, prefer_fp16=dtype == "fp16")
    _check_target(package, overwrite)
    calibration = _calibration(source) if dtype == "fp16" else None
    each = 1 + (calibration is not None) + verify
    stages = Stages(len(_COMPONENTS) * each + 1, progress)
    with _beside(package, overwrite) as folder:
        nets: dict[str, NetFile] = {}
        for component in _COMPONENTS:
            files = _component(source, component, folder, dtype, stages, calibration, report_islands)
            if verify:
                _verify(source, component, folder, files, dtype, stages, report)
            nets |= files
        stages.begin("package")
        nets["step"] = _step(folder, nets["unet"].spec)
        _copy_tokenizer(source.root / "tokenizer", folder / "tokenizer")
        write_manifest(folder, _manifest(source, dtype, nets))
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
    from .calibration import Calibration

    return Calibration(source)


def _traced(source: Checkpoint, component: str, target: Path, dtype: Dtype) -> tuple[ir.Model, str, NetSpec]:
    """The graph, name and contract of a net. Its weights are written; the torch module is gone."""
    import onnx_ir as ir
    import torch

    from . import surgery, weights
    from .nets import BUILD
    from .to_onnx import to_onnx

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
    from . import islands
    from .ranges import find_islands

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

    from . import islands, surgery, weights

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


def _step(folder: Path, unet: NetSpec) -> NetFile:
    """The row update between two calls of that UNet."""
    from .step_graph import write_step

    prediction = unet.outputs[0]
    channels = prediction.shape[1]
    assert isinstance(channels, int)
    contract = spec.step(channels=channels, float_dtype=prediction.dtype)
    (folder / "step").mkdir()
    write_step(folder / "step" / "model.onnx", contract)
    return NetFile(graph="step/model.onnx", weights=None, spec=contract)


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
    from .hoist import hoist

    if net != "unet_whole":
        return {net: (model, contract, "model.onnx")}
    split = hoist(model)
    return {
        "unet_whole": (model, contract, "model.onnx"),
        "unet": (split.loop, split.loop_spec, "loop.onnx"),
        "unet_context": (split.context, split.context_spec, "context.onnx"),
        "unet_time": (split.time, split.time_spec, "time.onnx"),
    }


def _manifest(source: Checkpoint, dtype: Dtype, nets: Mapping[str, NetFile]) -> Manifest:
    blocks = source.vae.config.get("block_out_channels", [0] * 4)
    scale = 2 ** (len(blocks) - 1)
    context = nets["text_encoder"].spec.outputs[0]
    tokens, width = context.shape[1:]
    assert isinstance(tokens, int)
    assert isinstance(width, int)
    channels = nets["vae_decoder"].spec.inputs[0].shape[1]
    assert isinstance(channels, int)
    return Manifest(
        name=source.root.resolve().name,
        family=source.family,
        dtype=dtype,
        latent_channels=channels,
        context_width=width,
        # "-Infinity", diffusers' default of lambda_min_clipped, is no JSON; a missing key means the same
        scheduler={key: value for key, value in source.scheduler.items() if value != -math.inf},
        nets={name: nets[name] for name in spec.NETS},
        defaults=_defaults(source, scale),
        latent_scale=scale,
        size_multiple=max(8, scale),
        max_tokens=tokens,
        producer=_producer(),
    )


def _producer() -> str:
    from importlib.metadata import version

    packages = ("latentrt", "torch", "diffusers", "transformers", "onnxscript")
    return ", ".join(f"{name} {version(name)}" for name in packages)


def _defaults(source: Checkpoint, scale: int) -> Defaults:
    """The checkpoint's `recommended.json`, if there is one, over what the family uses."""
    size = source.unet.config.get("sample_size") or 64
    height, width = cast(list[int], size) if isinstance(size, list) else (size, size)
    values: dict[str, Any] = {"height": height * scale, "width": width * scale}
    path = source.root / "recommended.json"
    if path.is_file():
        values |= _recommended(path)
    return Defaults(**values)


def _recommended(path: Path) -> dict[str, Any]:
    try:
        data = dict(json.loads(path.read_text(encoding="utf-8")))
        Defaults(**data)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error})",
            expected=f"a JSON object with some of {', '.join(sorted(vars(Defaults())))}",
            fix="Mend or remove it.",
        ) from error
    return data


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy contents, not links: Hugging Face's cache consists of links, which a package must not hold."""
    target.mkdir()
    found = [name for name in _TOKENIZER if (source / name).is_file()]
    if "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= set(found):
        raise CheckpointError(
            f"{source} holds {found}",
            expected="tokenizer.json, or vocab.json and merges.txt",
            fix="Download the checkpoint's tokenizer folder again.",
        )
    for name in found:
        shutil.copyfile(source / name, target / name)


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
