"""A torch module with a net's contract and the checkpoint's weights.

Modules are built on the meta device and take over the memory-mapped tensors: nothing is initialised or
copied.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.files.component import Component, read_tensors
from ...checkpoints.files.net_reads import UNREAD
from ...engines.errors import DAMAGED_WEIGHTS, EXPORT_IN_FP32, CheckpointError
from ...engines.spec import Array, NetSpec

# The folder of a part of which only the config is known. Its net is traced and never run: its weights have
# addresses, and nobody writes them, so they take no memory.
SHAPES_ALONE = Path(os.devnull)

# A parameter's name -> the tensor's name (a checkpoint's, then a package's), and its type in the checkpoint.
Tensors = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Net:
    """A torch module that satisfies `spec`, called with inputs by name, and where its tensors come from."""

    module: nn.Module
    spec: NetSpec
    tensors: Tensors

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The outputs of a net in float32, in the contract's order; float16 inputs are widened."""
        tensors = {name: torch.as_tensor(array) for name, array in inputs.items()}
        wide = {name: item.float() if item.is_floating_point() else item for name, item in tensors.items()}
        with torch.no_grad():
            found: Any = self.module(**wide)
        outputs = cast(tuple[Any, ...], found) if isinstance(found, tuple) else (found,)
        return [item.numpy() for item in outputs]


def spelled(dtype: torch.dtype) -> str:
    """A type's name in contracts."""
    return str(dtype).removeprefix("torch.")


def fill_buffers(net: nn.Module) -> None:
    """Set CLIP's positions, the one buffer that need not be in a checkpoint."""
    for module in net.modules():
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, torch.Tensor):
            cast(Any, module).position_ids = torch.arange(positions.shape[-1])[None]


def _check_values(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    low, high = map(float, torch.aminmax(tensor))  # NaN, if there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise CheckpointError(
            f"{name} has {bad} values of {tensor.numel()} that are NaN or infinite",
            expected="finite weights",
            fix="Download the checkpoint again, or use another; no --dtype mends a broken merge.",
        )
    largest, found = torch.finfo(dtype).max, max(-low, high)
    if found > largest:
        raise CheckpointError(
            f"{name} has values up to {found:.3g}",
            expected=f"at most {largest:.5g}, the largest number of {spelled(dtype)}",
            fix=EXPORT_IN_FP32 if dtype == torch.float16 else DAMAGED_WEIGHTS,
        )


def make_net(part: Component, module: nn.Module, spec: NetSpec, tensors: Tensors, dtype: torch.dtype) -> Net:
    """The Net of a wrapper whose attribute `net` is the module with the tensors of `part`.

    Raises:
        CheckpointError: a weight is not finite, or beyond `dtype`. (An island's are stored in fp16 too.)
    """
    named = {f"net.{key}": found for key, found in tensors.items()}
    if part.folder == SHAPES_ALONE:
        return Net(module=_unwritten(module, dtype), spec=spec, tensors=named)
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            _check_values(f"{part.folder}: the tensor {named[key][0]!r}", tensor, dtype)
    return Net(module=module.eval().requires_grad_(False).to(dtype), spec=spec, tensors=named)


def _unwritten(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` with memory that nobody wrote in place of the tensors on the meta device.

    torch's exporter takes no module that is on two devices, and a trace has constants on the CPU.
    """
    module = module.eval().requires_grad_(False).to(dtype)
    blank = {name: torch.empty_like(t, device="cpu") for name, t in module.state_dict().items() if t.is_meta}
    module.load_state_dict(blank, strict=False, assign=True)
    return module


def load(
    part: Component,
    net: nn.Module,
    names: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, tuple[str, str]]:
    """Give all parameters of `net`, which is on the meta device, tensors of `part`.

    `names` has a parameter's tensor where the names differ; `ignored` are prefixes of tensors not to read.

    Returns:
        A parameter of `net` -> the tensor's name and type. A part of SHAPES_ALONE leaves the net as it is.

    Raises:
        CheckpointError: tensors are missing, unknown, or of another shape.
    """
    wanted = net.state_dict()
    if part.folder == SHAPES_ALONE:
        return {name: (name, "F32") for name in wanted}
    names = {name: name for name in wanted} if names is None else names
    unread = {n for n in part.tensors if n.endswith(UNREAD) or n.startswith(ignored or "\0")}
    missing = sorted(name for name in names.values() if name not in part.tensors)
    surplus = sorted(set(part.tensors) - set(names.values()) - unread)
    odd = [
        f"{n} {part.tensors[f].shape}"
        for n, f in names.items()
        if f in part.tensors and part.tensors[f].shape != tuple(wanted[n].shape)
    ]
    if missing or surplus or odd:
        raise CheckpointError(
            f"{part.folder} has weights that do not fit its config.json (missing: {missing[:3]}; unknown:"
            f" {surplus[:3]}; other shape: {odd[:3]}; {len(missing) + len(surplus) + len(odd)} in all)",
            expected="the weights that config.json describes",
            fix="Download the checkpoint again, or take config.json from the model it was trained from.",
        )
    net.load_state_dict(read_tensors({n: part.tensors[f] for n, f in names.items()}), assign=True)
    return {name: (file_name, part.tensors[file_name].dtype) for name, file_name in names.items()}
