"""Hugging Face's cache: `models--OWNER--NAME/snapshots/COMMIT/FILE`, links by name to `blobs/HASH`.

The layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

# What commits, and files of the cache, are called.
COMMIT_OR_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def snapshot(root: Path) -> Path:
    """Where the branch `main` of a repository in the cache lies; other paths as they are."""
    return snapshot_of(root, "main") or root


def snapshot_of(root: Path, revision: str) -> Path | None:
    """Where a branch, tag or commit of the repository at `root` lies; None where nothing of it is there."""
    with suppress(OSError, ValueError):
        known = COMMIT_OR_BLOB.fullmatch(revision)
        commit = revision if known else (root / "refs" / revision).read_text("utf-8").strip()
        if COMMIT_OR_BLOB.fullmatch(commit) and (root / "snapshots" / commit).is_dir():
            return root / "snapshots" / commit
    return None


def called(path: Path, name: str) -> str:
    """`name`, what a file or folder is called; its repository's where it lies in the cache under a hash.

    Links are not followed: a snapshot's files are links to ones that are called by their hashes.
    """
    if COMMIT_OR_BLOB.fullmatch(name):
        for parent in path.parents:
            if parent.name.startswith("models--"):
                return parent.name.rpartition("--")[2]
    return name


def repository_folder(cache: Path, repository: str) -> Path:
    """The folder of the model ORG/NAME in the cache, there or not."""
    return cache / f"models--{repository.replace('/', '--')}"
