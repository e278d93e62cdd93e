"""A torch module with a net's contract, made without weights and then given the checkpoint's.

Modules are built on the meta device and take the tensors as they are, memory-mapped: no second copy, no
initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ...engines.errors import CheckpointError
from ...engines.spec import NetSpec
from ..checkpoint.component import Component
from ..checkpoint.safetensors_file import read_tensors

# Tensors that old checkpoints hold and no net reads: buffers, and the projections of the full CLIP.
_UNREAD = ("position_ids", "text_projection.weight", "logit_scale")


@dataclass(frozen=True, kw_only=True)
class Net:
    """A torch module that satisfies `spec`, and what becomes of its tensors.

    `module` is called with the spec's inputs by name. `tensors` maps the name of a parameter in `module` to
    the name a package stores it under, and to the type (safetensors' name) the checkpoint has it in.
    """

    module: nn.Module
    spec: NetSpec
    tensors: Mapping[str, tuple[str, str]]


def spelled(dtype: torch.dtype) -> str:
    """A type as contracts name it."""
    return str(dtype).removeprefix("torch.")


def fill_buffers(net: nn.Module) -> None:
    """CLIP's positions: the one buffer that no checkpoint stores."""
    for module in net.modules():
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, torch.Tensor):
            cast(Any, module).position_ids = torch.arange(positions.shape[-1])[None]


def make_net(
    part: Component,
    module: nn.Module,
    spec: NetSpec,
    tensors: Mapping[str, tuple[str, str]],
    dtype: torch.dtype,
) -> Net:
    """The Net of a wrapper whose attribute `net` is the module with the tensors of `part`.

    Raises:
        CheckpointError: a weight has values that float16 cannot hold, and `dtype` is that.
    """
    module = module.eval().requires_grad_(False)
    if dtype == torch.float16:
        _refuse_overflow(part, module, tensors)
    module = module.to(dtype)
    named = {f"net.{key}": found for key, found in tensors.items()}
    return Net(module=module, spec=spec, tensors=named)


def _refuse_overflow(part: Component, module: nn.Module, tensors: Mapping[str, tuple[str, str]]) -> None:
    """A weight is stored in fp16, islands or not: none may become infinite on the way."""
    largest = torch.finfo(torch.float16).max
    for key, tensor in module.state_dict().items():
        if tensor.dtype == torch.float16 or not tensor.is_floating_point():
            continue
        low, high = torch.aminmax(tensor)
        found = max(-float(low), float(high))
        if largest < found < math.inf:
            stored = tensors[key.removeprefix("net.")][0]
            raise CheckpointError(
                f"{part.folder}: the tensor {stored!r} has values up to {found:.3g}",
                expected=f"at most {largest:.0f}, fp16's largest number",
                fix="Export with --dtype fp32.",
            )


def load(
    part: Component,
    net: nn.Module,
    names: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, tuple[str, str]]:
    """Give `net` the checkpoint's tensors.

    Args:
        part: has the tensors.
        net: on the meta device; gets all of its parameters.
        names: a parameter of `net` -> the tensor of `part`; None where both have the same names.
        ignored: prefixes of tensors that `net` does not read.

    Returns:
        A parameter of `net` -> the tensor's name and type.

    Raises:
        CheckpointError: tensors are missing, unknown, or of another shape.
    """
    wanted = net.state_dict()
    names = {name: name for name in wanted} if names is None else names
    unread = {n for n in part.tensors if n.endswith(_UNREAD) or n.startswith(ignored or "\0")}
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
