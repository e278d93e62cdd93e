"""A file of changes to a model, read and checked; nothing of it is bound to a model yet."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np

from ..checkpoints.files.component import DOWNLOAD, TensorHeader
from ..checkpoints.files.file_kinds import FAMILIES, base_of, kind_of_bytes, kind_of_tensors
from ..checkpoints.stored_types import numpy_type, seen_as
from ..engines.errors import AdapterError
from ..engines.lfs import refuse_pointer
from ..engines.safetensors_format import Bytes, Header, find_not_finite
from ..engines.spec import Array
from .keys import BundledKey, Key, read_bundled_key, read_key, refused_kind
from .kinds.change import scalar_of
from .kinds.table import MAGNITUDES
from .scaling import NotedScaling, read_config, read_scalings
from .stored import StoredArray, StoredFile, reading_whole

_SIZE_LIMIT = 2**33  # bytes
_KEY_LIMIT = 20_000  # SDXL's every layer with three parts each is 9,000
_INTEGERS = {
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_AGAIN = "Download the file again, or have it written again by the program that trained it."
# What PEFT's and diffusers' `save_pretrained` and `save_lora_weights` call the file in a folder.
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
# Parts that may be stored as integers. Weights that are so are quantised, by a scale that lies elsewhere.
_COUNTS = ("alpha", "scalar", "on_input", "reshape_weight")
# Parts that say that a file is an adapter, which "weight" and "alpha" alone do not.
_VAGUE = ("weight", "alpha")
# What a file that is no adapter may be called; others are left to the names that are unknown.
_NAMELESS = ("lora", "unknown")
# Bytes of tensors that are kept as they are read: alphas and other single numbers, which `bind` looks at.
_SMALL = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA or one of its relatives, in a safetensors file. `binding.bind` fits it to a model.

    Attributes:
        path: of the file.
        sha256: of its content, and of PEFT's configuration beside it where there is one.
        short_hash: as A1111 prints it: 12 digits of the hash that the trainer noted, else of the hash of what
            follows the header.
        metadata: what the file's writer noted (`ss_*`, `modelspec.*`).
        headers: of its tensors, by key.
        tensors: by key, in the types they are stored in: small ones, and for others what reads them
            (`stored.StoredArray`), which NumPy takes for arrays.
        parts: the keys that a grammar has.
        bundled: the keys of embeddings that lie in the file.
        scalings: what PEFT noted, by component.
        made_for: the base that it seems to be made for, for people; "" where nothing says it.
    """

    path: Path
    sha256: str
    short_hash: str
    metadata: Mapping[str, str]
    headers: Mapping[str, TensorHeader]
    tensors: Mapping[str, Array]
    parts: Mapping[str, Key]
    bundled: Mapping[str, BundledKey]
    scalings: Mapping[str, NotedScaling]
    made_for: str

    @property
    def name(self) -> str:
        """What requests call it, as `name_of` has it."""
        return name_of(self.path)

    def notes(self) -> tuple[str, ...]:
        """What its numbers say, for people: how many modules it changes, alphas, embeddings, A1111's hash."""
        modules = len({key.module for key in self.parts.values()})
        stored = (self.tensors[name] for name, key in self.parts.items() if key.part == "alpha")
        alphas = sorted({scalar_of(array) for array in stored if array.size == 1})
        said = f"{modules} module{'s' * (modules != 1)}"
        if alphas:
            said += (
                f", alpha {alphas[0]:g}" if len(alphas) == 1 else f", alphas {alphas[0]:g} to {alphas[-1]:g}"
            )
        embeddings = sorted({key.name for key in self.bundled.values()})
        more = [f"embeddings: {', '.join(embeddings)[:200]}"] if embeddings else []
        if self.lacks_magnitudes:
            more.append("it says that it is a DoRA, and has no magnitudes: it is used as a LoRA")
        return (said, *more, f"hash for A1111: {self.short_hash}")

    @property
    def lacks_magnitudes(self) -> bool:
        """Whether PEFT's configuration says that there are DoRA's magnitudes, and there are none."""
        noted = any(scaling.with_magnitudes for scaling in self.scalings.values())
        return noted and all(key.part not in MAGNITUDES for key in self.parts.values())


def file_of(path: Path) -> Path:
    """The adapter's file in a folder that has one of FOLDER_FILES; else the path itself."""
    return next((path / name for name in FOLDER_FILES if os.path.isfile(path / name)), path)


def name_of(path: Path) -> str:
    """What an adapter's file is called: its name without the ending; in a folder of one, the folder's."""
    return path.parent.name if path.name in FOLDER_FILES else path.stem


def read_adapter(path: str | Path) -> Adapter:
    """Read a file of changes: LoRA, LoCon, LoHa, LoKr, OFT, BOFT, IA3, GLoRA, DoRA, whole differences.

    The whole file is read once, for its hash and for numbers that are not finite; after that its arrays are
    read when they are computed with.

    Args:
        path: a `.safetensors` file, or a folder that PEFT or diffusers wrote one into.

    Raises:
        AdapterError: it is missing, damaged, too large, another kind of file, or of a kind of adapter that
            cannot be used.
    """
    path = file_of(Path(path))
    _refuse_other_files(path)
    with reading_whole(path) as (file, header, stream):
        return _checked(file, header, stream)


