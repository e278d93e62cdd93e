"""Prompts to CLIP token ids, as transformers' ``CLIPTokenizer`` gives them, without transformers.

The byte-pair encoding is done by Hugging Face's ``tokenizers``. Prompts are composed (NFC), white space is
folded and letters are lowered; HTML entities and emphasis brackets reach the encoder as they stand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers

from ...engines.errors import PackageError, UsageError

CLIP_LENGTH = 77

_DEFAULT_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# CLIP's word pattern (openai/CLIP, simple_tokenizer.py)
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# a folder without a limit of its own stores a number near 1e30
_NO_LIMIT = 100_000

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A tokenized batch of B prompts.

    Attributes:
        ids: ``(B, length)`` int32: bos, the prompt, eos, padding.
        dropped: for each prompt the end that did not fit, as it was typed; ``""`` if all of it did.
    """

    ids: npt.NDArray[np.int32]
    dropped: tuple[str, ...]


class ClipTokenizer:
    """A CLIP tokenizer that threads may share: encoding changes nothing in it.

    Attributes:
        length: ids per prompt, as the folder sets it; usually 77.
        bos_id, eos_id, pad_id: the ids put around a prompt. SD 1 pads with eos, SD 2 and SDXL's second
            encoder with ``"!"`` (id 0).
        comma_id: the id of a comma that stands by itself; None where the vocabulary has none.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos_id: int, eos_id: int, pad_id: int, length: int) -> None:
        self._tokenizer = tokenizer
        self.bos_id, self.eos_id, self.pad_id, self.length = bos_id, eos_id, pad_id, length
        self.comma_id: int | None = tokenizer.token_to_id(",</w>")

    @classmethod
    def open(cls, folder: str | Path) -> ClipTokenizer:
        """Read a diffusers tokenizer folder.

        Args:
            folder: holds ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``. Special tokens and length
                that differ from CLIP's are read from ``tokenizer_config.json`` and
                ``special_tokens_map.json``.

        Raises:
            PackageError: a file is missing or damaged, or a special token has no id.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"), folder)
        tokenizer = _read_tokenizer(folder, special)
        ids = {name: _id_of(tokenizer, token.content, name, folder) for name, token in special.items()}
        # pad included: with SD 2's "!", transformers reads every "!" of a prompt as padding, and so do we
        cast(Any, tokenizer).add_tokens([t for t in special.values() if not _is_added(tokenizer, t.content)])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(
            tokenizer,
            bos_id=ids["bos_token"],
            eos_id=ids["eos_token"],
            pad_id=ids["pad_token"],
            length=_length(config, folder),
        )

    def encode(self, prompts: Sequence[str], length: int | None = None) -> Tokens:
        """Encode a batch; ``""`` becomes bos, eos and padding.

        Args:
            prompts: B prompts.
            length: ids per prompt, bos and eos included; the tokenizer's own by default.

        Raises:
            UsageError: a prompt that is no valid text, one string instead of a list, or a length below 2.
        """
        length = self.length if length is None else length
        if isinstance(prompts, str):
            raise UsageError("one prompt", expected="a list of prompts", fix=f"Pass [{prompts[:20]!r}].")
        if length < 2:
            raise UsageError(
                f"{length} tokens a prompt", expected="2 or more: bos and eos", fix="Use length=77."
            )
        ids = np.full((len(prompts), length), self.pad_id, np.int32)
        dropped: list[str] = []
        for row, prompt in zip(ids, prompts, strict=True):
            words, rest = self.truncated(prompt, length - 2)
            row[0], row[1 : len(words) + 1], row[len(words) + 1] = self.bos_id, words, self.eos_id
            dropped.append(rest)
        return Tokens(ids=ids, dropped=tuple(dropped))

    def words(self, text: str) -> list[int]:
        """All ids of a text, without bos, eos and padding. Raises UsageError for text that is not valid."""
        return self._encoding(text).ids

    def truncated(self, prompt: str, room: int) -> tuple[list[int], str]:
        """At most ``room`` ids of a text, without bos and eos, and the rest of it as it was typed.

        Truncation is done here, because switching it on in the shared tokenizer makes concurrent encoding
        fail with "Already borrowed".
        """
        encoding = self._encoding(prompt)
        ids = encoding.ids
        if len(ids) <= room:
            return ids, ""
        return ids[:room], prompt[encoding.offsets[room][0] :]

    def _encoding(self, prompt: str) -> Encoding:
        try:
            return self._tokenizer.encode(prompt, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise UsageError(
                f"a prompt that is no text: {prompt!r:.60}",
                expected="a str that UTF-8 can hold",
                fix="Remove the unpaired surrogates.",
            ) from error


def tokenize(folder: Path, texts: Sequence[str], length: int) -> npt.NDArray[np.int32]:
    """Texts as the tokenizer in a folder reads them, padded or cut: (texts, length)."""
    return ClipTokenizer.open(folder).encode(texts, length).ids


def _broken(path: Path, reason: object) -> PackageError:
    return PackageError(
        f"{path}: {reason}",
        expected="a CLIP tokenizer's file as transformers saves it",
        fix="Export the checkpoint again, or copy the tokenizer folder of the original model.",
    )


def _read_json(path: Path) -> Json:
    """The object in a JSON file; empty if there is no file."""
    try:
        value: object = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, error) from error
    return _as_object(value, path, "the whole file")


