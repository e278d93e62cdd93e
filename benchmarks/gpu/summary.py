"""A document of the GPU check as a table in Markdown: the figures that matter, in the order they matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..records import Document, Row

FULL_SIZE = "SD 1.5"  # the large model, unless another is named
_STEP, _TORCH = "{model} UNet step", "SD 1.5 UNet step"
_NOTABLE = (
    "onnxruntime-gpu",
    "torch",
    "diffusers",
    "nvidia-cudnn-cu13",
    "tensorrt",
    "tensorrt-rtx",
    "latentrt",
)
WHOLE = ("process", "backend", "the step")  # rows of a step as a whole
Show = Callable[[Sequence[Row]], str]


def summary(document: Document) -> str:
    """What the document has of `_LINES`, for each backend that was checked, under what it was measured on."""
    backends = list(dict.fromkeys(str(row.case["backend"]) for row in document.rows))
    blocks = [_machine(document)]
    for backend in backends:
        rows = [row for row in document.rows if row.case["backend"] == backend]
        model = str(document.settings.get("full_size", FULL_SIZE))
        cells = {
            label.format(model=model): _cell(rows, step, what, show) for label, step, what, show in _LINES
        }
        lines = [f"| {label} | {cell} |" for label, cell in cells.items() if cell]
        blocks.append("\n".join([f"| {backend} | |", "|---|---|", *lines, *_failures(rows)]))
    return "\n\n".join(blocks)


def _machine(document: Document) -> str:
    machine: Mapping[str, Any] = document.machine
    gpu: Mapping[str, Any] = machine.get("gpu") or {}
    libraries: Mapping[str, Any] = machine.get("libraries", {})
    parts = [str(gpu.get("name", "no GPU")), f"driver {gpu.get('driver')}", f"CUDA {gpu.get('cuda')}"]
    parts += [f"{name} {libraries[name]}" for name in _NOTABLE if name in libraries]
    return f"{', '.join(parts)}; {document.date[:10]}, commit {machine.get('commit')}"


def _cell(rows: Sequence[Row], step: str, what: str, show: Show) -> str:
    found = [row for row in rows if row.workload == step]
    told = [row for row in found if _is(row, what) and (row.samples or row.figures)]
    shown = list[str]()
    with suppress(LookupError, ValueError):  # rows without these figures, of another release
        shown += [show(told)] if told else []
    bad = [row for row in found if row.status != "ok" and (_is(row, what) or row.case["what"] in WHOLE)]
    shown += dict.fromkeys(f"{row.status}: {row.reason}" for row in bad)
    return "; ".join(shown).replace("|", "\\|")


def _is(row: Row, what: str) -> bool:
    """Whether a row is of what was looked at, and not of the step's process."""
    return str(row.case["what"]).startswith(what) and row.case["what"] not in WHOLE


def _failures(rows: Sequence[Row]) -> list[str]:
    """Steps of which any row FAILED."""
    failed = list(dict.fromkeys(row.workload for row in rows if row.status == "FAILED"))
    return [f"| FAILED | {', '.join(failed)} |"] if failed else []


# ── what is shown of rows that are ok ────────────────────────────────────────────────────────────


def _times(rows: Sequence[Row]) -> str:
    row = rows[-1]
    parts = {"on the device": "device_p50_s", "of the host": "host_p50_s"}
    inside = [
        f"{1e3 * row.figures[name]:.2f} {where}" for where, name in parts.items() if name in row.figures
    ]
    first = [f"the first run {row.figures['first_s']:.2f} s"] if "first_s" in row.figures else []
    return f"{1e3 * row.summary['p50']:.2f} ms ({', '.join([*inside, *first])})"


def _seconds(rows: Sequence[Row]) -> str:
    return f"{rows[-1].summary['p50']:.3f} s"


def _arrival(rows: Sequence[Row]) -> str:
    return f"{rows[-1].stamp['at_s']:.1f} s from the start of the process"


def _decibels(rows: Sequence[Row]) -> str:
    worst = min(float(row.figures["psnr_db"]) for row in rows)
    return "identical" if worst == float("inf") else f"{worst:.1f} dB"


def _relative_l2(rows: Sequence[Row]) -> str:
    worst: dict[str, float] = {}
    for row in rows:
        name = str(row.case["what"]).partition(",")[0]
        worst[name] = max(float(row.figures.get("relative_l2", 0.0)), worst.get(name, 0.0))
    return ", ".join(f"{name} {value:.1e}" for name, value in worst.items()) + " (relative L2)"


def _figures(names: Mapping[str, str], unit: str) -> Show:
    def show(rows: Sequence[Row]) -> str:
        figures = rows[-1].figures
        told = {text: figures[name] for name, text in names.items() if figures.get(name) is not None}
        numbers = {text: f"{item:.4g}" if isinstance(item, float) else item for text, item in told.items()}
        return ", ".join(f"{text} {item} {unit}".strip() for text, item in numbers.items())

    return show


_MEMORY = {
    "opened_mib": "opened",
    "peak_mib": "at most",
    "closed_mib": "closed",
    "of_process_mib": "the process",
}
# what it is called, the step, how the row begins, and what is shown of it
_LINES: Sequence[tuple[str, str, str, Show]] = (
    (f"{_STEP}, replayed", "unet", "unet replayed", _times),
    (f"{_STEP}, not replayed", "unet", "unet plain", _times),
    (f"{_STEP}, layout `plain`", "unet_plain", "unet replayed", _times),
    (f"{_TORCH}, torch eager", "torch_eager", "unet", _times),
    (f"{_TORCH}, torch compiled", "torch_compiled", "unet", _times),
    ("demo picture against the CPU's", "picture", "picture", _decibels),
    ("demo nets against the CPU's", "parity", "", _relative_l2),
    ("demo picture, replayed against plain", "graphs", "", _decibels),
    ("demo pictures that share calls against alone", "sharing", "", _decibels),
    ("{model} picture, replayed against plain", "whole", "replayed pictures", _decibels),
    ("{model} first picture", "whole", "first picture", _arrival),
    ("{model} picture of 20 steps, replayed", "whole", "replayed pictures", _seconds),
    ("{model} picture of 20 steps, not replayed", "whole", "plain pictures", _seconds),
    ("{model} memory of the device", "whole", "memory", _figures(_MEMORY, "MiB")),
    ("{model} decoder", "decoder", "vae_decoder replayed", _times),
    ("{model} text encoder", "text_encoder", "text_encoder replayed", _times),
    ("another shape costs", "shapes", "guided, turn 3", _figures({"rebuilt_s": "the first run"}, "s more")),
    (
        "a graph outlives other shapes",
        "outlived",
        "replayed after another shape",
        _figures({"outlives": "the same values:"}, ""),
    ),
)
