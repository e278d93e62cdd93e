"""The documents under a folder, each with a name for its figures and a digest of what it says."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ...engines.errors import UsageError
from ..records import Document, read_document


@dataclass(frozen=True, kw_only=True)
class Result:
    """One document.

    Attributes:
        name: its path below the folder without ".json", in POSIX form: figures are called after it.
        digest: of its JSON, whatever the white space: a figure carries the digest of what it was drawn from.
    """

    name: str
    digest: str
    document: Document


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a folder holds: documents by name, and what was left out of the report, one sentence each."""

    found: tuple[Result, ...]
    remarks: tuple[str, ...]


def read_results(folder: Path) -> Results:
    """Read every document below a folder.

    JSON that is no document (`records.Document`) is left out with a remark.

    Raises:
        UsageError: no such folder.
        PackageError: a document that is damaged, or of a newer schema.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder",
            expected="a folder of documents that `latentrt bench` wrote",
            fix=f"Measure first: latentrt bench latency --out {folder / 'latency.json'}.",
        )
    found: list[Result] = []
    remarks: list[str] = []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder)
        data = _document(path)
        if data is None:
            remarks.append(f"{name.as_posix()} left out: it is no document of `latentrt bench`")
            continue
        canonical = json.dumps(data, sort_keys=True).encode()
        stem = str(PurePosixPath(name.as_posix()).with_suffix(""))
        digest = hashlib.sha256(canonical).hexdigest()
        found.append(Result(name=stem, digest=digest, document=read_document(path)))
    return Results(found=tuple(found), remarks=tuple(remarks))


def _document(path: Path) -> dict[str, Any] | None:
    """The JSON of a file that claims to be a document; None for any other."""
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not text
        return None
    if not isinstance(data, dict) or not {"benchmark", "schema"} <= data.keys():
        return None
    return cast("dict[str, Any]", data)
