"""Of the GPU check: pictures against the CPU's, replayed loops against plain ones, and how long they take."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ...engines.spec import Array
from ...engines.tolerances import PICTURE_DB
from ...runtime.pipeline import Pipeline
from ..likeness import psnr
from .opener import PROMPT, Opened, Opener, Scale
from .rows import Row, attempt, judged

SAMPLERS = ("dpmpp_2m", "ddim", "euler_a")  # the last draws noise in every row
REPLAY_DB = 50.0  # the same kernels in the same order: a few shades by one, where a library sums atomically
_WARM = 2  # runs: the first is plain, the second is captured
_REFUSED = "the loop is not captured: "


def picture(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Three pictures at once, not square: three samplers, guidance on and off, against the CPU's."""
    with (
        Pipeline.open(opener.package.root, backend="onnxruntime", threads=scale.threads) as host,
        opener.pipeline() as opened,
    ):
        for sampler in SAMPLERS:
            for guidance in (scale.guidance, 1.0):
                what = f"{sampler} {'guided' if guidance > 1 else 'unguided'}"
                changes = {"sampler": sampler, "guidance_scale": guidance, "num_images_per_prompt": 3}
                request = scale.request(**changes, height=scale.short)
                yield attempt(
                    what, lambda what=what, request=request: _picture(what, opened.pipe, host, request)
                )


def _picture(what: str, pipe: Pipeline, host: Pipeline, request: dict[str, Any]) -> Row:
    wanted, host_s = draw(host, request)
    found, seconds = draw(pipe, request)
    likeness = psnr(found, wanted)
    bar = PICTURE_DB["fp16"]
    problems = [] if likeness >= bar else [f"{likeness:.1f} dB, below {bar:g}"]
    figures = {"psnr_db": likeness, "identical": bool(np.array_equal(found, wanted))}
    return judged(what, problems, {**figures, "seconds": seconds, "cpu_seconds": host_s})


def draw(pipe: Pipeline, request: dict[str, Any]) -> tuple[Array, float]:
    """Pictures (N, H, W, 3) uint8 and the seconds they took."""
    began = perf_counter()
    images = np.asarray(pipe(PROMPT, **request).images)
    return images, perf_counter() - began


# ── graphs ─────────────────────────────────────────────────────────────────────────────────────


def graphs(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Loops replayed as captured graphs draw what plain ones draw; the time of each, interleaved.

    Each run has a seed of its own, and noise in every row: a graph that replays yesterday's data shows.
    """
    with opener.pipeline("off") as plain, opener.pipeline("on") as replayed:
        for sampler in (SAMPLERS[0], SAMPLERS[-1]):
            yield attempt(sampler, lambda sampler=sampler: _graphs(sampler, plain, replayed, scale))


def _graphs(sampler: str, plain: Opened, replayed: Opened, scale: Scale) -> Row:
    launches, worst, same = replayed.device.launches, float("inf"), True
    seconds: dict[str, list[float]] = {"plain": [], "graph": []}
    for run in range(_WARM + scale.runs):
        request = scale.request(sampler=sampler, seed=100 + run, num_inference_steps=scale.timed_steps)
        wanted, plain_s = draw(plain.pipe, request)
        found, graph_s = draw(replayed.pipe, request)
        worst, same = min(worst, psnr(found, wanted)), same and bool(np.array_equal(found, wanted))
        if run >= _WARM:
            seconds["plain"].append(plain_s)
            seconds["graph"].append(graph_s)
    launches = replayed.device.launches - launches
    medians = {f"{name}_p50_s": median(values) for name, values in seconds.items()}
    figures = {"psnr_db": worst, "identical": same, **medians, "launches": launches, "runs": scale.runs}
    problems = (
        [] if worst >= REPLAY_DB else [f"{worst:.1f} dB between plain and replayed, below {REPLAY_DB:g}"]
    )
    reasons = [line.removeprefix(_REFUSED) for line in replayed.log if line.startswith(_REFUSED)]
    reasons = reasons if launches < scale.runs else []  # a later attempt succeeded
    if not reasons and launches < scale.runs:
        problems.append(f"the graph was launched in {launches} of {scale.runs} runs, and nothing says why")
    row = judged(sampler, problems, figures)
    if reasons and not problems:  # plain loops are what the loop falls back on
        return Row(what=sampler, status="not available", reason=reasons[0], figures=row.figures)
    return row


# ── time ───────────────────────────────────────────────────────────────────────────────────────


def timing(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Seconds of one guided picture, and of its stages. Information: no time is too long."""
    with opener.pipeline("auto") as opened:
        yield attempt("one picture", lambda: _timing(opened, scale))


def _timing(opened: Opened, scale: Scale) -> Row:
    totals: list[float] = []
    stages: dict[str, list[float]] = {}
    for run in range(4 + scale.runs):  # "auto" has chosen after four
        request = scale.request(seed=run, num_inference_steps=scale.timed_steps)
        began = perf_counter()
        result = opened.pipe(PROMPT, **request)
        if run >= 4:
            totals.append(perf_counter() - began)
            for name, seconds in result.seconds.items():
                stages.setdefault(name, []).append(seconds)
    figures = {
        "p50_s": float(np.percentile(totals, 50)),
        "p90_s": float(np.percentile(totals, 90)),
        "runs": scale.runs,
        "steps": scale.timed_steps,
        "size": f"{scale.width}x{scale.height}",
        "launches": opened.device.launches,
        "stages_p50_s": {name: median(seconds) for name, seconds in stages.items()},
        "log": list(opened.log),
    }
    return judged("one picture", [], figures)
