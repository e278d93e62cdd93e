"""`latentrt bench compare`: two documents, row by row: slower, faster or the same, beyond the noise.

The documents are from different minutes, and a shared machine can be half as fast a minute later. So what is
compared is not seconds but how many times as long as a yardstick a run took, which ran next to it in the
same process and which no change of ours touches (`sides/yardstick.py`, rows of the side "yardstick"): the
median of those ratios, of both halves of the A/A pair, so that one process's luck with memory counts half.
Where a run is so long, or on a device, that there is none, the matmul of the ceiling stands in, which took
turns with it.

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
from ..intervals import LEAST, Estimate, Interval, ab_spread, median_of, ratio_of_rounds
from ..printing import case_note
from ..records import Document, Rounds, Row
from ..roofline import GEMM
from ..sides.contract import AGAIN, CEILING, OURS, REFERENCES, YARDSTICK

THRESHOLD = 0.05
LEVEL = 0.99  # a document has several rows: of 0.95, one in ten documents would have a row that is wrong
# A change for the worse, for the better, or neither; a row that worked before; a row without a time in both.
Verdict = Literal["slower", "faster", "larger", "smaller", "same", "FAILED", "not compared"]
_WORSE = ("slower", "larger", "FAILED")
_RATES = ("1/s", "FLOP/s", "B/s")  # more is better


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One row of both documents.

    Attributes:
        before, after: p50 of each, as measured.
        ratio: after / before; of seconds, the machine's own change is taken out where both documents have a
            yardstick or a matmul.
        machine: the yardstick's or the matmul's after / before; None without one.
        noise: what a change has to be larger than, beside its interval: 0.05 is 5 %.
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
        before, after: date of each, and commit where it is known.
        rows: those in both.
        only_before, only_after: side and workload of those in one.
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

    @property
    def compared(self) -> bool:
        """Whether any row has a verdict."""
        return any(row.verdict != "not compared" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "regressed": self.regressed, "compared": self.compared}

    def format(self) -> str:
        """A line for each row, then remarks and the rows of one document alone."""
        lines = [f"{_named(self.before)} -> {_named(self.after)}"]
        lines += [_line(row, case_note(row.case, (other.case for other in self.rows))) for row in self.rows]
        lines += [f"only before: {name}" for name in self.only_before]
        lines += [f"only after: {name}" for name in self.only_after]
        if not self.compared:
            lines.append("nothing was compared: no row of both documents has a time, a size or a rate")
        return "\n".join([*lines, *self.remarks])


def compare(a: Document, b: Document, *, threshold: float = THRESHOLD) -> Comparison:
    """What changed from document `a` to document `b`; `threshold` is the smallest change that counts.

    Raises:
        UsageError: documents of different verbs, models or machines, or a threshold that is none.
    """
    _check(a, b, threshold)
    before, after = _by_key(a), _by_key(b)
    rows = [_compared((a, b), (before[key], after[key]), threshold) for key in before if key in after]
    return Comparison(
        before=_facts(a),
        after=_facts(b),
        rows=tuple(rows),
        only_before=tuple(f"{row.side}, {row.workload}" for key, row in before.items() if key not in after),
        only_after=tuple(f"{row.side}, {row.workload}" for key, row in after.items() if key not in before),
        remarks=(*_remarks(a, b), *_unclear(rows)),
        threshold=threshold,
    )


def _check(a: Document, b: Document, threshold: float) -> None:
    if not 0 < threshold < 1:
        raise UsageError(
            f"a threshold of {threshold}", expected="a share above 0 and below 1", fix="Try --threshold 0.05."
        )
    same = {
        "verbs": (a.benchmark, b.benchmark),
        "models": (a.model, b.model),
        "machines": (_hardware(a.machine), _hardware(b.machine)),
    }
    for what, (old, new) in same.items():
        if _text(old) != _text(new):
            raise UsageError(
                f"the documents are of different {what}: {_text(old)} and {_text(new)}",
                expected="two measurements of the same",
                fix="Measure again as the other was: latentrt bench VERB MODEL --out FILE.",
            )


def _hardware(machine: Mapping[str, Any]) -> list[Any]:
    """What makes two machines different ones: processor, usable cores, GPU."""
    gpu = machine.get("gpu")
    return [machine.get("cpu"), machine.get("cores"), gpu.get("name") if gpu else None]


def _by_key(document: Document) -> dict[tuple[str, ...], Row]:
    """Rows that are compared: not the second half of the A/A pair, not the yardstick."""
    return {
        (row.side, row.workload, _text(row.case), row.unit): row
        for row in document.rows
        if row.side not in REFERENCES
    }


# ── one row ────────────────────────────────────────────────────────────────────────────────────────


def _compared(documents: tuple[Document, Document], rows: tuple[Row, Row], threshold: float) -> Compared:
    old, new = rows
    facts: dict[str, Any] = {name: getattr(new, name) for name in ("side", "workload", "case", "unit")}
    if old.status == "ok" and new.status == "FAILED":
        return Compared(**facts, verdict="FAILED", reason=new.reason)
    if reason := _incomparable(old, new):
        return Compared(**facts, verdict="not compared", reason=reason)
    sides = list(zip(documents, rows, strict=True))
    ratio, machine = _ratio(sides)
    noise = max(threshold, *(_spread(*side) for side in sides))
    return Compared(
        **facts,
        verdict=_verdict(ratio, noise, new.unit),
        before=old.summary["p50"],
        after=new.summary["p50"],
        ratio=ratio,
        machine=machine,
        noise=noise,
    )


def _incomparable(old: Row, new: Row) -> str:
    """Why no ratio of two rows would say anything; empty if it would."""
    for row, when in ((old, "before"), (new, "after")):
        if row.status != "ok":
            return f"{when}: {row.reason or row.status}"
        if not row.samples:
            return f"no samples {when}"
    if new.unit not in ("s", "B", *_RATES):
        return f"in {new.unit}: its status says whether it is good enough"
    if min(*old.samples, *new.samples) <= 0:
        return "a sample is not above zero"
    rounds = min(len(old.rounds), len(new.rounds))
    if new.unit != "B" and rounds < LEAST:  # memory does not drift
        return f"{rounds} rounds, and less than {LEAST} have no interval: --budget gives more"
    return ""


def _verdict(ratio: Interval, noise: float, unit: str) -> Verdict:
    more: Verdict = "larger" if unit == "B" else "faster" if unit in _RATES else "slower"
    less: Verdict = "smaller" if unit == "B" else "slower" if unit in _RATES else "faster"
    if ratio.low > 1 and ratio.value > 1 + noise:
        return more
    if ratio.high < 1 and ratio.value < 1 / (1 + noise):
        return less
    return "same"


def _ratio(sides: Sequence[tuple[Document, Row]]) -> tuple[Interval, float | None]:
    """After / before, and the machine's; over the yardstick, else over the matmul, else as measured."""
    for measure in (_over_yardstick, _over_matmul):
        old, new = (measure(document, row, seed) for seed, (document, row) in enumerate(sides))
        if old and new:
            return new[0].over(old[0]).interval(LEVEL), new[1] / old[1]
    old, new = (median_of(_pooled(*side), seed=seed) for seed, side in enumerate(sides))
    return new.over(old).interval(LEVEL), None


