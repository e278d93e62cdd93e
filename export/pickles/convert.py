"""Rewrites a pickled checkpoint as safetensors. Nothing else reads pickles."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...engines.errors import CheckpointError, StorageError, UsageError
from ..checkpoint.safetensors_file import ITEM_SIZES
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
            size = _write_atomically(output, opened)
        except OSError as error:
            raise StorageError(
                f"{output} cannot be written ({error.strerror})",
                expected=f"a folder with {written} bytes free",
                fix="Choose another place with -o.",
            ) from error
    return Converted(path=output, tensors=len(opened.tensors), size=size, left_out=opened.left_out)


def _size(tensor: StoredTensor) -> int:
    return prod(tensor.shape) * ITEM_SIZES[tensor.storage.dtype]


def _write_atomically(output: Path, opened: TorchFile) -> int:
    descriptor, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with open(descriptor, "wb") as stream:
            _write(stream, opened)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        Path(name).chmod(0o644)
        os.replace(name, output)
    except BaseException:
        os.unlink(name)
        raise
    return size


def _write(stream: BinaryIO, opened: TorchFile) -> None:
    """One tensor at a time, the widest types first, so that each is aligned to its own item size."""

    def place(item: tuple[str, StoredTensor]) -> tuple[int, str]:
        storage = item[1].storage
        return -ITEM_SIZES[storage.dtype], storage.key  # those that share a storage follow each other

    tensors = dict(sorted(opened.tensors.items(), key=place))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + _size(tensor)
        header[name] = {
            "dtype": tensor.storage.dtype,
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    read = lru_cache(maxsize=1)(opened.read)
    for tensor in tensors.values():
        bits = _BITS[ITEM_SIZES[tensor.storage.dtype]]
        flat = np.frombuffer(read(tensor.storage), bits)[tensor.offset :]
        strides = [stride * flat.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
        stream.write(np.ascontiguousarray(view).data)
