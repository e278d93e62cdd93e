"""Straightforward transcriptions of the published prompt parsers: quadratic, recursive, and the oracle.

AUTOMATIC1111's `parse_prompt_attention` and `tokenize_line`, ComfyUI's `token_weights` and
`tokenize_with_weights`, written from what they do; the package shares nothing with them.
"""

from __future__ import annotations

import re
from functools import cache
from tempfile import TemporaryDirectory

from latentrt.checkpoints.files.tokenizers import write_clip_tokenizer
from latentrt.runtime.prompts.tokenizer import ClipTokenizer

Pairs = list[tuple[str, float]]


_A1111 = r"(\\[()\[\]\\]|\\)|([(\[])|(:\s*([+-]?[.\d]+)\s*\))|([)\]])|([^\\()\[\]:]+|:)"


def a1111(text: str) -> Pairs:
    """ValueError where the reference fails: a weight that is no number."""
    pieces: list[list] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for escape, opening, weighted, weight, closing, other in re.findall(_A1111, text):
        if escape:
            pieces.append([escape[1:], 1.0])
        elif opening:
            open_at[opening].append(len(pieces))
        elif weighted and open_at["("]:
            multiply(open_at["("].pop(), float(weight))
        elif closing == ")" and open_at["("]:
            multiply(open_at["("].pop(), 1.1)
        elif closing == "]" and open_at["["]:
            multiply(open_at["["].pop(), 1 / 1.1)
        else:
            pieces += _between_breaks(weighted or closing or other)
    for start, factor in [(start, 1.1) for start in open_at["("]] + [(s, 1 / 1.1) for s in open_at["["]]:
        multiply(start, factor)
    return _merged(pieces or [["", 1.0]])


def _between_breaks(text: str) -> list[list]:
    first, *others = re.split(r"\s*\bBREAK\b\s*", text)
    return [[first, 1.0], *(piece for part in others for piece in (["BREAK", -1], [part, 1.0]))]


def _merged(pieces: list[list]) -> Pairs:
    merged: Pairs = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def comfyui(text: str) -> Pairs:
    text = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    return [
        (piece.replace("\0\1", ")").replace("\0\2", "("), weight) for piece, weight in _weighted(text, 1.0)
    ]


def _weighted(text: str, outer: float) -> Pairs:
    found: Pairs = []
    for piece in _top_level(text):
        if len(piece) < 2 or piece[0] != "(" or piece[-1] != ")":
            found.append((piece, outer))
            continue
        inside, weight = piece[1:-1], outer * 1.1
        colon = inside.rfind(":")
        if colon > 0:
            try:
                weight, inside = float(inside[colon + 1 :]), inside[:colon]
            except ValueError:
                pass
        found += _weighted(inside, weight)
    return found


def _top_level(text: str) -> list[str]:
    pieces: list[str] = []
    piece, level = "", 0
    for character in text:
        if character == "(":
            if level == 0 and piece:
                pieces.append(piece)
                piece = ""
            level += 1
        piece += character
        if character == ")":
            level -= 1
            if level == 0:
                pieces.append(piece)
                piece = ""
    return [*pieces, piece] if piece else pieces


def a1111_chunks(tokenized: list[tuple[list, float]], comma: int, room: int = 75) -> list[list[tuple]]:
    """`tokenized` has (token ids, weight) of each fragment; ([], -1) is a BREAK. Chunks without bos, eos.

    A tuple among the ids is an embedding: the ids of its vectors.
    """
    chunks: list[list[tuple]] = []
    chunk: list[tuple] = []
    last_comma = -1

    def finish() -> None:
        nonlocal chunk, last_comma
        chunks.append(chunk)
        chunk, last_comma = [], -1

    for tokens, weight in tokenized:
        if not tokens and weight == -1:
            finish()
            continue
        for token in tokens:
            if token == comma:
                last_comma = len(chunk)
            elif len(chunk) == room and last_comma != -1 and len(chunk) - last_comma <= 20:
                moved = chunk[last_comma + 1 :]
                del chunk[last_comma + 1 :]
                finish()
                chunk = moved
            if len(chunk) == room:
                finish()
            vectors = token if isinstance(token, tuple) else (token,)
            if len(chunk) + len(vectors) > room:
                finish()
            chunk += [(vector, weight) for vector in vectors]
    if chunk or not chunks:
        finish()
    return chunks


def comfyui_chunks(tokenized: list[tuple[list[int], float]], room: int = 75) -> list[list[tuple]]:
    chunks: list[list[tuple]] = [[]]
    for tokens, weight in tokenized:
        group = [(token, weight) for token in tokens]
        is_large = len(group) >= 8
        while group:
            left = room - len(chunks[-1])
            if len(group) <= left:
                chunks[-1].extend(group)
                break
            if is_large:
                chunks[-1].extend(group[:left])
                group = group[left:]
            chunks.append([])
    return chunks


@cache
def clip_tokenizer(pad_token: str = "<|endoftext|>") -> ClipTokenizer:
    """With OpenAI's 49,408 tokens."""
    with TemporaryDirectory() as folder:
        return ClipTokenizer.open(write_clip_tokenizer(folder, pad_token))
