"""`latentrt bench compare`: two documents, row by row: slower, faster or the same, beyond the noise.

What is compared are times over the yardstick's (docs/benchmarks.md), of both halves of the A/A pair, so that
one process's luck with memory counts half.

A change counts if its confidence interval leaves 1 out, and it is larger than the threshold and than what
the A/A pair of either document differs by. Of a few rounds there is no such interval, and of likenesses the
status says whether they are good enough: those rows are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from ...engines.errors import UsageError
from ..intervals import LEAST, Interval, ab_spread, ratio_of_runs
from ..records import Document, Rounds, Row
from ..sides.contract import AGAIN, OURS, REFERENCES, YARDSTICK
from ..words import case_note

THRESHOLD = 0.05
LEVEL = 0.99  # a document has several rows: of 0.95, one in ten documents would have a row that is wrong
# A change for the worse, for the better, or neither; a row that worked before; a row without a time in both.
Verdict = Literal["slower", "faster", "larger", "smaller", "same", "FAILED", "not compared"]
_WORSE = ("slower", "larger", "FAILED")
# What more of a unit is, and what less of it is; rows of other units are not compared.
_CHANGES: Mapping[str, tuple[Verdict, Verdict]] = {"s": ("slower", "faster"), "B": ("larger", "smaller")}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One row of both documents.

    `ratio` is after / before, without the machine's own change, `machine`, where both have a yardstick; a
    change has to be larger than `noise`, a share, besides its interval. `reason` is of no ratio.
    """

    side: str
    workload: str
    case: Mapping[str, Any]
    unit: str
    verdict: Verdict
    reason: str = ""
    ratio: Interval | None = None
    machine: float | None = None
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two documents, by date and commit, row by row; remarks are what else differs, a sentence each."""

    before: str
    after: str
    rows: tuple[Compared, ...]
    remarks: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """Whether any row of our own side got worse."""
        return any(row.side == OURS and row.verdict in _WORSE for row in self.rows)

    @property
    def compared(self) -> bool:
        """Whether any row has a verdict."""
        return any(row.verdict != "not compared" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "regressed": self.regressed, "compared": self.compared}

    def format(self) -> str:
        """A line for each row, then remarks."""
        lines = [f"{self.before} -> {self.after}"]
        lines += [_line(row, case_note(row.case, (other.case for other in self.rows))) for row in self.rows]
        if not self.compared:
            lines.append("nothing was compared: no row of both documents has a time or a size")
        return "\n".join([*lines, *self.remarks])


def compare(a: Document, b: Document, *, threshold: float = THRESHOLD) -> Comparison:
    """What changed from document `a` to `b`; `threshold`, a share, is the smallest change that counts.

    Raises:
        UsageError: documents of different verbs, models or machines.
    """
    _check(a, b)
    before, after = _by_key(a), _by_key(b)
    rows = [_compared((a, b), (before[key], after[key]), threshold) for key in before if key in after]
    alone = [
        f"only {when}: {row.side}, {row.workload}"
        for when, some, others in (("before", before, after), ("after", after, before))
        for key, row in some.items()
        if key not in others
    ]
    unclear = [
        f"{row.side}, {row.workload}: known within {within:.1%}; more rounds would say more"
        for row in rows
        if row.verdict == "same" and row.ratio
        if (within := (row.ratio.high - row.ratio.low) / 2) > row.noise
    ]
    remarks = (*alone, *_remarks(a, b), *unclear)
    return Comparison(before=_name(a), after=_name(b), rows=tuple(rows), remarks=remarks)


def _check(a: Document, b: Document) -> None:
    same = {
        "verbs": (a.benchmark, b.benchmark),
        "models": (a.model, b.model),
        "machines": (_hardware(a.machine), _hardware(b.machine)),
    }
    for what, (old, new) in same.items():
        if old != new:
            raise UsageError(
                f"the documents are of different {what}: {_text(old)} and {_text(new)}",
                expected="two measurements of the same",
                fix="Measure again as the other was: latentrt bench VERB MODEL --out FILE",
            )


def _hardware(machine: Mapping[str, Any]) -> list[Any]:
    """What makes two machines different ones: processor, usable cores, GPU."""
    gpu = machine.get("gpu")
    return [machine.get("cpu"), machine.get("cores"), gpu and gpu["name"]]


def _name(document: Document) -> str:
    return " ".join(filter(None, (document.date, document.machine.get("commit"))))


def _by_key(document: Document) -> dict[tuple[str, ...], Row]:
    """Rows that are compared: not the second half of the A/A pair, not the yardstick, not the ceiling."""
    rows = [row for row in document.rows if row.side not in REFERENCES]
    return {(row.side, row.workload, _text(row.case), row.unit): row for row in rows}


def _compared(documents: tuple[Document, Document], rows: tuple[Row, Row], threshold: float) -> Compared:
    old, new = rows
    facts: dict[str, Any] = {name: getattr(new, name) for name in ("side", "workload", "case", "unit")}
    if old.status == "ok" and new.status == "FAILED":
        return Compared(**facts, verdict="FAILED", reason=new.reason)
    if reason := _incomparable(old, new):
        return Compared(**facts, verdict="not compared", reason=reason)
    ratio, machine = _ratio(documents, rows)
    noise = max(threshold, *map(_spread, documents, rows))
    verdict = _verdict(ratio, noise, new.unit)
    return Compared(**facts, verdict=verdict, ratio=ratio, machine=machine, noise=noise)


def _incomparable(old: Row, new: Row) -> str:
    """Why no ratio of two rows would say anything; empty if it would."""
    for row, when in ((old, "before"), (new, "after")):
        if row.status != "ok":
            return f"{when}: {row.reason or row.status}"
        if not row.samples:
            return f"no samples {when}"
    if new.unit not in _CHANGES:
        return f"in {new.unit}: its status says whether it is good enough"
    if min(*old.samples, *new.samples) <= 0:
        return "a sample is not above zero"
    rounds = min(len(old.rounds), len(new.rounds))
    if new.unit != "B" and rounds < LEAST:  # memory does not drift
        return f"{rounds} rounds, and less than {LEAST} have no interval: --budget gives more"
    return ""


def _verdict(ratio: Interval, noise: float, unit: str) -> Verdict:
    more, less = _CHANGES[unit]
    if ratio.low > 1 and ratio.value > 1 + noise:
        return more
    return less if ratio.high < 1 and ratio.value < 1 / (1 + noise) else "same"


def _ratio(documents: Sequence[Document], rows: Sequence[Row]) -> tuple[Interval, float | None]:
    """After / before, and the machine's: over the yardsticks if both documents have them."""
    pairs, machine = list(map(_yardsticks, documents, rows)), None
    if all(pairs):
        was, now = (median(half.figures["yardstick_p50_s"] for half in pair) for pair in pairs)
        machine = now / was
    else:
        both = zip(documents, rows, strict=True)
        pairs = [[row, *filter(None, [_again(document, row)])] for document, row in both]
    old, new = map(_together, pairs)
    return ratio_of_runs(new, old, level=LEVEL), machine


