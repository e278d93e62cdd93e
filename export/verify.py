"""Each net of a package against torch in float32, on fresh random inputs.

The bars are in `engines/tolerances.py`: relative L2 over a whole output, and dB of the decoder's picture.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..engines.errors import NumericError
from ..engines.package import NetFile, Package
from ..engines.spec import TEXT_ENCODERS, VECTORS, Array
from ..engines.tolerances import DECODED_DB, NET_RELATIVE_L2
from .checkpoint.open import Checkpoint
from .graphs.to_onnx import example
from .nets.build import BUILD, Net
from .precision.calibration import token_ids

# Not the sizes that were traced: a size frozen into the graph shows.
_SIZES: Mapping[str, int] = {"B": 2, "N": 1, "P": 2, "T": 77, "H/8": 24, "W/8": 40, "H": 192, "W": 320}
# Outputs that may be next to nothing: their error is measured against what they are added to, pixels and
# latents of size one.
_SUMMANDS = (("vae_decoder", "mean"), ("preview_decoder", "mean"), ("vae_encoder", "std"))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One output of one net against torch. `psnr` (dB) is infinite for equal arrays."""

    net: str
    output: str
    relative_l2: float
    max_error: float
    psnr: float
    passed: bool


def compare(net: str, output: str, found: Array, wanted: Array, dtype: str) -> Comparison:
    """Measure `found` (ONNX Runtime) against `wanted` (torch in float32); judge it by the bar of `dtype`."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return Comparison(
            net=net, output=output, relative_l2=math.inf, max_error=math.inf, psnr=-math.inf, passed=False
        )
    error = float(np.linalg.norm(a - b))
    size = math.sqrt(b.size) if (net, output) in _SUMMANDS else float(np.linalg.norm(b))
    peak = {"image": 255.0, "mean": 2.0}.get(output, float(b.max() - b.min()))
    psnr = math.inf if error == 0 else 20 * math.log10(max(peak, 1e-30) * math.sqrt(a.size) / error)
    relative = error / max(size, 1e-30)
    passed = psnr >= DECODED_DB[dtype] if found.dtype == np.uint8 else relative <= NET_RELATIVE_L2[dtype]
    return Comparison(
        net=net,
        output=output,
        relative_l2=relative,
        max_error=float(np.abs(a - b).max()),
        psnr=psnr,
        passed=passed,
    )


def verify_package(
    package: Package,
    checkpoint: str | Path | Checkpoint,
    report: Callable[[Comparison], None] | None = None,
    seed: int = 0,
) -> tuple[Comparison, ...]:
    """Verify every net of a package against the checkpoint it was made from: a path, or opened with options.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        NumericError: a net is below its bar.
    """
    if isinstance(checkpoint, Checkpoint):
        source = checkpoint
    else:
        source = Checkpoint.open(checkpoint, prefer_fp16=package.manifest.dtype == "fp16")
    nets = package.manifest.nets
    found: list[Comparison] = []
    for component in BUILD:
        files = {name: file for name, file in nets.items() if file.graph.startswith(f"{component}/")}
        if not files:
            continue
        found += verify_component(source, component, package.root, files, package.manifest.dtype, seed)
    for item in found:
        if report is not None:
            report(item)
    return tuple(found)


def verify_component(
    source: Checkpoint, component: str, root: Path, files: Mapping[str, NetFile], dtype: str, seed: int = 0
) -> list[Comparison]:
    """Verify the nets of one component, given the package's folder and their entries in the manifest.

    torch runs first and is gone before ONNX Runtime starts: their memory does not add up.

    Raises:
        NumericError: a net is below its bar.
    """
    import torch

    main = "unet_whole" if component == "unet" else component
    inputs = example(files[main].spec, _SIZES, seed)
    if component in TEXT_ENCODERS:  # the pooled embedding is found by the token that ends a prompt
        inputs["input_ids"] = torch.tensor(token_ids(source, component)[: _SIZES["P"]], dtype=torch.int32)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    wanted = _torch(BUILD[component](source, torch.float32), inputs)
    gc.collect()
    outputs = [item.name for item in files[main].spec.outputs]
    checks = [
        compare(main, output, found, b, dtype)
        for output, found, b in zip(outputs, _ort(root, files[main], arrays).values(), wanted, strict=True)
    ]
    if component == "unet":
        prediction = _hoisted(root, files, arrays)
        checks.append(compare("unet", "prediction", prediction, wanted[0], dtype))
    for check in checks:
        if not check.passed:
            raise _below(check, dtype)
    return checks


def _torch(net: Net, inputs: Mapping[str, Any]) -> list[Array]:
    import torch

    wide = {name: item.float() if item.is_floating_point() else item for name, item in inputs.items()}
    with torch.no_grad():
        outputs: Any = net.module(**wide)
    several = cast(tuple[Any, ...], outputs) if isinstance(outputs, tuple) else (outputs,)
    return [item.numpy() for item in several]


def _hoisted(root: Path, files: Mapping[str, NetFile], arrays: Mapping[str, Array]) -> Array:
    """The prediction by way of the invariants: each row by itself, as every row has its own timestep here."""
    time = {name: array for name, array in arrays.items() if name == "timestep" or name in VECTORS}
    times = _ort(root, files["unet_time"], time)
    contexts = _ort(root, files["unet_context"], {"context": arrays["encoder_hidden_states"]})
    rows: list[dict[str, Array]] = []
    for row in range(len(arrays["sample"])):
        one = slice(row, row + 1)
        invariants = {name: value[one] for name, value in {**contexts, **times}.items()}
        latent, behind = np.split(arrays["sample"][one], [4], axis=1)
        rows.append({"latent": latent, **({"image_latents": behind} if behind.size else {}), **invariants})
    return np.concatenate(_calls(root, files["unet"], rows, "prediction"))


def _calls(root: Path, file: NetFile, calls: list[dict[str, Array]], output: str) -> list[Array]:
    session = _session(root, file)
    return [cast(Array, session.run([output], call)[0]) for call in calls]


def _ort(root: Path, file: NetFile, arrays: Mapping[str, Array]) -> dict[str, Array]:
    names = [item.name for item in file.spec.outputs]
    outputs = cast(list[npt.NDArray[Any]], _session(root, file).run(names, dict(arrays)))
    return dict(zip(names, outputs, strict=True))


def _session(root: Path, file: NetFile) -> Any:
    """ONNX Runtime on CPU. Arena, prepacking and folding would each keep another copy of the weights."""
    import onnxruntime

    ort = cast(Any, onnxruntime)  # its own stubs are incomplete
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(
        str(root / file.graph),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )


def _below(check: Comparison, dtype: str) -> NumericError:
    return NumericError(
        f"{check.net}: {check.output} differs from torch by {check.relative_l2:.2e} relative L2"
        f" (largest error {check.max_error:.2e}, PSNR {check.psnr:.1f} dB)",
        expected=f"at most {NET_RELATIVE_L2[dtype]:.0e} ({DECODED_DB[dtype]:.0f} dB for pictures) in {dtype}",
        fix="Export with --dtype fp32."
        if dtype == "fp16"
        else "Report the checkpoint: its graph is computed wrongly.",
    )
