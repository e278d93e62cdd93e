"""`latentrt bench compare`: two documents, row by row: slower, faster or the same, beyond the noise.

The documents are from different minutes, and a shared machine can be half as fast a minute later. So each
round of ours is divided by the same round of a yardstick that was measured in between: a matrix product that
none of our changes touch (side "ceiling", workload "gemm", figures {"during": workload}). What is compared is
the median over rounds of time / yardstick (`intervals.ratio_of_rounds`); the two halves of an A/A pair,
"latentrt" and "latentrt again", are pooled, so that one process's luck with memory counts half.

A change counts if its confidence interval leaves 1 out, and it is larger than the threshold and than what the
A/A pair of either document differs by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..engines.errors import UsageError
from .intervals import Interval, ab_spread, median_of, ratio_of_rounds
from .records import Document, Rounds, Row
from .sides.contract import AGAIN, OURS

THRESHOLD = 0.05
LEVEL = 0.99  # a document has several rows: of 0.95, one in ten documents would have a row that is wrong
YARDSTICK = "ceiling", "gemm"
# A change for the worse, for the better, or neither; a row that worked before; a row without a time in both.
Verdict = Literal["slower", "faster", "larger", "smaller", "same", "FAILED", "not compared"]
_WORSE = ("slower", "larger", "FAILED")
_RATES = ("1/s", "FLOP/s", "B/s")  # more is better
_FACTS = ("cpu", "cores", "gpu", "system", "python")

Key = tuple[str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One row of both documents.

    Attributes:
        side, workload, case, unit: as in `records.Row`.
        before, after: p50 of each, as measured.
        ratio: after / before with its interval; of seconds, the machine's own change is taken out where
            both documents have a yardstick.
        machine: the yardstick's after / before; None without one.
        noise: what a change has to be larger than, beside its interval: 0.05 is 5 %.
        verdict: what it comes to.
        reason: of a verdict that no ratio gave.
    """

    side: str
    workload: str
    case: Mapping[str, Any]
    unit: str
    verdict: Verdict
    reason: str = ""
    before: float | None = None
    after: float | None = None
    ratio: Interval | None = None
    machine: float | None = None
    noise: float | None = None

    @property
    def regressed(self) -> bool:
        """Whether our own side got worse."""
        return self.side == OURS and self.verdict in _WORSE


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two documents, row by row.

    Attributes:
        before, after: date and commit of each.
        rows: those in both.
        only_before, only_after: side and workload of those in one.
        remarks: what a reader has to know about the ratios.
        threshold: the smallest change that counts.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    rows: tuple[Compared, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    remarks: tuple[str, ...]
    threshold: float

    @property
    def regressed(self) -> bool:
        """Whether any row of our own side did."""
        return any(row.regressed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "regressed": self.regressed}

    def format(self) -> str:
        """A line for each row, then remarks and the rows of one document alone."""
        lines = [f"{_named(self.before)} -> {_named(self.after)}"]
        lines += [_line(row, _asked(row.case, self.rows)) for row in self.rows]
        lines += [f"only before: {name}" for name in self.only_before]
        lines += [f"only after: {name}" for name in self.only_after]
        return "\n".join([*lines, *self.remarks])


def compare(a: Document, b: Document, *, threshold: float = THRESHOLD) -> Comparison:
    """What changed from document `a` to document `b`.

    Args:
        a: before.
        b: after, of the same verb and model.
        threshold: the smallest change that counts, 0.05 is 5 %.

    Raises:
        UsageError: documents of different verbs or models, or a threshold that is none.
    """
    _check(a, b, threshold)
    before, after = _by_key(a), _by_key(b)
    pairs = [(before[key], after[key]) for key in before if key in after]
    rows = [_Pair(a, b, old, new, threshold).compared() for old, new in pairs]
    return Comparison(
        before=_facts(a),
        after=_facts(b),
        rows=tuple(rows),
        only_before=tuple(_label(row) for key, row in before.items() if key not in after),
        only_after=tuple(_label(row) for key, row in after.items() if key not in before),
        remarks=(*_remarks(a, b), *_unclear(rows)),
        threshold=threshold,
    )


class _Pair:
    """A row of one document and the same row of another."""

    def __init__(self, a: Document, b: Document, old: Row, new: Row, threshold: float) -> None:
        self._documents, self._rows, self._threshold = (a, b), (old, new), threshold

    def compared(self) -> Compared:
        """The verdict."""
        old, new = self._rows
        facts: dict[str, Any] = {name: getattr(new, name) for name in ("side", "workload", "case", "unit")}
        if old.status == "ok" and new.status == "FAILED":
            return Compared(**facts, verdict="FAILED", reason=new.reason)
        for row, when in ((old, "before"), (new, "after")):
            if row.status != "ok" or not row.samples:
                reason = f"{when}: {row.reason or row.status}" if row.status != "ok" else f"no samples {when}"
                return Compared(**facts, verdict="not compared", reason=reason)
        if min(*old.samples, *new.samples) <= 0:
            return Compared(**facts, verdict="not compared", reason="a sample is not above zero")
        ratio, machine = self._ratio()
        noise = max(self._threshold, *self._spreads())
        return Compared(
            **facts,
            verdict=_verdict(ratio, noise, new.unit),
            before=old.summary["p50"],
            after=new.summary["p50"],
            ratio=ratio,
            machine=machine,
            noise=noise,
        )

    def _ratio(self) -> tuple[Interval, float | None]:
        sides = list(zip(self._documents, self._rows, strict=True))
        pooled = [_pooled(document, row) for document, row in sides]
        yardsticks = [rounds for document, row in sides if (rounds := _yardstick(document, row))]
        if len(yardsticks) < len(sides):
            old, new = (median_of(rounds, seed=seed) for seed, rounds in enumerate(pooled))
            return new.over(old).interval(LEVEL), None
        old, new = (
            ratio_of_rounds(rounds, yardstick, seed=seed)
            for seed, (rounds, yardstick) in enumerate(zip(pooled, yardsticks, strict=True))
        )
        before, after = (float(np.median(np.concatenate(rounds))) for rounds in yardsticks)
        return new.over(old).interval(LEVEL), after / before

    def _spreads(self) -> Iterator[float]:
        """What the A/A pairs differ by; 0 where there is none."""
        for document, row in zip(self._documents, self._rows, strict=True):
            again = _again(document, row)
            yield ab_spread(row.rounds, again).by_round if again else 0.0


def _verdict(ratio: Interval, noise: float, unit: str) -> Verdict:
    more: Verdict = "larger" if unit == "B" else "faster" if unit in _RATES else "slower"
    less: Verdict = "smaller" if unit == "B" else "slower" if unit in _RATES else "faster"
    if ratio.low > 1 and ratio.value > 1 + noise:
        return more
    if ratio.high < 1 and ratio.value < 1 / (1 + noise):
        return less
    return "same"


def _pooled(document: Document, row: Row) -> Rounds:
    """Its rounds, with those of the other half of the A/A pair."""
    again = _again(document, row)
    return tuple(one + other for one, other in zip(row.rounds, again, strict=True)) if again else row.rounds


def _again(document: Document, row: Row) -> Rounds | None:
    """The other half of the A/A pair, if this row is the first and both took the same turns."""
    if row.side != OURS:
        return None
    found = next((other for other in document.select(row.workload, AGAIN) if _alike(other, row)), None)
    usable = found is not None and found.status == "ok" and len(found.rounds) == len(row.rounds)
    return found.rounds if usable and found else None


def _yardstick(document: Document, row: Row) -> Rounds | None:
    """Seconds per operation of the matrix product that took turns with a row of seconds.

    Per operation: a side that looks for its machine's fastest shape need not find the same one twice.
    """
    found = _yardstick_row(document, row)
    if found is None:
        return None
    flops = float(found.figures.get("flops", 1.0))
    return tuple(tuple(seconds / flops for seconds in turn) for turn in found.rounds)


def _yardstick_row(document: Document, row: Row) -> Row | None:
    if row.unit != "s" or row.side == YARDSTICK[0]:
        return None
    for found in document.select(YARDSTICK[1], YARDSTICK[0]):
        same = found.figures.get("during") == row.workload and _alike(found, row)
        if same and found.status == "ok" and len(found.rounds) == len(row.rounds):
            return found
    return None


def _alike(one: Row, other: Row) -> bool:
    return one.unit == other.unit and _text(one.case) == _text(other.case)


def _by_key(document: Document) -> dict[Key, Row]:
    """Rows that are compared: not the second half of the A/A pair, not the yardstick."""
    return {
        (row.side, row.workload, _text(row.case), row.unit): row
        for row in document.rows
        if row.side not in (AGAIN, YARDSTICK[0])
    }


def _check(a: Document, b: Document, threshold: float) -> None:
    if not 0 < threshold < 1:
        raise UsageError(
            f"a threshold of {threshold}", expected="a share above 0 and below 1", fix="Try --threshold 0.05."
        )
    for what, old, new in (("verbs", a.benchmark, b.benchmark), ("models", a.model, b.model)):
        if _text(old) != _text(new):
            raise UsageError(
                f"the documents are of different {what}: {_text(old)} and {_text(new)}",
                expected="two measurements of the same",
                fix="Measure again as the other was: latentrt bench VERB MODEL --out FILE.",
            )


def _remarks(a: Document, b: Document) -> Iterator[str]:
    old, new = ({name: document.machine.get(name) for name in _FACTS} for document in (a, b))
    yield from _differences("machines", old, new)
    yield from _differences("settings", a.settings, b.settings)
    products = [row for document in (a, b) for row in document.select(YARDSTICK[1], YARDSTICK[0])]
    shapes = {_text(row.figures.get("shape")) for row in products}
    if len(shapes) > 1:
        yield f"the yardstick had other shapes, each with a rate of its own: {', '.join(sorted(shapes))}"
    rows = [
        (document, row)
        for document in (a, b)
        for row in document.select(side=OURS)
        if row.unit == "s" and row.rounds
    ]
    if any(_yardstick(document, row) is None for document, row in rows):
        yield "no yardstick for some rows: their ratio has the machine's own change in it"
    if any(_again(document, row) is None for document, row in rows):
        yield "no A/A pair for some rows: their noise is the threshold and the interval alone"


def _unclear(rows: Sequence[Compared]) -> Iterator[str]:
    """Where "same" is all that a short measurement can say."""
    for row in rows:
        if row.verdict == "same" and row.ratio and row.noise and row.ratio.half_width > row.noise:
            wide = f"{row.ratio.half_width:.1%}"
            yield f"{row.side}, {row.workload}: known within {wide} only; more rounds would say more"


def _differences(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        if _text(old.get(name)) != _text(new.get(name)):
            yield f"different {what}: {name} was {_text(old.get(name))}, is {_text(new.get(name))}"


def _facts(document: Document) -> dict[str, Any]:
    return {"date": document.date, "commit": document.machine.get("commit")}


def _named(facts: Mapping[str, Any]) -> str:
    return f"{facts['date']} ({facts['commit'] or 'no commit'})"


def _label(row: Row) -> str:
    return f"{row.side}, {row.workload}"


def _line(row: Compared, asked: str) -> str:
    head = f"{row.verdict:12}  {row.side}, {row.workload}{asked}"
    if row.ratio is None or row.noise is None:
        return f"{head}: {row.reason}"
    machine = "" if row.machine is None else f", machine x {row.machine:.2f} taken out"
    found = f"x {row.ratio.value:.3f} [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"
    return f"{head}: {found}, noise {row.noise:.1%}{machine}"


def _asked(case: Mapping[str, Any], rows: Sequence[Compared]) -> str:
    """What tells this row's case from the others'."""
    names = [name for name in case if len({_text(row.case.get(name)) for row in rows if row.case}) > 1]
    return "".join(f" {name}={case[name]}" for name in names)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
