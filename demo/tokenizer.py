"""A byte-level BPE vocabulary in CLIP's file format, learnt from the demo's own words.

Every word of `shapes.vocabulary()` becomes one token; any other text still tokenises, byte by byte. Ids: 256
bytes, 256 bytes that end a word, the merges, then bos and eos (eos is also pad and unk, as in CLIP).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, processors

from ..runtime.prompts.tokenizer import byte_level

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
LENGTH = 77

_WORD_END = "</w>"

Pair = tuple[str, str]


def byte_symbols() -> list[str]:
    """The character that stands for each byte, in CLIP's order: printable bytes first, then the rest."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: list[str]) -> list[Pair]:
    """Merge the most frequent neighbours (ties: alphabetical) until each word is a single symbol."""
    pieces = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[Pair] = []
    while any(len(piece) > 1 for piece in pieces):
        counts = Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        pair = min(counts, key=lambda p: (-counts[p], p))
        merges.append(pair)
        pieces = [_merge(piece, pair) for piece in pieces]
    return merges


def _merge(piece: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for symbol in piece:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def vocabulary_of(merges: list[Pair]) -> dict[str, int]:
    """Token -> id."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + _WORD_END for symbol in symbols), *(a + b for a, b in merges), BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}


def build(words: list[str]) -> Tokenizer:
    """A fast tokenizer that pads and truncates to 77 ids, as transformers' CLIPTokenizer does."""
    merges = learn_merges(words)
    ids = vocabulary_of(merges)
    tokenizer = byte_level(ids, merges, EOS)
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, ids[EOS]), (BOS, ids[BOS]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=ids[EOS], pad_token=EOS)
    return tokenizer


def save(words: list[str], folder: Path) -> None:
    """Write the five files of a CLIP tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(words)
    build(words).save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocabulary_of(merges), indent=None)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    _write_json(folder / "special_tokens_map.json", specials)
    config = {
        **specials,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
