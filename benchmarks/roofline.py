"""How far a row is from what the machine can do: floors of the nets' work, by ceilings of the same run.

The roofline model: no less time than FLOPs over the best rate of a matmul, nor than bytes over the rate of a
copy (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009). It assumes that convolutions are direct,
and that no cache outlives a net's call. A fraction above 1 is possible, then, and says which of the two does
not hold: Winograd's convolution, or weights that fit the last cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from ..engines.package import Package
from ..engines.spec import TEXT_ENCODERS
from ..runtime.request.request import make_request
from ..runtime.sampling.samplers import make_table
from .case import Case, rows_per_step, sizes_of
from .records import Row
from .sides.contract import CEILING
from .work import Work, net_work

GEMM, COPY = "gemm", "copy"  # the workloads of the ceiling
_UNITS = {GEMM: "flop", COPY: "byte"}
# The nets that a workload calls once.
_NETS = {
    "text_encoder": ("text_encoder",),
    "invariants": ("unet_context", "unet_time"),
    "unet": ("unet",),
    "vae_decoder": ("vae_decoder",),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """`calls` calls of one net."""

    work: Work
    calls: int = 1


Parts = tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least seconds that some parts take one after the other.

    Attributes:
        compute_s: FLOPs over the best rate of a matmul.
        bytes_s: least bytes over the rate of a copy.
        floor_s: the larger of the two, net by net.
        layers_s: the larger of the two, layer by layer: each is one kernel, and elementwise work is free.
    """

    compute_s: float
    bytes_s: float
    floor_s: float
    layers_s: float


def workload_parts(package: Package, workload: str, case: Case) -> Parts:
    """What a run of a workload (`case.WORKLOADS`) calls; empty for one that calls no net.

    It is the same for every side: a side that does more, such as the same keys and values in every step, is
    further from the floor for it.

    Raises:
        LatentrtError: whatever `net_work` raises, or SamplerError for the case's sampler.
    """
    manifest = package.manifest
    sizes = sizes_of(case, manifest)

    def part(net: str, calls: int = 1, **changes: int) -> Part:
        return Part(work=net_work(package, net, {**sizes, **changes}), calls=calls)

    if workload in _NETS:
        return tuple(map(part, _NETS[workload]))
    if workload != "picture":
        return ()
    # Texts are encoded once, however many pictures; Heun and DPM2 call the UNet twice in a step.
    request = make_request(manifest, case.prompt, **case.parameters)
    rows = len(make_table(request.sampler, case.steps))
    return (
        *(part(net) for net in TEXT_ENCODERS if net in manifest.nets),
        part("unet_context", B=sizes["P"]),
        part("unet_time", S=rows * rows_per_step(case, manifest)),
        part("unet", calls=rows),
        part("vae_decoder"),
    )


def floor(parts: Parts, *, flop_per_s: float, byte_per_s: float) -> Floor:
    """The floors of some parts on a machine with these ceilings."""

    def least(flops: int, size: int) -> tuple[float, float]:
        return flops / flop_per_s, size / byte_per_s

    nets = [(part.calls, least(part.work.flops, part.work.least_bytes)) for part in parts]
    layers = [(part.calls, least(layer.flops, layer.bytes)) for part in parts for layer in part.work.layers]
    return Floor(
        compute_s=sum(calls * compute for calls, (compute, _) in nets),
        bytes_s=sum(calls * moving for calls, (_, moving) in nets),
        floor_s=sum(calls * max(pair) for calls, pair in nets),
        layers_s=sum(calls * max(pair) for calls, pair in layers),
    )


def with_roofline(rows: Sequence[Row], parts: Parts) -> tuple[Row, ...]:
    """Rows of one workload and case, and those of the ceilings that took turns with them, with more figures.

    Each side's row in seconds gets

        flops, bytes         of one run: `Work.flops` and `Work.least_bytes`
        flop_per_s           at the median
        of_best_gemm         that, over the rate of the best matmul
        floor_compute_s, floor_bytes_s, floor_s, floor_layers_s    see Floor; ceilings at their medians
        of_floor             floor_s over the time

    and a ceiling's own row, whose figures have the `flops` or `bytes` of a run, `flop_per_s` or `byte_per_s`.
    The two ratios are medians over rounds where both sides have as many: a slow minute then falls on both
    and leaves their ratio. What no ceiling was measured for is left out.

    Args:
        rows: rows that are not "ok", or not in seconds, stay as they are.
        parts: `workload_parts` of that workload and case.
    """
    ceilings = {row.workload: row for row in rows if row.side == CEILING and _counts(row)}
    return tuple(_with_figures(row, parts, ceilings) if _counts(row) else row for row in rows)


def _counts(row: Row) -> bool:
    return row.status == "ok" and row.unit == "s" and bool(row.samples)


def _with_figures(row: Row, parts: Parts, ceilings: Mapping[str, Row]) -> Row:
    found: dict[str, Any] = {}
    if row.side == CEILING:
        found = {f"{_UNITS[row.workload]}_per_s": _amount(row) / row.summary["p50"]}
    elif parts:
        found = _figures(row, parts, ceilings.get(GEMM), ceilings.get(COPY))
    return replace(row, figures={**row.figures, **found})


def _amount(ceiling: Row) -> float:
    """FLOPs or bytes of one run."""
    return float(ceiling.figures[f"{_UNITS[ceiling.workload]}s"])


def _figures(row: Row, parts: Parts, gemm: Row | None, copy: Row | None) -> dict[str, Any]:
    flops = sum(part.calls * part.work.flops for part in parts)
    size = sum(part.calls * part.work.least_bytes for part in parts)
    found: dict[str, Any] = {"flops": flops, "bytes": size, "flop_per_s": flops / row.summary["p50"]}
    if gemm:
        per_run = flops / _amount(gemm)
        found["of_best_gemm"] = median(per_run * ceiling / own for own, ceiling in _turns(row, gemm))
        found["floor_compute_s"] = per_run * gemm.summary["p50"]
    if copy:
        found["floor_bytes_s"] = size / _amount(copy) * copy.summary["p50"]
    if gemm and copy:
        work, moved = _amount(gemm), _amount(copy)

        def at(gemm_s: float, copy_s: float) -> Floor:
            return floor(parts, flop_per_s=work / gemm_s, byte_per_s=moved / copy_s)

        whole = at(gemm.summary["p50"], copy.summary["p50"])
        shares = [at(gemm_s, copy_s).floor_s / own for own, gemm_s, copy_s in _turns(row, gemm, copy)]
        found |= {"floor_s": whole.floor_s, "floor_layers_s": whole.layers_s, "of_floor": median(shares)}
    return found


def _turns(*rows: Row) -> list[tuple[float, ...]]:
    """The rows' medians, round by round; over all rounds where they do not have as many."""
    if len({len(row.rounds) for row in rows}) == 1 and all(turn for row in rows for turn in row.rounds):
        return [tuple(map(median, turns)) for turns in zip(*(row.rounds for row in rows), strict=True)]
    return [tuple(row.summary["p50"] for row in rows)]
