"""A document as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .intervals import ab_spread, ratio_by_round
from .records import Document, Row
from .sides.contract import AGAIN, OURS

_COLUMNS = ("workload", "side", "p50", "p90", "p99", "n", "")
_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))
_BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_FIRST = ("of_best_gemm", "of_floor", "non_engine_share", "non_engine_s_per_step", "relative_l2", "psnr_db")
_NEVER = ("first_s", "max_error", "during", "axis")
_MOST = 4  # figures on a line


def lines(document: Document) -> list[str]:
    """A table of the rows, with what sides took in ratio to ours, and below it what failed."""
    rows = [row for row in document.rows if row.rounds]
    table = [_COLUMNS, *(_cells(document, row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [
        "  ".join([*map(str.ljust, cells[:2], widths), *map(str.rjust, cells[2:6], widths[2:]), cells[6]])
        for cells in table
    ]
    without = [
        f"{row.workload}, {row.side}: {', '.join(filter(None, (row.status, row.reason, _notes(row))))}"
        for row in document.rows
        if not row.rounds
    ]
    return [line.rstrip() for line in (*aligned, *without)]


def _cells(document: Document, row: Row) -> tuple[str, ...]:
    summary = row.summary
    values = [amount(summary[name], row.unit) for name in ("p50", "p90", "p99")]
    notes = [_against(document, row), _notes(row)]
    if row.status != "ok":
        notes.insert(0, f"{row.status}: {row.reason}")
    what = row.workload + case_note(row.case, (other.case for other in document.rows))
    return (what, row.side, *values, str(summary["n"]), "  ".join(filter(None, notes)))


def case_note(case: Mapping[str, Any], cases: Iterable[Mapping[str, Any]]) -> str:
    """What tells this case from the others: ` steps=20`."""
    known = [other for other in cases if other]
    names = [name for name in case if len({str(other.get(name)) for other in known}) > 1]
    return "".join(f" {name}={case[name]}" for name in names)


def _against(document: Document, row: Row) -> str:
    """The ratio to ours of the same workload and case; of our second half, how far the pair is apart."""
    if row.unit != "s" or row.side == OURS:
        return ""
    ours = next((item for item in document.select(row.workload, OURS) if item.case == row.case), None)
    if ours is None or len(ours.rounds) != len(row.rounds):
        return ""
    if row.side == AGAIN:
        return f"A/A spread {ab_spread(ours.rounds, row.rounds):.1%}"
    ratio = ratio_by_round(row.rounds, ours.rounds)
    return f"{ratio.value:.2f}x ours ({ratio.low:.2f} to {ratio.high:.2f})"


def _notes(row: Row) -> str:
    """The figures that matter most."""
    short = {name: value for name, value in row.figures.items() if isinstance(value, (int, float, str))}
    first = [name for name in _FIRST if name in short]
    names = [*first, *(name for name in short if name not in (*_FIRST, *_NEVER))][:_MOST]
    return "  ".join(
        f"{name} {short[name]:.3g}" if isinstance(short[name], float) else f"{name} {short[name]}"
        for name in names
    )


def amount(value: float, unit: str) -> str:
    """With a prefix that leaves one to three digits before the point."""
    if unit == "B":
        size, name = next((pair for pair in _BINARY if abs(value) >= pair[0]), _BINARY[-1])
        return f"{value / size:.1f} {name}"
    if unit != "s":
        return f"{value:.4g} {unit}"
    size, prefix = next((pair for pair in _PREFIXES if abs(value) >= pair[0]), _PREFIXES[-1])
    return f"{value / size:.3g} {prefix}s" if abs(value) < 999 else f"{value:.0f} s"
