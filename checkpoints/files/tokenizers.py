"""The tokenizer folders of a package: copied from the checkpoint, or written for one that brings none.

Every Stable Diffusion model up to SDXL reads prompts with OpenAI's 49,408 tokens, which a checkpoint in one
file leaves out. They come from bpe_simple_vocab_16e6.txt.gz of https://github.com/openai/CLIP.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from ...engines.errors import CheckpointError, UsageError
from ...engines.lfs import refuse_pointer

# Of a tokenizer's folder, the files that are read.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_VOCABULARY = Path(__file__).parent / "clip_vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # CLIP uses the first of the file's (simple_tokenizer.py)
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_PAD_TOKENS = (_EOS, "!")
# Bytes that are their own symbol; the others get the characters from 256 on (`bytes_to_unicode` of GPT-2).
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))


# Writes a package's tokenizer folder, which does not exist yet.
WriteTokenizer = Callable[[Path], object]


def tokenizer_files(folder: Path) -> list[str]:
    """The files of a checkpoint's tokenizer. Raises CheckpointError where the vocabulary is missing."""
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= set(found):
        raise CheckpointError(
            f"{folder} holds {found}",
            expected="tokenizer.json, or vocab.json and merges.txt",
            fix="Download the checkpoint's tokenizer folder again.",
        )
    for name in found:
        refuse_pointer(folder / name)
    return found


def copy_tokenizer(target: Path, *, folder: Path) -> None:
    """Copy a checkpoint's tokenizer, not its links: Hugging Face's cache has them, a package must not.

    Raises:
        CheckpointError: as `tokenizer_files`.
    """
    found = tokenizer_files(folder)
    target.mkdir()
    for name in found:
        shutil.copyfile(folder / name, target / name)


def write_clip_tokenizer(folder: str | Path, pad_token: str = _EOS) -> Path:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, as SD 1.x has them.

    Args:
        folder: made where it is missing.
        pad_token: "<|endoftext|>" for SD 1.x and SDXL's first encoder; "!" (id 0) for SD 2.x and SDXL's
            second.

    Returns:
        The folder.

    Raises:
        UsageError: another pad_token.
    """
    if pad_token not in _PAD_TOKENS:
        raise UsageError(
            f"pad_token is {pad_token!r}", expected=f"one of {_PAD_TOKENS}", fix=f"Use pad_token={_EOS!r}."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = gzip.decompress(_VOCABULARY.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    symbols = [chr(byte) for byte in _PRINTABLE]
    symbols += [chr(256 + index) for index in range(256 - len(symbols))]
    words = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *(merge.replace(" ", "") for merge in merges),
    ]
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate([*words, _BOS, _EOS])})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    special = {
        "bos_token": _special(_BOS),
        "eos_token": _special(_EOS),
        "pad_token": pad_token,
        "unk_token": _special(_EOS),
    }
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {**config, **special})
    return folder


def _special(content: str) -> dict[str, object]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
