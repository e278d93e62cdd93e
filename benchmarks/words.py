"""How numbers, cases, models and machines are written, in the report and in a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from .intervals import Interval, ab_spread, ratio_by_round
from .records import Document, Row
from .sides.contract import AGAIN, OURS

DASH = "–"
_SECONDS = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
_WORKLOADS = {  # all others are their names without underscores
    "unet": "UNet step",
    "update": "guidance + update",
    "vae_decoder": "VAE decoder",
    "picture": "whole picture",
    "vae_encoder": "VAE encoder",
    "unet_context": "UNet: context",
    "unet_time": "UNet: time",
    "unet_whole": "UNet, uncut",
    "step": "update",
    "step_masked": "update, masked",
}
# The figures that a terminal shows.
_SHOWN = (
    *("of_best_gemm", "of_floor", "non_engine_share", "non_engine_s_per_step"),
    *("relative_l2", "psnr_db", "ssim", "over_weights", "growth_per_step", "samples_per_s"),
    *("slope", "intercept", "residual", "peak_rss_gb", "engine_mb", "flop_per_s", "byte_per_s"),
    *("requests_per_s", "in_time_per_s", "refused", "mean_rows"),
)


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, never in exponential form; a dash for None."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(0, places)}f}"


def scale(value: float, unit: str) -> tuple[float, str]:
    """The multiple of a unit that a value is best read in, and its name: 1e-3 and `ms`; powers of 1000."""
    rounded = float(f"{abs(value):.2e}")
    scales = _SECONDS if unit == "s" else _SCALES
    size, prefix = next(((size, prefix) for size, prefix in scales if rounded >= size), scales[-1])
    return size, f"{prefix}{unit}"


def amount(value: float | None, unit: str) -> str:
    """`7.16 GB`, `182 GFLOP/s`, `98.2 ms`; a dash for None."""
    if not value:
        return DASH if value is None else f"0 {unit}"
    size, name = scale(value, unit)
    return f"{number(value / size)} {name}"


def seconds(value: float | None) -> str:
    """`9.93 s`, `98.2 ms`, `12.3 µs`."""
    return amount(value, "s")


def ratio(value: float, places: int = 2) -> str:
    """`1.32`, and as many digits of what is larger: intervals are hardly ever narrower than a hundredth."""
    return f"{value:.{places}f}" if value < 9.995 else number(value, places + 1)


def interval(found: Interval, places: int = 2) -> str:
    """`[1.28, 1.61]`."""
    return f"[{ratio(found.low, places)}, {ratio(found.high, places)}]"


def percent(value: float | None) -> str:
    """A fraction as `0.6 %`; what would be rounded to nothing is `<0.1 %`."""
    if value is None:
        return DASH
    return "<0.1 %" if 0 < abs(value) < 0.0005 else f"{100 * value:.1f} %"


def workload(name: str) -> str:
    """For people."""
    return _WORKLOADS.get(name, name.replace("_", " "))


def model(document: Document) -> str:
    """`sd15 (SD 1.x, fp32)`, `sd15 (SD 1.x, fp32, UNet in int8)`."""
    facts = document.model
    family = facts.get("family", "")
    rounded = f"UNet in {facts['format']}" if "format" in facts else ""
    inside = ", ".join(filter(None, (_FAMILIES.get(family, family), facts.get("dtype"), rounded)))
    name = facts.get("name", "unnamed model")
    return f"{name} ({inside})" if inside else name


def machine(document: Document) -> str:
    """The GPU, where there is one, and the processor with the cores that could be used."""
    facts = document.machine
    cpu = re.sub(r"\((?:R|TM)\)|\bCPU\b|@.*", "", facts["cpu"])
    host = f"{' '.join(cpu.split())}, {facts['cores']} core{'s' if facts['cores'] != 1 else ''}"
    return f"{facts['gpu']['name']}; {host}" if facts["gpu"] else host


def day(document: Document) -> str:
    """`22 Nov 2026`, in UTC."""
    date = datetime.fromisoformat(document.date)
    return f"{date.day} {date:%b %Y}"


def case(facts: Mapping[str, Any]) -> str:
    """`512×512, 20 steps, guidance 7.5, 4 pictures at once`, as far as it is known."""
    parts: list[str] = []
    if "width" in facts:
        parts.append(f"{facts['width']}×{facts['height']}")
    if "steps" in facts:
        parts.append(f"{facts['steps']} steps")
    if (guidance := facts.get("guidance_scale")) is not None:
        parts.append(f"guidance {f'{guidance:g}' if guidance > 1 else 'off'}")
    if (pictures := facts.get("pictures", 1)) > 1:
        parts.append(f"{pictures} pictures at once")
    return ", ".join(parts)


def case_note(facts: Mapping[str, Any], cases: Iterable[Mapping[str, Any]]) -> str:
    """What tells this case from the others: ` steps=20`."""
    known = [other for other in cases if other]
    names = [name for name in facts if len({str(other.get(name)) for other in known}) > 1]
    return "".join(f" {name}={facts[name]}" for name in names)


# ── a document as lines for a terminal ─────────────────────────────────────────────────────────────


def lines(document: Document) -> list[str]:
    """A table of the rows, with what sides took in ratio to ours, and below it what failed."""
    table: list[tuple[str, ...]] = [("workload", "side", "p50", "p90", "p99", "n", "")]
    without: list[str] = []
    for row in document.rows:
        problem = "" if row.status == "ok" else f"{row.status}: {row.reason}"
        figures = (
            f"{name} {float(row.figures[name]):.3g}" for name in _SHOWN if row.figures.get(name) is not None
        )
        notes = "  ".join(filter(None, (problem, _against(document, row), *figures)))
        if not row.rounds:
            without.append(f"{row.workload}, {row.side}: {notes or row.status}")
            continue
        what = row.workload + case_note(row.case, (other.case for other in document.rows))
        times = (_sample(row.summary[name], row.unit) for name in ("p50", "p90", "p99"))
        table.append((what, row.side, *times, str(row.summary["n"]), notes))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [
        "  ".join([*map(str.ljust, cells[:2], widths), *map(str.rjust, cells[2:6], widths[2:]), cells[6]])
        for cells in table
    ]
    return [line.rstrip() for line in (*aligned, *without)]


def _sample(value: float, unit: str) -> str:
    return amount(value, unit) if unit in ("s", "B") else f"{value:.4g} {unit}"


def _against(document: Document, row: Row) -> str:
    """The ratio to ours of the same workload and case; of our second half, how far the pair is apart."""
    ours = document.beside(row, OURS) if row.unit == "s" and row.side != OURS else None
    if ours is None:
        return ""
    if row.side == AGAIN:
        return f"A/A spread {percent(ab_spread(ours.rounds, row.rounds))}"
    found = ratio_by_round(row.rounds, ours.rounds)
    return f"{ratio(found.value)}x ours {interval(found)}"
