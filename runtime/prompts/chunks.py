"""Weighted fragments to chunks of up to 75 tokens between bos and eos, as many as a prompt needs.

Sources of the behaviour: `modules/sd_hijack_clip.py` of stable-diffusion-webui (`tokenize_line`) and
`comfy/sd1_clip.py` of ComfyUI (`tokenize_with_weights`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .fragments import Fragment
from .tokenizer import ClipTokenizer

# AUTOMATIC1111's `comma_padding_backtrack`: a chunk ends behind a comma if that is among its last 20 tokens
_COMMA_BACKTRACK = 20
# ComfyUI's `max_word_length`: fragments of fewer tokens are kept in one chunk
_LONG_FRAGMENT = 8

_Token = tuple[int, float]  # id and weight


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


def truncated_chunk(fragments: Sequence[Fragment], tokenizer: ClipTokenizer) -> PromptChunks:
    """One chunk of weight 1 (K = 1); the rest of a longer prompt is dropped, as by diffusers."""
    tokens = tokenizer.encode(["".join(fragment.text for fragment in fragments)])
    weights = np.ones(tokens.ids.shape, np.float32)
    return PromptChunks(ids=tokens.ids, weights=weights, dropped=tokens.dropped[0])


def a1111_chunks(fragments: Sequence[Fragment], tokenizer: ClipTokenizer) -> PromptChunks:
    """Chunks as AUTOMATIC1111 cuts them: at BREAK; a full one after a comma near its end, if it has one."""
    room = tokenizer.length - 2
    chunks: list[list[_Token]] = []
    chunk: list[_Token] = []
    comma: int | None = None  # where the chunk's last comma is
    for fragment in fragments:
        if fragment.ends_chunk:
            chunks.append(chunk)
            chunk, comma = [], None
            continue
        for token in tokenizer.words(fragment.text):
            is_comma = token == tokenizer.comma_id
            if len(chunk) == room:
                near = comma is not None and room - comma <= _COMMA_BACKTRACK and not is_comma
                end = comma + 1 if near and comma is not None else room
                chunks.append(chunk[:end])
                chunk, comma = chunk[end:], None
            if is_comma:
                comma = len(chunk)
            chunk.append((token, fragment.weight))
    if chunk or not chunks:
        chunks.append(chunk)
    return _rows(chunks, tokenizer)


def comfyui_chunks(fragments: Sequence[Fragment], tokenizer: ClipTokenizer) -> PromptChunks:
    """Chunks as ComfyUI cuts them: when they are full, but not within a fragment of fewer than 8 tokens."""
    room = tokenizer.length - 2
    chunks: list[list[_Token]] = [[]]
    for fragment in fragments:
        tokens = [(token, fragment.weight) for token in tokenizer.words(fragment.text)]
        if len(tokens) < _LONG_FRAGMENT and chunks[-1] and len(chunks[-1]) + len(tokens) > room:
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
