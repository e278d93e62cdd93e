"""Checkpoint -> package folder: with graphs that ship where they fit, else traced by torch.

The package is written to a temporary folder beside its place and renamed at the end, so a failed export
leaves nothing behind, and a package that was there before stays (`beside.py`). torch is imported where a net
is traced or verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.fusing import LoraFile, read_fused
from ..checkpoints.files.open import Checkpoint
from ..checkpoints.fused import fuse
from ..checkpoints.precision.islands import Found
from ..checkpoints.stages import Progress
from ..checkpoints.templates.archive import DTYPES, SHIPPED, Dtype
from ..checkpoints.writing import CopiedWeights, Graphs, TemplateGraphs, Verify, write_package
from ..engines.errors import BackendError, CheckpointError, UsageError
from ..engines.installed import install_command
from ..engines.package import NetFile, Package
from ..runtime.prompts.tokenizer import tokenize
from .target import check_target, complete

if TYPE_CHECKING:
    from .verify import Comparison

# What tracing and verifying import, of the extra [export].
_TORCH = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


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
    templates: Path | None = SHIPPED,
    loras: Sequence[LoraFile] = (),
    allow_unused: bool = False,
    few_steps: str | None = None,
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
        note: called with each line on what had to be assumed about the checkpoint, and why it is traced.
        overwrite: replace an existing package, once the new one is complete.
        vae: a folder or file of another autoencoder, in place of the checkpoint's.
        tiny_vae: a folder or file of a tiny autoencoder (TAESD): the net `preview_decoder`.
        prediction_type: "epsilon" or "v_prediction", where the checkpoint is one file and does not say.
        templates: the archive of graphs, which are traced where not all are in it; None traces them anyway.
        loras: files of adapters that become part of the weights, in this order; alone, or each with its
            strength: a number, or a mapping as `Pipeline.set_adapters` takes it.
        allow_unused: go on where the checkpoint has no weight for some keys of an adapter.
        few_steps: the few-step LoRA (`adapters.few_steps.FEW_STEPS`) whose sampler, steps and guidance become
            the package's defaults; None is the one that an adapter's metadata speaks of, if any does.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of a family not supported.
        AdapterError: an adapter is damaged, or made for another model.
        UsageError: `package` exists and is not to be replaced, `dtype` is unknown, or what `loras` and
            `few_steps` say cannot be done.
        BackendError: a library is missing: onnxruntime for fp16, what the extra [export] has for tracing and
            verifying.
        NumericError: a net differs from torch by more than its bar, is not finite, or has an output beyond
            fp16 where that is asked for; or a merged weight is beyond its type.
        StorageError: the disk is full, or the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(
            f"dtype is {dtype!r}", expected="fp16 or fp32", fix="Pass --dtype with one of these."
        )
    if dtype == "fp16":
        _require("measuring the ranges of fp16", ["onnxruntime"], "cpu")
    if verify:
        _require("verifying", [*_TORCH, "onnxruntime"], "cpu,export")
    source = Checkpoint.open(
        checkpoint,
        prefer_fp16=dtype == "fp16",
        vae=vae,
        tiny_vae=tiny_vae,
        prediction_type=prediction_type,
    )
    check_target(package, overwrite)
    fused = read_fused(source, loras, allow_unused=allow_unused, few_steps=few_steps)
    graphs, lines = _graphs(source, dtype, templates)
    if note is not None:
        for line in (*source.notes, *fused.notes, *lines):
            note(line)
    with complete(package, overwrite) as folder:
        source = fuse(source, fused, folder.parent / "merged", dtype, progress)
        write_package(
            source,
            folder,
            graphs=graphs.of(source),
            weights=CopiedWeights(source),
            dtype=dtype,
            tokenize=tokenize,
            progress=progress,
            report_islands=report_islands,
            verify=_verification(source, dtype, report) if verify else None,
        )
    return Package.open(package)


def _graphs(source: Checkpoint, dtype: Dtype, templates: Path | None) -> tuple[Graphs, Sequence[str]]:
    """The graphs of a checkpoint: all from templates, or all traced, and a line that says why."""
    lines: list[str] = []
    if templates is None:
        _require("tracing", _TORCH, "export")
    else:
        try:
            return TemplateGraphs(source, dtype, templates), lines
        except CheckpointError as error:
            _require(f"{error.found}. Tracing it", _TORCH, "export")
            lines.append(f"{error.found}. Torch traces it.")
    from .traced import TracedGraphs

    return TracedGraphs(source, dtype), lines


def _require(what: str, libraries: Sequence[str], extras: str) -> None:
    """Raise BackendError if one of these libraries, which the extras bring, is not installed."""
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"{what} needs {', '.join(missing)}",
            expected=f"latentrt[{extras}]",
            fix=f"Install it, and export again: {install_command(extras)}",
        )


def _verification(source: Checkpoint, dtype: Dtype, report: Callable[[Comparison], None] | None) -> Verify:
    from .verify import verify_component

    def verify(component: str, folder: Path, files: Mapping[str, NetFile]) -> None:
        for comparison in verify_component(source, component, folder, files, dtype):
            if report is not None:
                report(comparison)

    return verify