def _checked(file: StoredFile, header: Header, stream: BinaryIO) -> Adapter:
    path = file.path
    if len(header.tensors) > _KEY_LIMIT:
        raise AdapterError(
            f"{path} has {len(header.tensors)} tensors", expected=f"at most {_KEY_LIMIT}", fix=_AGAIN
        )
    headers = {
        name: TensorHeader(file=path, name=name, dtype=place.dtype, shape=place.shape)
        for name, place in header.tensors.items()
    }
    parts = {name: key for name in headers if (key := read_key(name)) is not None}
    bundled = {name: key for name in headers if (key := read_bundled_key(name)) is not None}
    _refuse_other_kinds(path, headers, parts, bundled)
    _refuse_integers(path, header, parts, bundled)
    kinds = {name: _type_of(path, header, name) for name in header.tensors}
    config = read_config(path)
    small, whole, short = _contents(file, header, stream, config)
    tensors = {name: _array(file, header, name, kind, small.get(name)) for name, kind in kinds.items()}
    base = base_of(headers, header.metadata)
    return Adapter(
        path=path,
        sha256=whole,
        short_hash=short,
        metadata=header.metadata,
        headers=headers,
        tensors=tensors,
        parts=parts,
        bundled=bundled,
        scalings=read_scalings(path, header.metadata, config),
        made_for=FAMILIES[base] if base else "",
    )


def _refuse_other_files(path: Path) -> None:
    """Raise AdapterError for what is no file of safetensors, or too large for an adapter."""
    if os.path.isdir(path):  # not Path's, which raise where a name is too long for a file
        _refuse(path, f"is a folder without {' or '.join(FOLDER_FILES)}", "Pass the file that is meant.")
    if not os.path.isfile(path):
        _refuse(path, "is no file", "Check the path.")
    refuse_pointer(path, AdapterError)
    if (kind := kind_of_bytes(path)) is not None:
        _refuse(path, f"is {kind.what}", _AGAIN if DOWNLOAD in kind.todo else kind.advice(path))
    if (size := path.stat().st_size) > _SIZE_LIMIT:
        raise AdapterError(f"{path} has {size} bytes", expected=f"at most {_SIZE_LIMIT}", fix=_AGAIN)


def _refuse_other_kinds(
    path: Path,
    headers: Mapping[str, TensorHeader],
    parts: Mapping[str, Key],
    bundled: Mapping[str, BundledKey],
) -> None:
    """Raise AdapterError for a file of another kind, or a kind of adapter that cannot be used."""
    for name in (name for name in headers if name not in parts or parts[name].part in _VAGUE):
        if (what := refused_kind(name)) is not None:
            _refuse(path, f"is {what}", "Use an adapter of another kind.")
    if bundled or any(key.part not in _VAGUE for key in parts.values()):
        return
    kind = kind_of_tensors(headers)
    what, todo = kind.what, kind.advice(path)
    if kind.name in _NAMELESS:
        what, todo = f"no adapter that is known ({', '.join(headers)})"[:200], _AGAIN
    _refuse(path, f"is {what}", todo)


def _refuse_integers(
    path: Path, header: Header, parts: Mapping[str, Key], bundled: Mapping[str, BundledKey]
) -> None:
    """Raise AdapterError for weights or embeddings that are stored as integers."""
    for name, place in header.tensors.items():
        counted = name in parts and parts[name].part in _COUNTS
        if place.dtype in _INTEGERS and not counted and (name in parts or name in bundled):
            raise AdapterError(
                f"{path} has {name[:200]} in {place.dtype}, so it is quantised",
                expected="floats",
                fix="Use the file that it was made from, with floats of 16 or 32 bits.",
            )


def _refuse(path: Path, found: str, fix: str) -> NoReturn:
    raise AdapterError(f"{path} {found}", expected="a LoRA or one of its relatives, as .safetensors", fix=fix)


def _type_of(path: Path, header: Header, name: str) -> np.dtype[Any]:
    """NumPy's type of a tensor."""
    stored = header.tensors[name].dtype
    try:
        return np.dtype(_INTEGERS[stored]) if stored in _INTEGERS else numpy_type(stored)
    except KeyError:
        raise AdapterError(
            f"{path} has {name[:200]} in {stored}",
            expected="floats, or 16 to 64 bits of integers",
            fix=_AGAIN,
        ) from None


def _array(file: StoredFile, header: Header, name: str, kind: np.dtype[Any], content: Bytes | None) -> Array:
    """A tensor: its numbers where they were kept, else what reads them."""
    place = header.tensors[name]
    if content is not None:
        return np.reshape(seen_as(content, kind), place.shape)
    stored = StoredArray(file=file, offset=place.offset, length=place.length, dtype=kind, shape=place.shape)
    return cast(Array, stored)  # all that is asked of it before it is computed with is what it has, too


def _contents(
    file: StoredFile, header: Header, stream: BinaryIO, config: bytes
) -> tuple[dict[str, Bytes], str, str]:
    """The small tensors, the file's hash, and A1111's short one (`extensions-builtin/Lora/network.py`).

    Raises:
        AdapterError: numbers that are not finite, or the file ends early.
    """
    small: dict[str, Bytes] = {}
    noted = header.metadata.get("sshs_model_hash", "")
    whole, behind = hashlib.sha256(struct.pack("<Q", len(header.text)) + header.text), hashlib.sha256()
    known = re.fullmatch(r"[0-9a-f]{12,64}", noted) is not None
    # Tensors follow each other without a gap, to the end of the file.
    for name, place in sorted(header.tensors.items(), key=lambda item: item[1].offset):
        content: Any = np.empty(place.length, np.uint8)
        if cast(Any, stream).readinto(content) != place.length:
            file.refuse("has changed while it was read")
        whole.update(content)
        if not known:
            behind.update(content)
        if find_not_finite(header, {name: content}) is not None:
            raise AdapterError(
                f"{file.path} has NaN or infinity in {name[:200]}", expected="finite numbers", fix=_AGAIN
            )
        if place.length <= _SMALL:
            small[name] = content
    whole.update(config)
    return small, whole.hexdigest(), (noted if known else behind.hexdigest())[:12]
