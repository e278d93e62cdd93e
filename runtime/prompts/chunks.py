"""Weighted fragments of a prompt: cut into chunks of up to 75 tokens; the weights, applied to the context.

Sources of the behaviour: `modules/sd_hijack_clip.py` (`tokenize_line`) and `modules/sd_emphasis.py`
(`EmphasisOriginal`) of stable-diffusion-webui; `comfy/sd1_clip.py` of ComfyUI (`tokenize_with_weights`,
`encode_token_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ...engines.errors import UsageError
from ...engines.spec import Array
from .tokenizer import ClipTokenizer

_LARGEST_WEIGHT = float(np.finfo(np.float32).max)
# `__name__` and `__folder/name*__`, of the wildcard extensions of both AUTOMATIC1111's web UI and ComfyUI
_WILDCARD = re.compile(r"__[^\W_][\w/*.\-]*?__")
# AUTOMATIC1111's `comma_padding_backtrack`: a chunk ends behind a comma if that is among its last 20 tokens
_COMMA_BACKTRACK = 20
# ComfyUI's `max_word_length`: fragments of fewer tokens are kept in one chunk
_LONG_FRAGMENT = 8

_Token = tuple[int, float]  # id and weight
# The ids of each embedding's vectors, by its name; they are beyond the vocabulary (`EXTRA_EMBEDDINGS`).
ExtraIds = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """A piece of a prompt and its weight; 1 leaves it as it is.

    `embedding` is the name of the embedding that the text calls (`names.find_embeddings`), if it is one.
    """

    text: str
    weight: float = 1.0
    embedding: str | None = None

    @property
    def ends_chunk(self) -> bool:
        """Whether this is AUTOMATIC1111's `BREAK`, which its parser marks by this text and weight."""
        return self.weight == -1 and self.text == "BREAK"


def checked(weight: float, text: str) -> float:
    """The weight of `text`. Raises UsageError for one that float32 cannot hold."""
    if not abs(weight) <= _LARGEST_WEIGHT:  # written so that NaN is refused too
        raise UsageError(
            f"the prompt gives {text!r:.40} the weight {weight}",
            expected="weights that float32 can hold",
            fix="Write a smaller weight, or fewer brackets.",
        )
    return weight


def unsupported(what: str, found: str, fix: str) -> UsageError:
    """The error for syntax that has a meaning in other programs and none here."""
    return UsageError(
        f"the prompt has {what}: {found!r:.60}",
        expected="text, weights in brackets and escapes",
        fix=f'{fix} With the prompt syntax "plain" every character is text.',
    )


def refuse_wildcards(text: str) -> None:
    """Raise UsageError for `__name__`."""
    if match := _WILDCARD.search(text):
        raise unsupported("a wildcard", match[0], "Write one of its words.")


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptChunks:
    """A prompt in the token ids of one tokenizer.

    Attributes:
        ids: (K, 77) int32, each row bos, up to 75 tokens, eos, padding.
        weights: (K, 77) float32, 1 at bos, eos and padding.
        dropped: the end of the prompt that did not fit, as it was typed; "" if all of it did.
    """

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    dropped: str = ""

    @property
    def weighted(self) -> bool:
        """Whether any token has another weight than 1."""
        return bool((self.weights != 1).any())


def truncated_chunk(
    fragments: Sequence[Fragment], tokenizer: ClipTokenizer, extra: ExtraIds = MappingProxyType({})
) -> PromptChunks:
    """One chunk of weight 1 (K = 1); the rest of a longer prompt is dropped, as by diffusers.

    An embedding that has no room for all of its vectors belongs to that rest, where diffusers cuts it.
    """
    room = tokenizer.length - 2
    chunk: list[_Token] = []
    for index, fragment in enumerate(fragments):
        if fragment.embedding is None:
            ids, dropped = tokenizer.truncated(fragment.text, room - len(chunk))
        else:
            ids, dropped = extra[fragment.embedding], ""
            if len(chunk) + len(ids) > room:
                ids, dropped = [], fragment.text
        chunk += [(token, 1.0) for token in ids]
        if dropped:
            dropped += "".join(following.text for following in fragments[index + 1 :])
            return replace(_rows([chunk], tokenizer), dropped=dropped)
    return _rows([chunk], tokenizer)


def a1111_chunks(
    fragments: Sequence[Fragment], tokenizer: ClipTokenizer, extra: ExtraIds = MappingProxyType({})
) -> PromptChunks:
    """Chunks as AUTOMATIC1111 cuts them: at BREAK; a full one after a comma near its end, if it has one.

    An embedding that has no room for all of its vectors begins the next chunk.
    """
    cutter = _A1111Cutter(room=tokenizer.length - 2, comma_id=tokenizer.comma_id)
    for fragment in fragments:
        if fragment.ends_chunk:
            cutter.end_chunk()
        elif fragment.embedding is not None:
            cutter.add([(token, fragment.weight) for token in extra[fragment.embedding]])
        else:
            for token in tokenizer.words(fragment.text):
                cutter.add([(token, fragment.weight)])
    if cutter.chunk or not cutter.chunks:
        cutter.end_chunk()
    return _rows(cutter.chunks, tokenizer)


