"""Sections of the GPU check over pictures: right, replayed as drawn, no leak, how fast, beside whom."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from ...engines.spec import Array
from ...engines.tolerances import PICTURE_DB
from ...runtime.pipeline import Pipeline
from ..case import Case
from ..likeness import psnr
from ..process import SideError
from ..records import Row
from ..rounds import Pace
from ..verbs.latency import Sides, measure_latency
from .opener import Opened, Opener, Scale, attempt, judged, mebibytes, not_available, too_far

SAMPLERS = ("dpmpp_2m", "ddim", "euler_a")  # the last draws noise in every row
REPLAY_DB = 50.0  # the same kernels in the same order: a few shades by one, where a library sums atomically
FLAT = 8 * 2**20  # bytes of growth over all pictures: a leak in each run of the UNet is many times that
_WARM = 2  # runs: the first is plain, the second is captured
_REFUSED = "the loop is not captured: "
_STATM = Path("/proc/self/statm")
_PACE = Pace(runs=20, rounds=5, budget=15.0, warm_up=2)


def draw(pipe: Pipeline, case: Case) -> tuple[Array, float]:
    """Pictures (N, H, W, 3) uint8 and the seconds they took."""
    began = perf_counter()
    images = np.asarray(pipe(case.prompt, **case.parameters).images)
    return images, perf_counter() - began


def picture(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Three pictures at once, not square: three samplers, guidance on and off, against the CPU's."""
    with (
        Pipeline.open(opener.package.root, backend="onnxruntime", threads=scale.threads) as host,
        opener.pipeline() as opened,
    ):
        for sampler in SAMPLERS:
            for guidance in (scale.case.guidance_scale, 1.0):
                case = replace(scale.case, sampler=sampler, guidance_scale=guidance)
                case = replace(case, pictures=3, height=scale.short)
                what = f"{sampler} {'guided' if case.guided else 'unguided'}"
                yield attempt(what, partial(_picture, what, opened.pipe, host, case))


def _picture(what: str, pipe: Pipeline, host: Pipeline, case: Case) -> Row:
    wanted, host_s = draw(host, case)
    found, seconds = draw(pipe, case)
    likeness = psnr(found, wanted)
    problems = too_far(likeness, PICTURE_DB["fp16"])
    figures = {"psnr_db": likeness, "identical": bool(np.array_equal(found, wanted)), "cpu_seconds": host_s}
    return judged(what, problems, figures, [seconds])


def graphs(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Loops replayed as captured graphs draw what plain ones draw; the time of each, interleaved.

    Each run has a seed of its own, and noise in every row: a graph that replays yesterday's data shows.
    """
    with opener.pipeline("off") as plain, opener.pipeline("on") as replayed:
        for sampler in (SAMPLERS[0], SAMPLERS[-1]):
            yield attempt(sampler, partial(_graphs, sampler, plain, replayed, scale))


def _graphs(sampler: str, plain: Opened, replayed: Opened, scale: Scale) -> Row:
    launches, worst, same = replayed.device.launches, float("inf"), True
    plain_s: list[float] = []
    graph_s: list[float] = []
    for run in range(_WARM + scale.runs):
        case = replace(scale.timed, sampler=sampler, seed=100 + run)
        wanted, plain_took = draw(plain.pipe, case)
        found, graph_took = draw(replayed.pipe, case)
        worst, same = min(worst, psnr(found, wanted)), same and bool(np.array_equal(found, wanted))
        plain_s.append(plain_took)
        graph_s.append(graph_took)
    launches = replayed.device.launches - launches
    medians = {"plain_p50_s": median(plain_s[_WARM:]), "graph_p50_s": median(graph_s[_WARM:])}
    figures = {"psnr_db": worst, "identical": same, **medians, "launches": launches, "runs": scale.runs}
    problems: list[str] = []
    if worst < REPLAY_DB:
        problems.append(f"{worst:.1f} dB between plain and replayed, below {REPLAY_DB:g}")
    reasons = [line.removeprefix(_REFUSED) for line in replayed.log if line.startswith(_REFUSED)]
    if launches < scale.runs and not reasons:
        problems.append(f"the graph was launched in {launches} of {scale.runs} runs, and nothing says why")
    if launches < scale.runs and reasons and not problems:  # plain loops are what the loop falls back on
        return not_available(sampler, reasons[0], figures)
    return judged(sampler, problems, figures, graph_s[_WARM:])


def host_memory(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Plain loops draw many pictures, and the process's resident memory stays as it is."""
    if not _STATM.exists():
        yield not_available("pictures", "the system does not tell resident memory")
        return
    with opener.pipeline("off") as opened:
        for seed in range(max(scale.pictures // 5, 2)):  # arenas grow, and libraries compile
            draw(opened.pipe, replace(scale.case, seed=seed))
        size, resident = _process()
        for seed in range(scale.pictures):
            draw(opened.pipe, replace(scale.case, seed=seed))
        size, grown = _process()[0] - size, _process()[1] - resident
    problems = [f"{mebibytes(grown)} MiB more, which is over {mebibytes(FLAT)}"] if grown > FLAT else []
    figures = {
        "pictures": scale.pictures,
        "steps": scale.case.steps,
        "resident_mib": mebibytes(resident),
        "grown_mib": mebibytes(grown),
        "address_space_grown_mib": mebibytes(size),
    }
    yield judged("pictures", problems, figures)


def _process() -> tuple[int, int]:
    """Bytes of this process's address space, and of it what is resident."""
    size, resident = _STATM.read_text(encoding="ascii").split()[:2]
    page = os.sysconf("SC_PAGE_SIZE")
    return int(size) * page, int(resident) * page


def timing(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Seconds of one guided picture, and of its stages. Information: no time is too long."""
    with opener.pipeline("auto") as opened:
        yield attempt("one picture", lambda: _timing(opened, scale))


def _timing(opened: Opened, scale: Scale) -> Row:
    totals: list[float] = []
    stages: dict[str, list[float]] = {}
    for run in range(4 + scale.runs):  # "auto" has chosen after four
        case = replace(scale.timed, seed=run)
        began = perf_counter()
        result = opened.pipe(case.prompt, **case.parameters)
        if run >= 4:
            totals.append(perf_counter() - began)
            for name, seconds in result.seconds.items():
                stages.setdefault(name, []).append(seconds)
    figures = {
        "p50_s": float(np.percentile(totals, 50)),
        "p90_s": float(np.percentile(totals, 90)),
        "runs": scale.runs,
        "steps": scale.timed_steps,
        "size": f"{scale.case.width}x{scale.case.height}",
        "launches": opened.device.launches,
        "stages_p50_s": {name: median(seconds) for name, seconds in stages.items()},
        "log": list(opened.log),
    }
    return judged("one picture", [], figures, totals)


def peers(opener: Opener, scale: Scale) -> Iterator[Row]:
    """A picture beside the plain loop over the same library, in turns; what peers draw must be ours."""
    if not opener.peers:
        yield not_available("picture", f"no peer runs on {opener.task.backend}")
        return
    sides = Sides(task=opener.task, peers=opener.peers, references=())
    try:
        document = measure_latency(opener.package, sides, [scale.timed], workloads=["picture"], pace=_PACE)
    except SideError as error:  # ours cannot be opened
        yield judged("picture", [error.reason], {})
        return
    for row in document.rows:
        yield replace(row, workload=f"{row.workload} by {row.side}")
