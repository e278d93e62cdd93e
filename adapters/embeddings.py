"""Textual inversion: files with the embeddings of a word that a model has learnt, and arrays of the same.

What tools write, as safetensors, with n vectors of an encoder's width d:

====================================  ==========================================================
`emb_params` (n, d)                   AUTOMATIC1111, kohya's sd-scripts, OneTrainer
`clip_l` (n, 768), `clip_g` (n, 1280)  the same for SDXL's two encoders
`<token>` (n, d) or (d,)              diffusers; the tensor is called like the word
`string_to_param.*` (n, d)            AUTOMATIC1111's pickle, flattened; in files of LoRA too
====================================  ==========================================================

Its pickles (`string_to_param` in a dict) become the first of these by `latentrt convert`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..engines.errors import CheckpointError, PackageError
from ..engines.net_weights import part_shapes
from ..engines.package import Package
from ..engines.safetensors_format import NOT_FINITE, read_header
from ..engines.spec import EXTRA_EMBEDDINGS, TEXT_ENCODERS, Array, NetSpec, TensorSpec
from .folder import check_name

MOST_VECTORS = 75  # a chunk of a prompt has room for as many, and no embedding is cut
_MOST_BYTES = 2**24  # of a file; 75 vectors for SDXL in float64 are 1.2 MB
# The text encoders, and what files for several of them call their vectors.
_OF_ENCODER = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_FOR_ANY = "emb_params"
_FLATTENED = "string_to_param."  # behind it is "*" in all files there are
# The graph's name of a text encoder's table of embeddings ends so, in every family.
_TABLE = "token_embedding.weight"

_WANTED = "an embedding of textual inversion"

# The input `extra_embeddings` of each text encoder of a package, by the encoder's net.
EncoderInputs = Mapping[str, TensorSpec]


class AnotherKindError(CheckpointError):
    """A whole file that is no embedding, but an adapter or a model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """A word that stands for n vectors, checked against the text encoders of a package. Threads may share it.

    Attributes:
        name: the word.
        sha256: of the whole file (hex), as AUTOMATIC1111 tells them apart; of arrays, of names and numbers.
        vectors: for each text encoder, (n, d) in the type of its input; read-only.
        adapter: the name of the adapter in whose file it lies; "" for one that was loaded by itself.
    """

    name: str
    sha256: str
    vectors: Mapping[str, Array]
    adapter: str = ""

    def __post_init__(self) -> None:
        """Make the arrays read-only."""
        for array in self.vectors.values():
            array.setflags(write=False)

    def __len__(self) -> int:
        """How many places of a prompt it takes: n."""
        return len(next(iter(self.vectors.values())))

    def is_like(self, other: Embedding) -> bool:
        """Whether both have the same vectors, whatever they are called."""
        return all(np.array_equal(array, other.vectors[net]) for net, array in self.vectors.items())


def embedding_inputs(package: Package) -> EncoderInputs:
    """The inputs of a package's text encoders that take embeddings.

    Raises:
        PackageError: an encoder has none.
    """
    nets = package.manifest.nets
    found: dict[str, TensorSpec] = {}
    for net in (net for net in TEXT_ENCODERS if net in nets):
        taken = input_of(nets[net].spec)
        if taken is None:
            raise PackageError(
                f"{package.root}: the net {net!r} has no input {EXTRA_EMBEDDINGS!r} for textual inversion",
                expected="a package that was exported after 2026-11-28",
                fix="Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE",
            )
        found[net] = taken
    return found


def input_of(encoder: NetSpec) -> TensorSpec | None:
    """The input `extra_embeddings` (E, d) of a text encoder; None where it is older."""
    return next((item for item in encoder.inputs if item.name == EXTRA_EMBEDDINGS), None)


def vocabulary_size(package: Package, net: str) -> int:
    """How many rows the table of a text encoder has: the first id that reads `extra_embeddings`.

    A tokenizer may have fewer.

    Raises:
        PackageError: the graph cannot be read, or has no table.
    """
    shapes = part_shapes(package, net)
    sizes = {shape[0] for name, shape in shapes.items() if name.endswith(_TABLE)}
    if len(sizes) != 1:
        raise PackageError(
            f"{package.root}: the net {net!r} has {len(sizes)} weights called ….{_TABLE}",
            expected="one table of embeddings, as CLIP has",
            fix="Report the checkpoint; its package takes no further embeddings.",
        )
    return sizes.pop()