def _over_yardstick(document: Document, row: Row, seed: int) -> tuple[Estimate, float] | None:
    """How many times as long as the yardstick our row took, and the yardstick's own seconds."""
    if halves := _beside_yardstick(document, row):
        rounds = _together([half.rounds for half in halves])
        return median_of(rounds, seed=seed), median(float(half.figures["yardstick_p50_s"]) for half in halves)
    return None


def _over_matmul(document: Document, row: Row, seed: int) -> tuple[Estimate, float] | None:
    """The same over the matmul's seconds per operation: a fastest shape may not be the same again."""
    if matmul := _matmul(document, row):
        flops = float(matmul.figures.get("flops", 1.0))
        rounds = tuple(tuple(seconds / flops for seconds in turn) for turn in matmul.rounds)
        return ratio_of_rounds(_pooled(document, row), rounds, seed=seed), matmul.summary["p50"] / flops
    return None


def _spread(document: Document, row: Row) -> float:
    """What the A/A pair differs by; 0 where there is none."""
    halves = [half.summary["p50"] for half in _beside_yardstick(document, row)]
    if len(halves) == 2:
        return abs(halves[0] / halves[1] - 1)
    again = _again(document, row)
    return ab_spread(row.rounds, again.rounds) if again else 0.0


def _beside_yardstick(document: Document, row: Row) -> list[Row]:
    """The rows that tell how many times as long as the yardstick ours took, of each half of the A/A pair."""
    if row.unit != "s" or row.side != OURS:
        return []
    return [other for other in _counting(document, row, YARDSTICK) if other.rounds]


