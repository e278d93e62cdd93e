"""What a benchmark found, as data: stamped rows of samples in a versioned JSON document.

Everything that is shown later (tables, figures, comparisons) is made of these documents alone;
docs/benchmarks.md has every field.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast, get_args

import numpy as np

from ..engines.errors import PackageError
from .machine import describe_machine

SCHEMA = 1
Status = Literal["ok", "FAILED", "not available"]
Figures = Mapping[str, Any]
Rounds = tuple[tuple[float, ...], ...]

_FIELDS = ("side", "workload", "case", "unit", "status", "reason", "figures", "stamp")  # of a Row, and rounds
_HEAD = ("benchmark", "schema", "date", "machine", "model", "settings")  # of a Document, and rows
_LONGEST = 600  # characters of a reason
# A folder's path in a message: results are published, and name no path of the machine they are from.
_FOLDERS = re.compile(r"(?<![\w.])(?:/[\w.+~-]+)+/")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side at one workload; docs/benchmarks.md has the fields.

    `rounds` has one tuple of samples for each turn of the side. The turns of all sides are interleaved: round
    i of one is to be compared with round i of another. A row that is not "ok" has no time that counts.
    """

    side: str
    workload: str
    case: Mapping[str, Any] = field(default_factory=dict[str, Any])
    unit: str = "s"
    rounds: Rounds = ()
    status: Status = "ok"
    reason: str = ""
    figures: Figures = field(default_factory=dict[str, Any])
    stamp: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def samples(self) -> tuple[float, ...]:
        """The samples of all rounds."""
        return tuple(sample for turn in self.rounds for sample in turn)

    @property
    def summary(self) -> dict[str, float]:
        """`n`, `p50`, `p90`, `p95`, `p99`, `min`, `max`, `mean`; empty without samples."""
        samples = self.samples
        if not samples:
            return {}
        values = {f"p{p}": float(np.percentile(samples, p)) for p in (50, 90, 95, 99)}
        return {"n": len(samples), **values, "min": min(samples), "max": max(samples), "mean": fmean(samples)}

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the summary for people who do not compute it themselves."""
        fields = {name: plain(getattr(self, name)) for name in _FIELDS}
        rounds = [[_rounded(sample) for sample in turn] for turn in self.rounds]
        return {**fields, "summary": self.summary, "rounds": rounds}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The reverse of `to_json`. Raises KeyError, TypeError or ValueError for other data."""
        rounds = tuple(tuple(float(sample) for sample in turn) for turn in data["rounds"])
        row = cls(**{name: data[name] for name in _FIELDS}, rounds=rounds)
        texts = row.side, row.workload, row.unit, row.reason
        mappings: tuple[object, ...] = row.case, row.figures, row.stamp
        if not all(isinstance(item, str) for item in texts) or row.status not in get_args(Status):
            raise TypeError("a row with a text that is none, or an unknown status")
        if not all(isinstance(item, dict) for item in mappings):
            raise TypeError("a row with fields that are no objects")
        return row


@dataclass(frozen=True, kw_only=True)
class Document:
    """One run of one verb; docs/benchmarks.md has the fields."""

    benchmark: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    machine: Mapping[str, Any] = field(default_factory=describe_machine)
    schema: int = SCHEMA

    def select(
        self, workload: str | None = None, side: str | None = None, case: Mapping[str, Any] | None = None
    ) -> Iterator[Row]:
        """The rows that have all that is named."""
        for row in self.rows:
            if workload in (None, row.workload) and side in (None, row.side) and case in (None, row.case):
                yield row

    def beside(self, row: Row, side: str) -> Row | None:
        """The row of a side that took turns with this one, if both count: rounds can be compared in pairs."""
        for other in self.select(row.workload, side, row.case):
            counts = row.status == other.status == "ok" and row.unit == other.unit
            if counts and len(row.rounds) == len(other.rounds) > 0:
                return other
        return None

    @property
    def failed(self) -> bool:
        """Whether any row is."""
        return any(row.status == "FAILED" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        head = {name: plain(getattr(self, name)) for name in _HEAD}
        return {**head, "rows": [row.to_json() for row in self.rows]}

    def write(self, path: Path) -> None:
        """As JSON; a row has one line for each of its fields, for samples are many."""
        data = self.to_json()
        write = partial(json.dumps, ensure_ascii=False, allow_nan=False)
        rows = [
            ",\n".join(f'   "{name}": {write(value)}' for name, value in row.items())
            for row in data.pop("rows")
        ]
        head = write(data, indent=1).removesuffix("\n}")
        text = ",\n".join(f"  {{\n{row}\n  }}" for row in rows)
        write_whole(path, f'{head},\n "rows": [\n{text}\n ]\n}}\n'.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one piece: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def read_document(path: Path) -> Document:
    """The reverse of `Document.write`.

    Raises:
        PackageError: no file, no such document, or one of a newer schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] > SCHEMA:
            raise ValueError(f"its schema is {data['schema']}, this release reads up to {SCHEMA}")
        rows = tuple(Row.from_json(row) for row in data["rows"])
        return Document(**{name: data[name] for name in _HEAD}, rows=rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(
            f"{path} is no benchmark document ({type(error).__name__}: {error})",
            expected=f"JSON that `latentrt bench` wrote, schema {SCHEMA}",
            fix="Measure again: latentrt bench latency --out FILE",
        ) from error


def short(text: str) -> str:
    """One line without folders, and not too long, so that it can be published."""
    line = one_line(text)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


def one_line(text: str) -> str:
    """Without line breaks and folders."""
    return _FOLDERS.sub("…/", " ".join(text.split()))


def plain(value: Any) -> Any:
    """As JSON has it: NumPy's numbers as Python's, numbers JSON has no word for as text, no folders."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return short(value) if isinstance(value, str) else value


def _rounded(sample: float) -> float:
    """To six digits, more than any clock is good for; bytes stay as they are."""
    return sample if float(sample).is_integer() else float(f"{sample:.6g}")
