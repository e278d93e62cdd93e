"""The tensors of a checkpoint: described from its files' headers, read as views of the mapped files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...engines.errors import CheckpointError
from ...engines.safetensors_format import map_tensors, read_header

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """Where a tensor lies in a safetensors file, and how it is read from there.

    Attributes:
        file: the safetensors file.
        name: the tensor's name in `file`.
        dtype: safetensors' name of the type, "F16".
        shape: what results after `rows`, `transposed`, and after dropping axes of size 1 at the end (a 1x1
            convolution that is read as a linear layer).
        rows: only these rows of the first axis, begin and end (OpenCLIP stores query, key and value as one).
        transposed: stored as (in, out), read as (out, in) (OpenCLIP's `text_projection`).
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file by name, in the order of the header. Nothing but the header is read.

    Raises:
        CheckpointError: no such file, or one that breaks a rule of the format.
    """
    tensors = read_header(path).tensors.items()
    return {name: TensorHeader(file=path, name=name, dtype=t.dtype, shape=t.shape) for name, t in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """The file's `__metadata__`: what its writer noted, for example `modelspec.architecture`.

    Raises:
        CheckpointError: as `read_headers`.
    """
    return dict(read_header(path).metadata)


def read_tensors(headers: Mapping[str, TensorHeader]) -> dict[str, torch.Tensor]:
    """The tensors that `headers` describe, by the mapping's names.

    All are views of the mapped files, slices and transposes too: memory is taken by the pages that are used.

    Raises:
        CheckpointError: a file changed since its headers were read.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in {header.file for header in headers.values()}:
        wanted = {name: header for name, header in headers.items() if header.file == file}
        tensors |= _read_file(file, wanted)
    return {name: tensors[name] for name in headers}


def _read_file(file: Path, wanted: Mapping[str, TensorHeader]) -> dict[str, torch.Tensor]:
    import torch

    dtypes = {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F64": torch.float64,
    }
    found, content = map_tensors(file, writable=True)  # torch warns of arrays that it could not write to
    tensors: dict[str, torch.Tensor] = {}
    try:
        for name, header in wanted.items():
            place = found.tensors[header.name]
            if place.dtype != header.dtype:
                raise ValueError(f"{header.name} was {header.dtype}")
            flat = torch.from_numpy(content[header.name])  # pyright: ignore[reportUnknownMemberType]
            stored = flat.view(dtypes[place.dtype]).reshape(place.shape)
            part = stored if header.rows is None else stored[slice(*header.rows)]
            tensors[name] = (part.T if header.transposed else part).reshape(header.shape)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} changed while it was read ({error})",
            expected="a file nobody writes to",
            fix="Download the file again, or have it written again by the safetensors library.",
        ) from error
    return tensors