def _spread(document: Document, row: Row) -> float:
    """What the A/A pair differs by; 0 where there is none."""
    halves = [half.summary["p50"] for half in _yardsticks(document, row)]
    if len(halves) == 2:
        return abs(halves[0] / halves[1] - 1)
    again = _again(document, row)
    return ab_spread(row.rounds, again.rounds) if again else 0.0


def _yardsticks(document: Document, row: Row) -> list[Row]:
    """How many times as long as the yardstick our row took, for each half of the A/A pair."""
    if row.unit != "s" or row.side != OURS:
        return []
    found = document.select(row.workload, YARDSTICK, row.case)
    return [other for other in found if other.status == "ok" and other.rounds]


def _again(document: Document, row: Row) -> Row | None:
    """The other half of the A/A pair, if this row is the first."""
    return document.beside(row, AGAIN) if row.side == OURS else None


def _together(halves: Sequence[Row]) -> Rounds:
    """Their rounds, joined one by one; of halves with other numbers of rounds only as many as both have."""
    return tuple(sum(turns, ()) for turns in zip(*(half.rounds for half in halves), strict=False))


def _remarks(a: Document, b: Document) -> Iterator[str]:
    facts = {
        "systems": [{name: item.machine.get(name) for name in ("system", "python")} for item in (a, b)],
        "settings": [a.settings, b.settings],
        "versions": [_versions(a), _versions(b)],
    }
    for what, (old, new) in facts.items():
        for name in dict.fromkeys([*old, *new]):
            was, now = _text(old.get(name)), _text(new.get(name))
            if was != now:
                yield f"different {what}: {name} was {was}, is {now}"
    ours = [(document, row) for document in (a, b) for row in document.select(side=OURS)]
    timed = [(document, row) for document, row in ours if row.unit == "s" and row.rounds]
    if not all(_yardsticks(*item) for item in timed):
        yield "no yardstick for some rows: their ratio has the machine's own change in it"
    if not all(_again(*item) for item in timed):
        yield "no A/A pair for some rows: their noise is the threshold and the interval alone"


def _versions(document: Document) -> Mapping[str, Any]:
    """What did our work: the backend, and the layouts of its nets."""
    none: Mapping[str, Any] = {}
    return next((row.stamp["side"] for row in document.select(side=OURS) if "side" in row.stamp), none)


def _line(row: Compared, note: str) -> str:
    head = f"{row.verdict:12}  {row.side}, {row.workload}{note}"
    if row.ratio is None:
        return f"{head}: {row.reason}"
    machine = "" if row.machine is None else f", machine x {row.machine:.2f} taken out"
    ratio = f"x {row.ratio.value:.3f} [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"
    return f"{head}: {ratio}, noise {row.noise:.1%}{machine}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
