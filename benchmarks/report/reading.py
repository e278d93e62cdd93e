"""What documents say, read liberally: what one does not hold is None, and nothing is made up for it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ...engines.errors import UsageError
from ..case import WORKLOADS
from ..intervals import Interval, ab_spread, ratio_by_round
from ..records import Document, Row, read_document
from ..sides.contract import AGAIN, CEILING, OURS, REFERENCES


def figure(row: Row | None, name: str) -> float | None:
    """A row's figure, if it is a finite number."""
    return finite(row.figures.get(name)) if row else None


def finite(value: object) -> float | None:
    """A number that is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def summary(row: Row | None, name: str = "p50") -> float | None:
    """A percentile of a row that counts."""
    return row.summary.get(name) if row and row.status == "ok" else None


def mapping(value: object) -> Mapping[str, Any]:
    """The mapping itself; an empty one for anything else."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def items(value: object) -> list[Any]:
    """The items of a list; none for anything else."""
    return list(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else []


def case_key(case: Mapping[str, Any]) -> str:
    """Equal for equal cases."""
    return json.dumps(dict(case), sort_keys=True)


def cases(document: Document) -> list[Mapping[str, Any]]:
    """The different cases of our rows, in their order."""
    seen: dict[str, Mapping[str, Any]] = {}
    for row in document.select(side=OURS):
        if row.case:
            seen.setdefault(case_key(row.case), row.case)
    return list(seen.values())


def row_of(document: Document, workload: str, side: str, case: Mapping[str, Any]) -> Row | None:
    """The last such row."""
    found = [row for row in document.select(workload, side) if case_key(row.case) == case_key(case)]
    return found[-1] if found else None


def workloads(document: Document, case: Mapping[str, Any]) -> list[str]:
    """The workloads of our rows of a case, in the order of a picture, others behind."""
    names = [row.workload for row in document.select(side=OURS) if case_key(row.case) == case_key(case)]
    order = {name: place for place, name in enumerate(WORKLOADS)}
    return sorted(dict.fromkeys(names), key=lambda name: order.get(name, len(order)))


def peers(document: Document) -> list[str]:
    """Every side but ours and the references, in the order of the document."""
    names = dict.fromkeys(row.side for row in document.rows)
    return [name for name in names if name not in (OURS, *REFERENCES)]


@dataclass(frozen=True, kw_only=True)
class Against:
    """A side at one workload, against ours. `ratio` is its time over ours: above 1 we are faster."""

    side: str
    workload: str
    seconds: float | None
    p90: float | None
    ratio: Interval | None
    status: str
    reason: str


def against(document: Document, case: Mapping[str, Any], side: str) -> dict[str, Against]:
    """A side's rows of a case beside ours, by workload; or the row that says why it was not opened."""
    unopened = next(document.select("open", side), None)
    found: dict[str, Against] = {}
    for workload in workloads(document, case):
        row = row_of(document, workload, side, case) or unopened
        ours = row_of(document, workload, OURS, case)
        if row is None:
            continue
        found[workload] = Against(
            side=side,
            workload=workload,
            seconds=summary(row),
            p90=summary(row, "p90"),
            ratio=ratio_by_round(row.rounds, ours.rounds) if ours and _took_turns(row, ours) else None,
            status=row.status,
            reason=row.reason,
        )
    return found


def spread(document: Document, case: Mapping[str, Any], workload: str) -> float | None:
    """By how much the A/A pair differs, round by round, as a fraction."""
    ours, again = (row_of(document, workload, side, case) for side in (OURS, AGAIN))
    if ours is None or again is None or not _took_turns(ours, again):
        return None
    return ab_spread(ours.rounds, again.rounds)


def _took_turns(one: Row, other: Row) -> bool:
    """Whether their rounds can be compared one by one."""
    timed = one.status == other.status == "ok" and one.unit == other.unit == "s"
    return timed and len(one.rounds) == len(other.rounds) > 0 and all((*one.rounds, *other.rounds))


def ceiling_rates(document: Document, workload: str) -> list[float]:
    """FLOP/s of "gemm" or B/s of "copy", of every time it was measured in the run."""
    found: list[float] = []
    for row in document.select(workload, CEILING):
        work, taken = figure(row, "flops") or figure(row, "bytes"), summary(row)
        if taken and row.unit in ("FLOP/s", "B/s"):
            found.append(taken)
        elif taken and work and row.unit == "s":
            found.append(work / taken)
    return found


def stages(row: Row | None) -> dict[str, float]:
    """Where our picture's time goes, seconds in order; `unet` and `update` are all steps together."""
    known = mapping(row.figures.get("stages_p50_s") if row else None)
    seconds = {name: taken for name, value in known.items() if (taken := finite(value)) is not None}
    places = {name: place for place, name in enumerate(WORKLOADS)}
    return dict(sorted(seconds.items(), key=lambda item: places.get(item[0], len(places))))


# ── the documents of a folder ──────────────────────────────────────────────────────────────────────


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
