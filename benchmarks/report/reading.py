"""What the report reads in documents: sides beside ours, ceilings, stages. What is not there is None."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engines.errors import UsageError, command
from ..case import WORKLOADS
from ..intervals import Interval, ab_spread, ratio_by_round
from ..records import Document, Row, read_document
from ..sides.contract import AGAIN, CEILING, OURS, REFERENCES

Case = Mapping[str, Any]


def figure(row: Row | None, name: str) -> float | None:
    """A row's figure, if it is a number; what is not finite stands in JSON as text."""
    value = row.figures.get(name) if row else None
    return value if isinstance(value, (int, float)) else None


def summary(row: Row | None, name: str = "p50") -> float | None:
    """A percentile of a row that counts."""
    return row.summary.get(name) if row and row.status == "ok" else None


def cases(document: Document) -> list[Case]:
    """The different cases of our rows, in their order."""
    found: list[Case] = []
    for row in document.select(side=OURS):
        if row.case and row.case not in found:
            found.append(row.case)
    return found


def our_rows(document: Document, case: Case) -> dict[str, Row]:
    """Our rows of a case by workload, in the order of a picture, others behind."""
    rows = {row.workload: row for row in document.select(None, OURS, case)}
    return {name: rows[name] for name in (*WORKLOADS, *rows) if name in rows}


def peers(document: Document) -> list[str]:
    """Every side but ours and the references, in the order of the document."""
    names = dict.fromkeys(row.side for row in document.rows)
    return [name for name in names if name not in (OURS, *REFERENCES)]


@dataclass(frozen=True, kw_only=True)
class Against:
    """A side's row at one workload, and its time over ours: above 1 we are faster."""

    row: Row
    ratio: Interval | None


def against(document: Document, case: Case, side: str) -> dict[str, Against]:
    """A side's rows of a case beside ours, by workload; or the row that says why it was not opened."""
    unopened = next(document.select("open", side), None)
    found: dict[str, Against] = {}
    for workload, ours in our_rows(document, case).items():
        if row := next(document.select(workload, side, case), unopened):
            timed = ours.unit == "s" and document.beside(ours, side)
            ratio = ratio_by_round(row.rounds, ours.rounds) if timed else None
            found[workload] = Against(row=row, ratio=ratio)
    return found


def spread(document: Document, ours: Row) -> float | None:
    """By how much the A/A pair differs, round by round, as a fraction."""
    again = document.beside(ours, AGAIN)
    return ab_spread(ours.rounds, again.rounds) if again else None


def ceiling_rates(document: Document, workload: str) -> list[float]:
    """FLOP/s of "gemm" or B/s of "copy", of every time it was measured in the run."""
    rows = [row for row in document.select(workload, CEILING) if row.status == "ok"]
    return [(row.figures.get("flops") or row.figures["bytes"]) / row.summary["p50"] for row in rows]


def stages(row: Row) -> dict[str, float]:
    """Where our picture's time goes, seconds in order; `unet` and `update` are all steps together."""
    known = row.figures.get("stages_p50_s", {})
    return {name: known[name] for name in WORKLOADS if name in known}


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


def read_results(folder: Path) -> tuple[list[Result], list[str]]:
    """Read every document below a folder; JSON that is none is left out with a remark of one sentence.

    Raises:
        UsageError: no such folder.
        PackageError: a document that is damaged, or of a newer schema.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder",
            expected="a folder of documents that `latentrt bench` wrote",
            fix=f"Measure first: {command('latentrt', 'bench', 'latency', '--out', folder / 'latency.json')}",
        )
    found: list[Result] = []
    remarks: list[str] = []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # not JSON, or not text
            data = None
        if isinstance(data, dict) and {"benchmark", "schema"} <= data.keys():
            digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
            found.append(Result(name=name.removesuffix(".json"), digest=digest, document=read_document(path)))
        else:
            remarks.append(f"{name} left out: it is no document of `latentrt bench`")
    return found, remarks
