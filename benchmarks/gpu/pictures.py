"""Sections of the GPU check that draw: right, replayed as drawn, no leak, how fast and beside whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from ...engines.tolerances import DECODED_DB, PICTURE_DB
from ...runtime.pipeline import Pipeline
from ..case import Case
from ..likeness import psnr
from ..machine import resident_bytes
from ..records import Row
from ..rounds import Pace
from ..sides.contract import SIDES
from ..verbs.latency import Sides, measure_latency
from ..verbs.parity import Inputs, Reference, measure_parity
from .opener import Opened, Opener, Scale, attempt, draw, mebibytes, row_of, start_of

SAMPLERS = ("dpmpp_2m", "ddim", "euler_a")  # the last draws noise in every row
REPLAY_DB = 50.0  # the same kernels in the same order: a few shades by one, where a library sums atomically
FLAT = 8 * 2**20  # bytes of growth over all pictures: a leak in each run of the UNet is many times that
_WARM = 2  # runs: the first is plain, the second is captured
_REFUSED = "the loop is not captured: "
_PACE = Pace(runs=20, rounds=5, budget=15.0, warm_up=2)


def parity(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Single nets, for one guided picture and for three that are not square, against the CPU's."""
    for row in _against_the_cpu(opener, cases=(scale.case, scale.several), samplers=()):
        # One net makes a picture of the same latent: that is held to more than a whole generation.
        likeness, bar = row.figures.get("psnr_db", 0.0), DECODED_DB[opener.package.manifest.dtype]
        if row.unit == "dB" and row.status == "ok" and likeness < bar:
            row = replace(row, status="FAILED", reason=f"{likeness:.1f} dB, below {bar:g}")
        yield row


def picture(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Three pictures at once, not square: three samplers, guidance on and off; and one from a picture."""
    cases = scale.several, replace(scale.several, guidance_scale=1.0)
    yield from _against_the_cpu(opener, cases=cases, nets=(), samplers=SAMPLERS)
    with (
        Pipeline.open(opener.package.root, backend="onnxruntime", threads=opener.task.threads) as host,
        opener.pipeline() as opened,
    ):
        yield attempt("from a picture", _from_a_picture, opened.pipe, host, scale.case)


def _against_the_cpu(opener: Opener, **inputs: Any) -> Iterator[Row]:
    """The rows of `latentrt bench parity`; the reference is the plain loop over ONNX Runtime."""
    reference = Reference.of(opener.task, "onnxruntime")
    wanted = Inputs(samples=1, **inputs)
    for row in measure_parity(opener.package, opener.task, wanted, reference=reference).rows:
        names = ("sampler", "width", "height", "pictures", "guidance_scale")
        what = [f"{name} {row.case[name]}" for name in names if name in row.case]
        yield replace(row, workload=", ".join([row.workload, *what]))


def _from_a_picture(what: str, pipe: Pipeline, host: Pipeline, case: Case) -> Row:
    start, bar = start_of(pipe.package, case), PICTURE_DB[pipe.package.manifest.dtype]
    if not start:
        return row_of(what, missing="the package has no encoder of pictures")
    likeness = psnr(draw(pipe, case, **start)[0], draw(host, case, **start)[0])
    problems = [] if likeness >= bar else [f"{likeness:.1f} dB, below {bar:g}"]
    return row_of(what, {"psnr_db": likeness}, problems)


def graphs(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Loops replayed as captured graphs draw what plain ones draw; the time of each, interleaved.

    Each run has a seed of its own, and noise in every row: a graph that replays yesterday's data shows.
    """
    with opener.pipeline("off") as plain, opener.pipeline("on") as replayed:
        for sampler in (SAMPLERS[0], SAMPLERS[-1]):
            yield attempt(sampler, _graphs, plain, replayed, scale)


def _graphs(sampler: str, plain: Opened, replayed: Opened, scale: Scale) -> Row:
    before, worst, same = replayed.device.launches, float("inf"), True
    plain_s: list[float] = []
    graph_s: list[float] = []
    for run in range(_WARM + scale.runs):
        case = replace(scale.case, sampler=sampler, seed=100 + run)
        wanted, plain_took = draw(plain.pipe, case)
        found, graph_took = draw(replayed.pipe, case)
        worst, same = min(worst, psnr(found, wanted)), same and bool(np.array_equal(found, wanted))
        plain_s.append(plain_took)
        graph_s.append(graph_took)
    launches = replayed.device.launches - before
    figures = {
        "psnr_db": worst,
        "identical": same,
        "plain_p50_s": median(plain_s[_WARM:]),
        "graph_p50_s": median(graph_s[_WARM:]),
        "launches": launches,
        "runs": scale.runs,
    }
    if worst < REPLAY_DB:
        problem = f"{worst:.1f} dB between plain and replayed, below {REPLAY_DB:g}"
        return row_of(sampler, figures, [problem])
    if launches < scale.runs:  # plain loops are what the loop falls back on, and it says why
        for line in replayed.log:
            if line.startswith(_REFUSED):
                return row_of(sampler, figures, missing=line.removeprefix(_REFUSED))
        problem = f"the graph was launched in {launches} of {scale.runs} runs, and nothing says why"
        return row_of(sampler, figures, [problem])
    return row_of(sampler, figures, samples=graph_s[_WARM:])


def host_memory(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Plain loops draw many pictures, and the process's resident memory stays as it is."""
    if not resident_bytes()[0]:
        yield row_of("pictures", missing="the system does not tell resident memory")
        return
    with opener.pipeline("off") as opened:
        for seed in range(max(scale.pictures // 5, 2)):  # arenas grow, and libraries compile
            draw(opened.pipe, replace(scale.case, seed=seed))
        before = resident_bytes()[0]
        for seed in range(scale.pictures):
            draw(opened.pipe, replace(scale.case, seed=seed))
        grown = resident_bytes()[0] - before
    problems = [f"{mebibytes(grown)} MiB more, which is over {mebibytes(FLAT)}"] if grown > FLAT else []
    figures = {"pictures": scale.pictures, "steps": scale.case.steps}
    sizes = {"resident_mib": mebibytes(before), "grown_mib": mebibytes(grown)}
    yield row_of("pictures", {**figures, **sizes}, problems)


def timing(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Seconds of one guided picture, in turns with the plain loop over the same library, if there is one.

    The rows are those of `latentrt bench latency`: what the peer draws must be ours, and no time is too long.
    """
    backend = opener.task.backend
    sides = Sides(task=opener.task, peers=(backend,) if backend in SIDES else (), references=())
    case = replace(scale.case, steps=scale.steps)
    document = measure_latency(opener.package, sides, [case], workloads=["picture"], pace=_PACE)
    for row in document.rows:
        yield replace(row, workload=f"{row.workload} by {row.side}")