@dataclass(kw_only=True)
class _A1111Cutter:
    """The chunks that are done, and the one that is being filled."""

    room: int
    comma_id: int | None
    chunks: list[list[_Token]] = field(default_factory=list[list[_Token]])
    chunk: list[_Token] = field(default_factory=list[_Token])
    comma: int | None = None  # where the chunk's last comma is

    def add(self, tokens: Sequence[_Token]) -> None:
        """Take the next token, or several that stay together."""
        is_comma = tokens[0][0] == self.comma_id
        if len(self.chunk) == self.room:
            near = self.comma is not None and self.room - self.comma <= _COMMA_BACKTRACK and not is_comma
            end = self.comma + 1 if near and self.comma is not None else self.room
            moved = self.chunk[end:]
            del self.chunk[end:]
            self.end_chunk()
            self.chunk = moved
        if len(self.chunk) + len(tokens) > self.room:
            self.end_chunk()
        if is_comma:
            self.comma = len(self.chunk)
        self.chunk += tokens

    def end_chunk(self) -> None:
        """Begin another chunk."""
        self.chunks.append(self.chunk)
        self.chunk, self.comma = [], None


def comfyui_chunks(
    fragments: Sequence[Fragment], tokenizer: ClipTokenizer, extra: ExtraIds = MappingProxyType({})
) -> PromptChunks:
    """Chunks as ComfyUI cuts them: when they are full, but not within a fragment of fewer than 8 tokens.

    No embedding is cut, where ComfyUI cuts those of 8 vectors and more.
    """
    room = tokenizer.length - 2
    chunks: list[list[_Token]] = [[]]
    for fragment in fragments:
        ids = tokenizer.words(fragment.text) if fragment.embedding is None else extra[fragment.embedding]
        tokens = [(token, fragment.weight) for token in ids]
        together = len(tokens) < _LONG_FRAGMENT or fragment.embedding is not None
        if together and chunks[-1] and len(chunks[-1]) + len(tokens) > room:
            chunks.append([])
        start = 0
        while start < len(tokens):
            if len(chunks[-1]) == room:
                chunks.append([])
            end = start + room - len(chunks[-1])
            chunks[-1] += tokens[start:end]
            start = end
    return _rows(chunks, tokenizer)


def _rows(chunks: Sequence[Sequence[_Token]], tokenizer: ClipTokenizer) -> PromptChunks:
    ids = np.full((len(chunks), tokenizer.length), tokenizer.pad_id, np.int32)
    weights = np.ones(ids.shape, np.float32)
    ids[:, 0] = tokenizer.bos_id
    for row, row_weights, chunk in zip(ids, weights, chunks, strict=True):
        end = len(chunk) + 1
        row[1:end] = [token for token, _ in chunk]
        row_weights[1:end] = [weight for _, weight in chunk]
        row[end] = tokenizer.eos_id
    return PromptChunks(ids=ids, weights=weights)


def scale_and_restore_mean(context: Array, weights: Array) -> Array:
    """AUTOMATIC1111's weighting: z * w, then scaled so that every chunk keeps its mean.

    Args:
        context: (K, T, D) float, the chunks of one prompt. Means are taken chunk by chunk, so that a picture
            does not depend on its batch.
        weights: (K, T) float32.

    Returns:
        (K, T, D) in the dtype of `context`; a chunk of weights 1 is as it was, to the bit.

    Raises:
        UsageError: a weight so large that the result is beyond its dtype.
    """
    weighted = np.array(context)
    for index in np.flatnonzero((weights != 1).any(axis=1)):
        z = context[index].astype(np.float32)  # (T, D)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = z * weights[index, :, None]
            mean = scaled.mean(dtype=np.float64)
            ratio = z.mean(dtype=np.float64) / mean if mean else 1.0
            weighted[index] = scaled * np.float32(ratio)
    return _finite(weighted, weights)


def interpolate_from_empty(context: Array, weights: Array, empty: Array) -> Array:
    """ComfyUI's weighting: from the empty prompt's context (weight 0) to the prompt's (weight 1), and beyond.

    Args:
        context: (K, T, D) float, the chunks of one prompt.
        weights: (K, T) float32.
        empty: (T, D), the context of the empty prompt.

    Returns:
        (K, T, D) in the dtype of `context`; tokens of weight 1 are as they were, to the bit.

    Raises:
        UsageError: a weight so large that the result is beyond its dtype.
    """
    weighted = np.array(context)
    chunk, token = np.nonzero(weights != 1)
    z, origin = context[chunk, token].astype(np.float32), empty[token].astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        weighted[chunk, token] = (z - origin) * weights[chunk, token, None] + origin
    return _finite(weighted, weights)


def _finite(weighted: Array, weights: Array) -> Array:
    if not np.isfinite(weighted).all():
        raise UsageError(
            f"the prompt's largest weight is {np.abs(weights).max():g}",
            expected=f"weights whose effect {weighted.dtype} can hold",
            fix="Write smaller weights: (word:1.5) is a strong one.",
        )
    return weighted