def _matmul(document: Document, row: Row) -> Row | None:
    """The ceiling's, that took turns with a row of seconds."""
    if row.unit != "s" or row.side in REFERENCES:
        return None
    found = _counting(document, row, CEILING, GEMM)
    return next((it for it in found if it.figures.get("during") == row.workload and _in_turns(it, row)), None)


def _again(document: Document, row: Row) -> Row | None:
    """The other half of the A/A pair, if this row is the first and both took the same turns."""
    found = _counting(document, row, AGAIN) if row.side == OURS else ()
    return next((other for other in found if _in_turns(other, row)), None)


def _counting(document: Document, row: Row, side: str, workload: str = "") -> Iterator[Row]:
    """Rows of a side that count, of the same case, and of the same workload unless another is named."""
    for other in document.select(workload or row.workload, side):
        if other.status == "ok" and _text(other.case) == _text(row.case):
            yield other


def _in_turns(one: Row, other: Row) -> bool:
    return one.unit == other.unit and len(one.rounds) == len(other.rounds)


def _pooled(document: Document, row: Row) -> Rounds:
    """Its rounds, with those of the other half of the A/A pair."""
    again = _again(document, row)
    return _together([row.rounds, again.rounds]) if again else row.rounds


def _together(halves: Sequence[Rounds]) -> Rounds:
    """Round by round; of halves with other numbers of rounds only as many as both have."""
    return tuple(sum(turns, ()) for turns in zip(*halves, strict=False))


# ── words ──────────────────────────────────────────────────────────────────────────────────────────


def _remarks(a: Document, b: Document) -> Iterator[str]:
    systems = ({name: item.machine.get(name) for name in ("system", "python")} for item in (a, b))
    yield from _differences("systems", *systems)
    yield from _differences("settings", a.settings, b.settings)
    yield from _differences("versions", *(_versions(document) for document in (a, b)))
    ours = [(document, row) for document in (a, b) for row in document.select(side=OURS)]
    matmuls = [_matmul(document, row) for document, row in ours if not _beside_yardstick(document, row)]
    shapes = {_text(row.figures.get("shape")) for row in matmuls if row}
    if len(shapes) > 1:
        yield f"the matmul had other shapes, each with a rate of its own: {', '.join(sorted(shapes))}"
    timed = [(document, row) for document, row in ours if row.unit == "s" and row.rounds]
    if not all(_beside_yardstick(document, row) or _matmul(document, row) for document, row in timed):
        yield "no yardstick for some rows: their ratio has the machine's own change in it"
    if any(_again(document, row) is None for document, row in timed):
        yield "no A/A pair for some rows: their noise is the threshold and the interval alone"


def _versions(document: Document) -> Mapping[str, Any]:
    """What did our work: the backend, and the layouts of its nets."""
    for row in document.select(side=OURS):
        if "side" in row.stamp:
            return row.stamp["side"]
    return {}


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
    """An installed package knows no commit."""
    commit = document.machine.get("commit")
    return {"date": document.date, **({"commit": commit} if commit else {})}


def _named(facts: Mapping[str, Any]) -> str:
    return f"{facts['date']} ({facts['commit']})" if "commit" in facts else str(facts["date"])


def _line(row: Compared, note: str) -> str:
    head = f"{row.verdict:12}  {row.side}, {row.workload}{note}"
    if row.ratio is None or row.noise is None:
        return f"{head}: {row.reason}"
    machine = "" if row.machine is None else f", machine x {row.machine:.2f} taken out"
    ratio = f"x {row.ratio.value:.3f} [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"
    return f"{head}: {ratio}, noise {row.noise:.1%}{machine}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
