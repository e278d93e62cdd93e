"""How the report writes numbers, and what it calls models, machines, cases and workloads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..records import Document

DASH = "–"
_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
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


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, never in exponential form; a dash for None or what is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(0, places)}f}"


def seconds(value: float | None) -> str:
    """`9.93 s`, `98.2 ms`, `12.3 µs`."""
    if not value or not math.isfinite(value):
        return "0 s" if value == 0 else DASH
    scale, unit = seconds_unit(value)
    return f"{number(value / scale)} {unit}"


def ratio(value: float) -> str:
    """`1.32`, and as many digits of what is larger: intervals are hardly ever narrower than a hundredth."""
    return f"{value:.2f}" if value < 9.995 else number(value)


def seconds_unit(value: float) -> tuple[float, str]:
    """The unit, in seconds, that a duration is best read in, and its name."""
    rounded = float(f"{abs(value):.2e}")
    return next(((scale, unit) for scale, unit in _SECONDS if rounded >= scale), _SECONDS[-1])


def amount(value: float | None, unit: str) -> str:
    """`7.16 GB`, `182 GFLOP/s`: powers of 1000."""
    if value is None or not math.isfinite(value):
        return DASH
    rounded = float(f"{abs(value):.2e}")
    scale, prefix = next(((scale, name) for scale, name in _SCALES if rounded >= scale), _SCALES[-1])
    return f"{number(value / scale)} {prefix}{unit}"


def round_amount(value: float, unit: str) -> str:
    """`50 GFLOP/s`, of a tick."""
    digits, _, name = amount(value, unit).partition(" ")
    return f"{float(digits):g} {name}"


def percent(value: float | None) -> str:
    """A fraction as `0.6 %`; what would be rounded to nothing is `<0.1 %`."""
    if value is None or not math.isfinite(value):
        return DASH
    return "<0.1 %" if 0 < abs(value) < 0.0005 else f"{100 * value:.1f} %"


def workload(name: str) -> str:
    """For people."""
    return _WORKLOADS.get(name, name.replace("_", " "))


def model(document: Document) -> str:
    """`sd15 (SD 1.x, fp32)`."""
    facts = document.model
    family = facts.get("family")
    details = [_FAMILIES.get(str(family), str(family)) if family else "", str(facts.get("dtype") or "")]
    inside = ", ".join(part for part in details if part)
    name = str(facts.get("name") or "unnamed model")
    return f"{name} ({inside})" if inside else name


def machine(document: Document) -> str:
    """The GPU, where there is one, and the processor with the cores that could be used."""
    facts = document.machine
    cpu = re.sub(r"\((?:R|TM)\)|\bCPU\b|@.*", "", str(facts.get("cpu") or "unknown processor"))
    cores = facts.get("cores")
    host = " ".join(cpu.split()) + (f", {cores} core{'s' if cores != 1 else ''}" if cores else "")
    gpu = facts.get("gpu")
    return f"{gpu['name']}; {host}" if gpu else host


def day(document: Document) -> str:
    """`22 Nov 2026`, in UTC; the text itself where it is no date."""
    found = re.match(r"(\d{4})-(\d\d)-(\d\d)", document.date)
    if not found or not 1 <= int(found[2]) <= 12:
        return document.date
    return f"{int(found[3])} {_MONTHS[int(found[2]) - 1]} {found[1]}"


def case(facts: Mapping[str, Any]) -> str:
    """`512×512, 20 steps, guidance 7.5, 4 pictures`, as far as it is known."""
    parts: list[str] = []
    if facts.get("width") and facts.get("height"):
        parts.append(f"{facts['width']}×{facts['height']}")
    if facts.get("steps"):
        parts.append(f"{facts['steps']} steps")
    if (scale := facts.get("guidance_scale")) is not None:
        parts.append(f"guidance {f'{float(scale):g}' if scale > 1 else 'off'}")
    if (pictures := facts.get("pictures")) and pictures > 1:
        parts.append(f"{pictures} pictures at once")
    return ", ".join(parts)


def about(document: Document, facts: Mapping[str, Any]) -> str:
    """A figure's second line: model, case, machine, date."""
    subject = ", ".join(part for part in (model(document), case(facts)) if part)
    return f"{subject} · {machine(document)} · {day(document)}"


def source(document: Document, name: str) -> str:
    """Where a figure's numbers are: the document, the commit, the release that was measured."""
    libraries: Mapping[str, Any] = document.machine.get("libraries") or {}
    known = {"latentrt": libraries.get("latentrt"), "commit": document.machine.get("commit")}
    return " · ".join([f"{name}.json", *(f"{what} {value}" for what, value in known.items() if value)])
