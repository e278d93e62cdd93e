"""What rows say, read liberally: what a document does not hold is None, and nothing is made up for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..case import WORKLOADS
from ..intervals import Interval, ab_spread, ratio_by_round
from ..records import Document, Row
from ..sides.contract import AGAIN, OURS, REFERENCES

STAGES = ("text_encoder", "invariants", "unet", "update", "vae_decoder")


def figure(row: Row | None, *names: str) -> float | None:
    """The first of a row's figures by these names that is a finite number."""
    for name in names if row else ():
        value = finite(cast("Row", row).figures.get(name))
        if value is not None:
            return value
    return None


def finite(value: object) -> float | None:
    """A number that is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def p50(row: Row | None) -> float | None:
    """The median of a row that counts."""
    return row.summary.get("p50") if row and row.status == "ok" else None


def percentile(row: Row | None, name: str) -> float | None:
    """`p90`, …, of a row that counts."""
    return row.summary.get(name) if row and row.status == "ok" else None


def mapping(value: object) -> Mapping[str, Any]:
    """The mapping that something is, else an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def items(value: object) -> list[Any]:
    """The items of a list; none of what is no list."""
    return list(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else []


def pairs(value: object) -> list[tuple[Any, Any]]:
    """The pairs of a list of pairs; what is none is left out."""
    found = [items(item) for item in items(value)]
    return [(item[0], item[1]) for item in found if len(item) == 2]


def cases(document: Document) -> list[Mapping[str, Any]]:
    """The different cases of our rows, in their order."""
    seen: dict[str, Mapping[str, Any]] = {}
    for row in document.select(side=OURS):
        if row.case:
            seen.setdefault(_key(row.case), row.case)
    return list(seen.values())


def row_of(document: Document, workload: str, side: str, case: Mapping[str, Any]) -> Row | None:
    """The last such row."""
    found = [row for row in document.select(workload, side) if _key(row.case) == _key(case)]
    return found[-1] if found else None


def workloads(document: Document, case: Mapping[str, Any]) -> list[str]:
    """Those of our rows of a case, in the order of a picture, others behind."""
    names = [row.workload for row in document.select(side=OURS) if _key(row.case) == _key(case)]
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
    ratio: Interval | None
    status: str
    reason: str


def against(document: Document, case: Mapping[str, Any], side: str) -> Iterator[Against]:
    """A side's rows of a case beside ours, and the row that says why it could not be opened."""
    for workload in workloads(document, case):
        row = row_of(document, workload, side, case) or _unopened(document, side)
        ours = row_of(document, workload, OURS, case)
        if row is None:
            continue
        ratio = ratio_by_round(row.rounds, ours.rounds) if ours and _took_turns(row, ours) else None
        yield Against(
            side=side, workload=workload, seconds=p50(row), ratio=ratio, status=row.status, reason=row.reason
        )


def spread(document: Document, case: Mapping[str, Any], workload: str) -> float | None:
    """By how much the A/A pair differs, round by round, as a fraction."""
    ours, again = (row_of(document, workload, side, case) for side in (OURS, AGAIN))
    if ours is None or again is None or not _took_turns(ours, again):
        return None
    return ab_spread(ours.rounds, again.rounds)


def _took_turns(one: Row, other: Row) -> bool:
    """Whether their rounds can be compared one by one."""
    good = one.status == other.status == "ok" and one.unit == other.unit == "s"
    return good and len(one.rounds) == len(other.rounds) > 0 and all((*one.rounds, *other.rounds))


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Where the time of a picture goes, in seconds.

    Attributes:
        seconds: by stage, in order; `unet` and `update` are all steps together.
        total: the median of whole pictures; None where there is no such row, and `seconds` are then put
            together from the stages' own rows.
        p90: of whole pictures.
    """

    seconds: Mapping[str, float]
    total: float | None
    p90: float | None


def stages(document: Document, case: Mapping[str, Any]) -> Stages | None:
    """Of our picture, by its own clock, or put together of the stages' rows; None if neither is known."""
    row = row_of(document, "picture", OURS, case)
    total = p50(row)
    if row and total:
        known = mapping(row.figures.get("stages_p50_s")) or mapping(row.figures.get("stages_s"))
        found = {name: taken for name, value in known.items() if (taken := finite(value)) is not None}
        if found:
            return Stages(seconds=_in_order(found), total=total, p90=percentile(row, "p90"))
    steps = case.get("steps")
    apart = {name: p50(row_of(document, name, OURS, case)) for name in STAGES}
    if not steps or apart["unet"] is None or apart["vae_decoder"] is None:
        return None
    times = {"unet": int(steps), "update": int(steps)}
    together = {name: taken * times.get(name, 1) for name, taken in apart.items() if taken is not None}
    return Stages(seconds=together, total=None, p90=None)


def _in_order(found: Mapping[str, float]) -> dict[str, float]:
    names = [*(name for name in STAGES if name in found), *(name for name in found if name not in STAGES)]
    return {name: found[name] for name in names}


def _unopened(document: Document, side: str) -> Row | None:
    return next(document.select("open", side), None)


def _key(case: Mapping[str, Any]) -> str:
    return json.dumps(dict(case), sort_keys=True)
