"""The tokenizer folders of a package: copied from the checkpoint, or written for one that brings none."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import CheckpointError

_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True, kw_only=True)
class CopiedTokenizer:
    """A checkpoint's own tokenizer folder."""

    folder: Path

    def write(self, target: Path) -> None:
        """Copy contents, not links: Hugging Face's cache consists of links, which a package must not hold.

        Raises:
            CheckpointError: the vocabulary is missing.
        """
        found = [name for name in _FILES if (self.folder / name).is_file()]
        if "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= set(found):
            raise CheckpointError(
                f"{self.folder} holds {found}",
                expected="tokenizer.json, or vocab.json and merges.txt",
                fix="Download the checkpoint's tokenizer folder again.",
            )
        target.mkdir()
        for name in found:
            shutil.copyfile(self.folder / name, target / name)


@dataclass(frozen=True, kw_only=True)
class ClipTokenizer:
    """CLIP's own vocabulary, for checkpoints in one file. Families differ in what fills a short prompt."""

    pad_token: str

    def write(self, target: Path) -> None:
        """Write the folder."""
        from .clip_tokenizer import write_clip_tokenizer

        write_clip_tokenizer(target, pad_token=self.pad_token)


TokenizerSource = CopiedTokenizer | ClipTokenizer