def read_embedding(path: Path, inputs: EncoderInputs, name: str | None = None) -> Embedding:
    """Read an embedding file.

    Args:
        path: a safetensors file.
        inputs: of the text encoders that it is for.
        name: the word; by default the file's own where it has one, as diffusers writes it, else its stem.

    Raises:
        AnotherKindError: the file is an adapter or a model.
        CheckpointError: a file that is missing, damaged or a pickle, or one for other text encoders.
    """
    # here: a pipeline without embeddings does not wait for them
    from ..checkpoints.files.component import read_headers, read_tensors
    from ..checkpoints.files.file_kinds import kind_of_tensors, refuse_other_formats

    refuse_other_formats(path)
    stored = read_headers(path)
    kind = kind_of_tensors(stored)
    if kind.name not in ("embedding", "unknown"):  # a width that no published encoder has says nothing
        raise AnotherKindError(f"{path} is {kind.what}", expected=_WANTED, fix=kind.advice(path))
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise _refused(str(path), f"has {size} bytes", f"at most {_MOST_BYTES}, an embedding's file")
    for tensor, header in stored.items():
        if header.dtype not in NOT_FINITE or header.dtype.startswith("F8"):
            raise _refused(str(path), f"stores {tensor!r:.60} as {header.dtype}", "floats of 16 bits or more")
    vectors = _assigned(str(path), read_tensors(stored), inputs)
    return Embedding(
        name=name or _own_word(stored) or path.stem,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        vectors=vectors,
    )


def check_vectors(path: Path) -> str:
    """What an embedding's file has, for people: how many vectors, and of which width.

    Raises:
        CheckpointError: it has more than a prompt has room for, or none.
    """
    from ..checkpoints.files.component import read_headers

    said: list[str] = []
    for name, header in read_headers(path).items():
        width, count = header.shape[-1] if header.shape else 0, prod(header.shape[:-1])
        _check_count(str(path), count)
        said.append(f"{name[:60]}: {count} vector{'s' * (count != 1)} of {width}")
    return "; ".join(said)


def own_word(path: Path) -> str:
    """The word that a safetensors file has for its embedding, as diffusers writes it; "" where it has none.

    Reads the header alone. What such a file is shows when it is read.

    Raises:
        CheckpointError: a damaged file.
    """
    if path.suffix.lower() != ".safetensors" or path.stat().st_size > _MOST_BYTES:
        return ""
    tensors = read_header(path).tensors
    word = _own_word(tensors)
    usual = word == word.strip() and len(word) <= 255 and word.isprintable()
    return word if word and usual and len(tensors[word].shape) <= 2 else ""


def _own_word(tensors: Collection[str]) -> str:
    """The name of a file's only tensor, if it is a word."""
    own = next(iter(tensors)) if len(tensors) == 1 else _FOR_ANY
    unnamed = own == _FOR_ANY or own in _OF_ENCODER.values() or own.startswith(_FLATTENED)
    return "" if unnamed else own


