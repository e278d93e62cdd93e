"""Rewrites a pickled checkpoint as safetensors. Nothing else reads pickles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

from ...engines.errors import CheckpointError, StorageError, UsageError
from ...engines.safetensors_format import ITEM_SIZES, write_file
from .machine import FIX, StoredTensor
from .torch_files import TorchFile, open_torch_file

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # numbers are copied, not computed with


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        path: the safetensors file.
        tensors: how many it has.
        size: its bytes.
        left_out: how many entries of the state dict were no tensors.
    """

    path: Path
    tensors: int
    size: int
    left_out: int


def convert_pickle(source: Path, output: Path, *, overwrite: bool = False) -> Converted:
    """Write the tensors of a file of `torch.save` to a safetensors file, which appears once it is complete.

    Args:
        source: a `.ckpt`, `.pt`, `.pth` or `.bin`; nothing in it is run.
        output: ends in `.safetensors`.
        overwrite: replace an existing `output`.

    Raises:
        CheckpointError: `source` is damaged or hostile, or holds no tensors.
        UsageError: `output` exists, or has another ending.
        StorageError: `output` cannot be written.
    """
    if output.suffix != ".safetensors":
        raise UsageError(
            f"the output is {output}", expected="a .safetensors file", fix="Pass -o NAME.safetensors."
        )
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", expected="a new file", fix="Pass --overwrite to replace it.")
    with open_torch_file(source) as opened:
        written = sum(_size(tensor) for tensor in opened.tensors.values())
        if written > 2 * source.stat().st_size:
            raise CheckpointError(
                f"it would become {written} bytes of tensors, because many share the same numbers",
                expected="at most twice the size of the file",
                fix=FIX,
            )
        try:
            _write(output, opened)
        except OSError as error:
            raise StorageError(
                f"{output} cannot be written ({error.strerror})",
                expected=f"a folder with {written} bytes free",
                fix="Choose another place with -o.",
            ) from error
    return Converted(
        path=output, tensors=len(opened.tensors), size=output.stat().st_size, left_out=opened.left_out
    )


def _size(tensor: StoredTensor) -> int:
    return prod(tensor.shape) * ITEM_SIZES[tensor.storage.dtype]


def _write(output: Path, opened: TorchFile) -> None:
    """One tensor at a time; those that share a storage follow each other, so that it is read once."""
    tensors = dict(sorted(opened.tensors.items(), key=lambda item: item[1].storage.key))
    read = lru_cache(maxsize=1)(opened.read)

    def content(name: str) -> memoryview:
        tensor = tensors[name]
        bits = _BITS[ITEM_SIZES[tensor.storage.dtype]]
        flat = np.frombuffer(read(tensor.storage), bits)[tensor.offset :]
        strides = [stride * flat.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
        return np.ascontiguousarray(view).data

    described = {name: (tensor.storage.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(output, described, content, durable=True)
