"""Checkpoint folder -> package folder: the stages of an export, in order.

One component at a time is in memory. The package is written beside its place and renamed at the end, so a
failed export leaves nothing behind and what was there before stays.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..engines.errors import CheckpointError, StorageError, UsageError
from ..engines.package import MANIFEST, Defaults, Manifest, NetFile, Package, write_manifest
from .checkpoint import Checkpoint
from .progress import Progress, Stages

if TYPE_CHECKING:
    from .nets import Net
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
        overwrite: replace an existing package, once the new one is complete.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a family not supported.
        UsageError: `package` exists and is not to be replaced, or `dtype` is unknown.
        NumericError: a net differs from torch by more than its bar.
        StorageError: the disk is full, or the folder cannot be written.
    """
    if dtype not in ("fp16", "fp32"):
        raise UsageError(
            f"dtype is {dtype!r}", expected="fp16 or fp32", fix="Pass --dtype fp16 or --dtype fp32."
        )
    source = Checkpoint.open(checkpoint, prefer_fp16=dtype == "fp16")
    _check_target(package, overwrite)
    stages = Stages(len(_COMPONENTS) * (2 if verify else 1) + 1, progress)
    with _beside(package, overwrite) as folder:
        nets: dict[str, NetFile] = {}
        for component in _COMPONENTS:
            files = _component(source, component, folder, dtype, stages)
            if verify:
                _verify(source, component, folder, files, dtype, stages, report)
            nets |= files
        stages.begin("package")
        _copy_tokenizer(source.root / "tokenizer", folder / "tokenizer")
        write_manifest(folder, _manifest(source, dtype, nets))
    return Package.open(package)


def _component(
    source: Checkpoint, component: str, folder: Path, dtype: Dtype, stages: Stages
) -> dict[str, NetFile]:
    """Trace one torch net and write its weights and graphs."""
    import onnx_ir as ir
    import torch

    from . import islands, surgery, weights
    from .nets import BUILD
    from .to_onnx import to_onnx

    stages.begin(f"export {component}")
    target = folder / component
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
    if dtype == "fp16" and component == "unet" and source.unet.config.get("upcast_attention"):
        islands.upcast_attention(model)
    files: dict[str, NetFile] = {}
    for name, (graph, contract, file) in _graphs(net, model).items():
        surgery.forget_shapes(graph)
        cast(Any, ir).save(graph, target / file)
        files[name] = NetFile(
            graph=f"{component}/{file}",
            weights=f"{component}/{weights.WEIGHTS}",
            spec=contract,
            fp32_islands=islands.find(graph) if dtype == "fp16" else (),
        )
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


def _graphs(net: Net, model: Any) -> dict[str, tuple[Any, Any, str]]:
    from .hoist import hoist

    if net.name != "unet_whole":
        return {net.name: (model, net.spec, "model.onnx")}
    split = hoist(model)
    return {
        "unet_whole": (model, net.spec, "model.onnx"),
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
        nets=nets,
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