def make_embedding(
    name: str, arrays: Mapping[str, Array], inputs: EncoderInputs, *, where: str = ""
) -> Embedding:
    """An embedding of arrays: those that a program has, or those of a LoRA's file (`bundle_emb.NAME.…`).

    Args:
        name: the word.
        arrays: as a file has them: `clip_l` and `clip_g`, or one of any name, each (n, d) or (d,) float.
        inputs: of the text encoders that it is for.
        where: what messages call it; its name by default.

    Raises:
        CheckpointError: as `read_embedding`.
    """
    found = {key: np.asarray(array) for key, array in arrays.items()}
    where = where or f"the embedding {name!r}"
    for key, array in found.items():
        if array.dtype.kind != "f" and str(array.dtype) != "bfloat16":
            raise _refused(where, f"has {key!r:.60} as {array.dtype}", "floats")
    vectors = _assigned(where, found, inputs)
    digest = hashlib.sha256()
    for net, array in sorted(vectors.items()):
        digest.update(f"{net} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return Embedding(name=name, sha256=digest.hexdigest(), vectors=vectors)


def _assigned(where: str, arrays: Mapping[str, Array], inputs: EncoderInputs) -> dict[str, Array]:
    """Which array each encoder gets, as its input takes it, (n, d)."""
    named = {net: arrays[key] for net, key in _OF_ENCODER.items() if key in arrays}
    if not arrays or len(named) != len(arrays) > 1:
        names = ", ".join(f"{name!r:.60}" for name in list(arrays)[:5]) or "none"
        raise _refused(
            where, f"has {len(arrays)} tensors ({names})", "one, or clip_l and clip_g: a textual inversion"
        )
    if named:
        _check_named(where, named, inputs)
    elif len(inputs) > 1:
        _refuse_alone(where, arrays, inputs)
    else:
        named = dict.fromkeys(inputs, next(iter(arrays.values())))
    vectors = {net: _vectors(where, named[net], net, taken) for net, taken in inputs.items()}
    counts = {len(array) for array in vectors.values()}
    if len(counts) > 1:
        raise _refused(
            where,
            " and ".join(f"has {len(array)} vectors for {net}" for net, array in vectors.items()),
            "as many for one encoder as for the other",
        )
    return vectors


def _check_named(where: str, named: Mapping[str, Array], inputs: EncoderInputs) -> None:
    """Raise CheckpointError unless there is one array for each encoder.

    SDXL's refiner has the second encoder alone, and takes the embeddings of the base.
    """
    for net, taken in inputs.items():
        if net not in named:
            _refuse_missing(where, net, taken, list(map(_OF_ENCODER.get, named)))
    if "text_encoder" in inputs and (more := named.keys() - inputs):
        keys = ", ".join(f"{_OF_ENCODER[net]} {_shape(named[net])}" for net in sorted(more))
        (width,) = (taken.shape[-1] for taken in inputs.values())
        raise _refused(
            where, f"has {keys} as well: it is for SDXL", f"one tensor of {width}, the width of text_encoder"
        )


def _refuse_alone(where: str, arrays: Mapping[str, Array], inputs: EncoderInputs) -> NoReturn:
    """Raise CheckpointError for one array where there are two encoders, naming the other that is missing."""
    ((key, array),) = arrays.items()
    width = array.shape[-1] if array.ndim else 0
    *_, missing = [net for net, taken in inputs.items() if taken.shape[-1] != width] or inputs
    _refuse_missing(where, missing, inputs[missing], [f"{key!r:.60} {_shape(array)}"])


def _refuse_missing(where: str, net: str, taken: TensorSpec, found: Sequence[object]) -> NoReturn:
    key = _OF_ENCODER[net]
    raise _refused(
        where,
        f"is an embedding with {key} missing (it has {', '.join(map(str, found))})",
        f"{key} (n, {taken.shape[-1]}) for {net} as well",
    )


def _vectors(where: str, array: Array, net: str, taken: TensorSpec) -> Array:
    """(n, d) in the type of an encoder's input."""
    width = taken.shape[-1]
    if array.ndim not in (1, 2) or array.shape[-1] != width:
        raise _refused(
            where,
            f"has vectors of the shape {_shape(array)} for {net}",
            f"{width} numbers in each of them, the width of this model's {net}",
        )
    rows = np.reshape(array, (-1, array.shape[-1]))
    _check_count(where, len(rows))
    wide = rows.astype(np.float64)
    if not np.isfinite(wide).all():
        raise _refused(where, "has NaN or infinity in its vectors", "finite numbers")
    peak, most = float(np.abs(wide).max()), float(np.finfo(taken.dtype).max)
    if peak > most:
        raise _refused(where, f"has numbers up to {peak:.3g}", f"at most {most:.5g}, as {taken.dtype} holds")
    return wide.astype(taken.dtype)


def _check_count(where: str, count: int) -> None:
    if not 1 <= count <= MOST_VECTORS:
        raise _refused(where, f"has {count} vectors", f"1 to {MOST_VECTORS}, the room of a prompt's chunk")


def _shape(array: Array) -> str:
    return "x".join(map(str, array.shape)) or "of one number"


def _refused(where: str, found: str, expected: str = "", fix: str = "") -> CheckpointError:
    return CheckpointError(
        f"{where} {found}",
        expected=expected or _WANTED,
        fix=fix or "Use the embedding that was trained for this model, or leave it out.",
    )


def refuse_name(name: object) -> None:
    """Raise UsageError for a word that no prompt could have."""
    check_name(name, "an embedding", "Pass token=NAME.")