def _as_object(value: object, path: Path, name: str) -> Json:
    if not isinstance(value, dict):
        raise _broken(path, f"{name} is no JSON object but {value!r:.40}")
    return cast(Json, value)


def _special_tokens(config: Json, overrides: Json, folder: Path) -> dict[str, AddedToken]:
    """The special tokens, with the flags that transformers would give them.

    A config with ``added_tokens_decoder`` (transformers >= 4.34) is complete by itself; beside an older one
    special_tokens_map.json wins.
    """
    path = folder / "tokenizer_config.json"
    flags: dict[object, Json] = {}
    named = {**config, **overrides}
    if "added_tokens_decoder" in config:
        named = config
        decoder = _as_object(config["added_tokens_decoder"], path, "added_tokens_decoder")
        entries = [_as_object(entry, path, "added_tokens_decoder's entry") for entry in decoder.values()]
        flags = {entry.get("content"): entry for entry in entries}
    tokens: dict[str, AddedToken] = {}
    for name, default in _DEFAULT_TOKENS.items():
        token: object = named.get(name) or default
        entry = {"content": token} if isinstance(token, str) else _as_object(token, path, name)
        content: object = entry.get("content")
        if not isinstance(content, str):
            raise _broken(path, f"{name} is {token!r:.40}")
        entry = flags.get(content, entry)
        chosen = {flag: entry[flag] for flag in _TOKEN_FLAGS if isinstance(entry.get(flag), bool)}
        tokens[name] = AddedToken(content, special=True, **chosen)
    return tokens


def _read_tokenizer(folder: Path, special: Mapping[str, AddedToken]) -> Tokenizer:
    path, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        if not (vocabulary.is_file() and merges.is_file()):
            raise _broken(folder, "holds neither tokenizer.json nor vocab.json with merges.txt")
        path = vocabulary
        return byte_level(*models.BPE.read_file(str(vocabulary), str(merges)), special["unk_token"].content)
    except PackageError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise _broken(path, error) from error


def byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Tokenizer:
    """Build what transformers' ``CLIPTokenizer`` builds from the two older files."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=unknown,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _id_of(tokenizer: Tokenizer, token: str, name: str, folder: Path) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise _broken(folder, f"{name} {token!r} is not in the vocabulary")
    return index


def _is_added(tokenizer: Tokenizer, content: str) -> bool:
    return any(token.content == content for token in tokenizer.get_added_tokens_decoder().values())


def _length(config: Json, folder: Path) -> int:
    length = config.get("model_max_length", CLIP_LENGTH)
    if not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 2:
        raise _broken(folder / "tokenizer_config.json", f"model_max_length is {length!r}")
    return CLIP_LENGTH if length > _NO_LIMIT else int(length)
