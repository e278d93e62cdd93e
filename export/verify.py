"""Compares each net of a package with torch in float32, on random inputs.

The bars are in `engines/tolerances.py`: relative L2 over a whole output, and dB of the decoder's picture.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checkpoints.files.open import Checkpoint
from ..checkpoints.precision.calibration import token_ids
from ..checkpoints.precision.islands import open_session
from ..engines.errors import EXPORT_IN_FP32, NumericError
from ..engines.package import NetFile
from ..engines.spec import EXTRA_EMBEDDINGS, TEXT_ENCODERS, VECTORS, Array
from ..engines.tolerances import DECODED_DB, NET_RELATIVE_L2
from .graphs.to_onnx import example
from .nets.build import NETS
from .nets.clip import tokenize
from .nets.torch_net import torch_threads

# Not the sizes that were traced: a size frozen into the graph shows.
_SIZES: Mapping[str, int] = {
    "B": 2,
    "E": 1,
    "N": 1,
    "P": 2,
    "T": 77,
    "H/8": 24,
    "W/8": 40,
    "H": 192,
    "W": 320,
}
# Outputs that may be close to zero: their error is relative to what they are added to, pixels and latents of
# magnitude one.
_SUMMANDS = (("vae_decoder", "mean"), ("preview_decoder", "mean"), ("vae_encoder", "std"))


@dataclass(frozen=True)
class Comparison:
    """One output of one net compared with torch. `psnr` (dB) is infinite for equal arrays."""

    net: str
    output: str
    relative_l2: float
    max_error: float
    psnr: float
    passed: bool


def compare(net: str, output: str, found: Array, wanted: Array, dtype: str) -> Comparison:
    """Compare `found` (ONNX Runtime) with `wanted` (torch in float32), at the bar of `dtype`."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return Comparison(net, output, math.inf, math.inf, -math.inf, passed=False)
    error = float(np.linalg.norm(a - b))
    size = math.sqrt(b.size) if (net, output) in _SUMMANDS else float(np.linalg.norm(b))
    peak = {"image": 255.0, "mean": 2.0}.get(output, float(b.max() - b.min()))
    psnr = math.inf if error == 0 else 20 * math.log10(max(peak, 1e-30) * math.sqrt(a.size) / error)
    relative = error / max(size, 1e-30)
    passed = psnr >= DECODED_DB[dtype] if found.dtype == np.uint8 else relative <= NET_RELATIVE_L2[dtype]
    return Comparison(net, output, relative, float(np.abs(a - b).max()), psnr, passed)


@torch_threads()
def verify_component(
    source: Checkpoint, component: str, root: Path, files: Mapping[str, NetFile], dtype: str
) -> list[Comparison]:
    """Verify the nets of one component; `files` are their entries in the manifest of the package at `root`.

    torch runs first and is gone before ONNX Runtime starts, so that their memory does not add up.

    Raises:
        NumericError: a net is below its bar.
    """
    main = "unet_whole" if component == "unet" else component
    arrays: dict[str, Array] = {n: tensor.numpy() for n, tensor in example(files[main].spec, _SIZES).items()}
    if component in TEXT_ENCODERS:  # the token that ends a prompt marks the pooled embedding
        arrays["input_ids"] = token_ids(source, component, tokenize)[: _SIZES["P"]].astype(np.int32)
    asked = {name: array for name, array in arrays.items() if name != EXTRA_EMBEDDINGS}  # torch has none
    wanted = NETS[component].build(source, torch.float32).run(asked)
    gc.collect()
    checks = [
        compare(main, output, found, b, dtype)
        for (output, found), b in zip(_run(root, files[main], arrays)[0].items(), wanted, strict=True)
    ]
    if component == "unet":
        prediction = _hoisted(root, files, arrays)
        checks.append(compare("unet", "prediction", prediction, wanted[0], dtype))
    for check in checks:
        if not check.passed:
            raise NumericError(
                f"{check.net}: {check.output} differs from torch by {check.relative_l2:.2e} relative L2"
                f" (largest error {check.max_error:.2e}, PSNR {check.psnr:.1f} dB)",
                expected=f"at most {NET_RELATIVE_L2[dtype]:.0e} ({DECODED_DB[dtype]:.0f} dB for pictures) in"
                f" {dtype}",
                fix=EXPORT_IN_FP32
                if dtype == "fp16"
                else "Report the checkpoint: its graph is computed wrongly.",
            )
    return checks


def _hoisted(root: Path, files: Mapping[str, NetFile], arrays: Mapping[str, Array]) -> Array:
    """The prediction by way of the invariants, one row a call because every row has its own timestep here."""
    time = {name: array for name, array in arrays.items() if name == "timestep" or name in VECTORS}
    (times,) = _run(root, files["unet_time"], time)
    (contexts,) = _run(root, files["unet_context"], {"context": arrays["encoder_hidden_states"]})
    rows: list[dict[str, Array]] = []
    for row in range(len(arrays["sample"])):
        one = slice(row, row + 1)
        invariants = {name: value[one] for name, value in {**contexts, **times}.items()}
        latent, behind = np.split(arrays["sample"][one], [4], axis=1)
        rows.append({"latent": latent, **({"image_latents": behind} if behind.size else {}), **invariants})
    return np.concatenate([found["prediction"] for found in _run(root, files["unet"], *rows)])


def _run(root: Path, file: NetFile, *calls: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The outputs of each call on ONNX Runtime, by name."""
    session = open_session(root / file.graph)
    names = [item.name for item in file.spec.outputs]
    return [dict(zip(names, session.run(names, dict(call)), strict=True)) for call in calls]
