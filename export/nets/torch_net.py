"""A torch module with a net's contract and the checkpoint's weights.

Modules are built on the meta device and take over the memory-mapped tensors: nothing is initialised or
copied.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.files.component import Component, TensorHeader, read_tensors
from ...checkpoints.files.net_reads import UNREAD
from ...checkpoints.files.values import check_values
from ...checkpoints.stored_types import seen_as
from ...engines.errors import CheckpointError
from ...engines.processors import usable_processors
from ...engines.spec import Array, NetSpec

# The folder of a part of which only the config is known. Its net is traced and never run: its weights have
# addresses, and nobody writes them, so they take no memory.
SHAPES_ALONE = Path(os.devnull)
# safetensors' name of a type -> torch's type.
_TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

# A parameter's name -> the tensor's name (a checkpoint's, then a package's), and its type in the checkpoint.
Tensors = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Net:
    """A torch module that satisfies `spec`, called with inputs by name, and where its tensors come from.

    Pictures that it takes have a height and a width that `multiple` divides.
    """

    module: nn.Module
    spec: NetSpec
    tensors: Tensors
    multiple: int = 8

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The outputs of a net in float32, in the contract's order; float16 inputs are widened."""
        tensors = {name: torch.as_tensor(array) for name, array in inputs.items()}
        wide = {name: item.float() if item.is_floating_point() else item for name, item in tensors.items()}
        with torch.no_grad():
            found: Any = self.module(**wide)
        outputs = cast(tuple[Any, ...], found) if isinstance(found, tuple) else (found,)
        return [item.numpy() for item in outputs]


@contextmanager
def torch_threads() -> Generator[None]:
    """No more threads than there are processors for them: torch does not look at quotas."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, usable_processors()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spelled(dtype: torch.dtype) -> str:
    """A type's name in contracts."""
    return str(dtype).removeprefix("torch.")


def fill_buffers(net: nn.Module) -> None:
    """Set CLIP's positions, the one buffer that need not be in a checkpoint."""
    for module in net.modules():
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, torch.Tensor):
            cast(Any, module).position_ids = torch.arange(positions.shape[-1])[None]


def make_net(module: nn.Module, spec: NetSpec, tensors: Tensors, dtype: torch.dtype) -> Net:
    """The Net of a wrapper whose attribute `net` is the module with the tensors that `load` gave it."""
    named = {f"net.{key}": found for key, found in tensors.items()}
    return Net(module=_in_memory(module.eval().requires_grad_(False).to(dtype)), spec=spec, tensors=named)


def _in_memory(module: nn.Module) -> nn.Module:
    """`module` with memory that nobody wrote in place of tensors on the meta device (SHAPES_ALONE).

    torch's exporter takes no module that is on two devices, and a trace has constants on the CPU.
    """
    blank = {name: torch.empty_like(t, device="cpu") for name, t in module.state_dict().items() if t.is_meta}
    if blank:
        module.load_state_dict(blank, strict=False, assign=True)
    return module


def read_as_torch(headers: Mapping[str, TensorHeader]) -> dict[str, torch.Tensor]:
    """`read_tensors` as torch's tensors of the same memory. torch takes no arrays of ml_dtypes' types."""
    tensors: dict[str, torch.Tensor] = {}
    for name, array in read_tensors(headers, writable=True).items():  # torch warns of what it cannot write
        bits = torch.from_numpy(seen_as(array, f"i{array.itemsize}"))  # pyright: ignore[reportUnknownMemberType]
        tensors[name] = bits.view(_TYPES[headers[name].dtype])
    return tensors


def load(
    part: Component,
    net: nn.Module,
    dtype: torch.dtype,
    names: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, tuple[str, str]]:
    """Give all parameters of `net`, which is on the meta device, tensors of `part`.

    They are checked for computing in `dtype`, and keep the type they are stored in. `names` has a parameter's
    tensor where the names differ; `ignored` are prefixes of tensors not to read.

    Returns:
        A parameter of `net` -> the tensor's name and type. A part of SHAPES_ALONE leaves the net as it is.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape, not finite, or beyond `dtype`.
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
    tensors = {found: part.tensors[found] for found in names.values()}
    check_values(part.folder, tensors, spelled(dtype))
    net.load_state_dict(read_as_torch({n: part.tensors[f] for n, f in names.items()}), assign=True)
    return {name: (file_name, part.tensors[file_name].dtype) for name, file_name in names.items()}
