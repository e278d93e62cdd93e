"""Steps of the GPU check over a model of full size: what a step of the loop takes, and the experiments.

The model is SD 1.5's skeleton filled with random weights, unless a package is named: times, memory and
placement are the real model's, and its pictures mean nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ...engines.device import Device
from ...engines.spec import Array
from ...engines.tolerances import NET_RELATIVE_L2
from ..case import Case
from ..likeness import difference, psnr
from ..process import SideError
from ..records import Row
from ..sides.contract import Work
from ..sides.ours_device import device_side
from ..verbs.latency import check
from ..verbs.memory_watch import sampled
from .opener import Opened, Opener, Scale, attempt, draw, mebibytes, row_of
from .sections import REPLAY_DB, why_not_replayed

# The nets that each workload runs.
NETS: Mapping[str, Sequence[str]] = {
    "unet": ("unet_context", "unet_time", "unet"),
    "vae_decoder": ("vae_decoder",),
    "text_encoder": ("text_encoder",),
}
_FIRST = ("first_s", "second_s", "third_s")
_PICTURES = 3
_NOISE_DB = 3.0  # that a replayed picture may be further from a plain one than two plain ones are
_RUNS = 4  # of a shape before the other one
_PERIOD = 0.002  # seconds between two looks at the free memory


# ── one net ──────────────────────────────────────────────────────────────────────────────────────


def net(
    opener: Opener,
    scale: Scale,
    *,
    workload: str = "unet",
    layout: str = "nhwc",
    settings: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """A net in a layout, opened, run plainly, and replayed as a graph; with `settings` an experiment.

    The first step of a workload leaves its output, and later ones have to come to the same.
    """
    with closing(opener.watch()) as watch, ExitStack() as stack:
        with _taken(watch) as figures:
            began = perf_counter()
            opening = opener.pipeline(nets=NETS[workload], layout=layout, settings=settings)
            opened = stack.enter_context(opening)
            seconds = perf_counter() - began
        yield row_of(f"{workload} opened", figures, samples=[seconds])
        for how in ("plain", "replayed"):
            yield attempt(f"{workload} {how}", _net, opener, scale, workload, opened, watch)


def _net(what: str, opener: Opener, scale: Scale, workload: str, opened: Opened, watch: Device) -> Row:
    side = device_side(opened.pipe, opened.loop, replayed=what.endswith("replayed"))
    with ExitStack() as stack:
        with _taken(watch) as figures:
            work = stack.enter_context(closing(side.prepare(workload, scale.case)))
            firsts = {name: seconds_of(work) for name in _FIRST}
        samples, medians = timed(work, scale.steps)
        found = work.outputs()
    kept = opener.folder / f"{opener.package.root.name}-{workload}.npz"
    figures |= {**firsts, **medians}
    problems = [f"{name} is not finite" for name, array in found.items() if not np.isfinite(array).all()]
    if kept.is_file() and not problems:
        try:
            with np.load(kept) as wanted:
                figures |= check(found, dict(wanted), opener.package)
        except SideError as error:  # how long it took is still of interest
            problems = [error.reason]
    elif not problems:
        arrays: dict[str, Any] = dict(found)
        np.savez(kept, **arrays)
    return row_of(what, figures, problems, samples)


@contextmanager
def _taken(watch: Device) -> Generator[dict[str, float]]:
    """What the block takes of the device, in MiB: when it ends, and at most. The numbers are there then."""
    figures, before = dict[str, float](), watch.memory().free
    with sampled(lambda: watch.memory().free, _PERIOD) as looks:
        yield figures
    sizes = [size for _, size in looks]
    figures |= {"taken_mib": mebibytes(before - sizes[-1]), "peak_mib": mebibytes(before - min(sizes))}


def seconds_of(work: Work) -> float:
    """How long one run takes, with the wait for it."""
    began = perf_counter()
    work.run()
    return perf_counter() - began


def timed(work: Work, runs: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of warm runs, and the medians of what the work tells of them: `device_p50_s`, `host_p50_s`."""
    samples, figures = list[float](), list[Mapping[str, Any]]()
    for _ in range(runs):
        samples.append(seconds_of(work))
        figures.append(dict(work.figures()))
    return samples, {f"{name[:-2]}_p50_s": median(one[name] for one in figures) for name in figures[0]}


# ── a whole picture ────────────────────────────────────────────────────────────────────────────────


def whole(opener: Opener, scale: Scale) -> Iterator[Row]:
    """A picture as a user has it: seconds to the first one, memory, plain and replayed with the same seed."""
    case, drawn = replace(scale.case, steps=scale.steps), list[Array]()
    with closing(opener.watch()) as watch:
        before = watch.memory().free
        with ExitStack() as stack:
            with _taken(watch) as cold:
                with _taken(watch) as opening:
                    began = perf_counter()
                    plain = stack.enter_context(opener.pipeline("off"))
                    seconds = perf_counter() - began
                yield row_of("picture opened", opening, samples=[seconds])
                yield attempt("first picture", _pictures, plain, case, 1, drawn)
            yield attempt("plain pictures", _pictures, plain, case, _PICTURES, drawn)
            process = getattr(watch, "process_memory", lambda: None)()
        figures = {"opened_mib": opening["taken_mib"], "peak_mib": cold["peak_mib"]}
        closed = {"closed_mib": mebibytes(before - watch.memory().free)}
        told = {"of_process_mib": None if process is None else mebibytes(process)}
        yield row_of("memory", {**figures, **closed, **told})
        yield attempt("replayed pictures", _replayed, opener, case, drawn)


def _pictures(what: str, opened: Opened, case: Case, count: int, drawn: list[Array]) -> Row:
    """Draw a picture so often, and add what was drawn to `drawn`."""
    samples = list[float]()
    for _ in range(count):
        began = perf_counter()
        drawn.append(draw(opened.pipe, case))
        samples.append(perf_counter() - began)
    return row_of(what, {"steps": case.steps}, samples=samples)


def _replayed(what: str, opener: Opener, case: Case, plain: Sequence[Array]) -> Row:
    if not plain:
        return row_of(what, missing="there is no plain picture to compare with")
    with opener.pipeline("on") as opened:
        for _ in range(2):  # plain; captured and compared
            draw(opened.pipe, case)
        row = _pictures(what, opened, case, _PICTURES, found := [])
        # with random weights, what sums in any order grows from step to step: plain ones differ too
        likeness, usual = psnr(found[-1], plain[-1]), psnr(plain[0], plain[-1])
        problem, missing = why_not_replayed(likeness, opened, min(REPLAY_DB, usual - _NOISE_DB))
    figures = {**row.figures, "psnr_db": likeness, "plain_db": usual}
    return row_of(what, figures, [problem] if problem else (), row.samples, missing)


# ── experiments ────────────────────────────────────────────────────────────────────────────────────


def _two_shapes(opener: Opener, scale: Scale, stack: ExitStack) -> tuple[Opened, Work, Work]:
    """The UNet bound for a guided picture, and for an unguided one."""
    opened = stack.enter_context(opener.pipeline(nets=NETS["unet"], layout="nhwc"))
    side = device_side(opened.pipe, opened.loop)
    cases = scale.case, replace(scale.case, guidance_scale=1.0)
    one, other = (stack.enter_context(closing(side.prepare("unet", case))) for case in cases)
    return opened, one, other


def shapes(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Two shapes of one net in turns: `rebuilt_s` is what the first run after a change takes longer."""
    with ExitStack() as stack:
        _, one, other = _two_shapes(opener, scale, stack)
        for turn in range(3):
            for name, work in (("guided", one), ("unguided", other)):
                first, *rest = (seconds_of(work) for _ in range(_RUNS))
                figures = {"first_s": first, "rebuilt_s": first - median(rest)}
                yield row_of(f"{name}, turn {turn + 1}", figures, samples=rest)


def outlived(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Whether a graph still computes the same once its net has run another shape.

    The loop does not rely on it (`graphs_outlive_other_shapes`), so "no" is no failure. Nobody knows what a
    graph of freed plans does: it may end the process.
    """
    bar = NET_RELATIVE_L2[opener.package.manifest.dtype]
    with ExitStack() as stack:
        opened, one, other = _two_shapes(opener, scale, stack)
        plain = [_prediction(one) for _ in range(2)]
        noise = difference("prediction", plain[1], plain[0])["relative_l2"]
        yield row_of("two plain runs", {"relative_l2": noise})
        side = device_side(opened.pipe, opened.loop, replayed=True)
        graph = stack.enter_context(closing(side.prepare("unet", scale.case)))
        far = difference("prediction", _prediction(graph), plain[0])["relative_l2"]
        problem = f"relative L2 {far:.2e} from a plain run, above {bar:g}"
        yield row_of("replayed", {"relative_l2": far}, [] if far <= bar + 2 * noise else [problem])
        for _ in range(2):
            other.run()
        far = difference("prediction", _prediction(graph), plain[0])["relative_l2"]
        outlives = "yes" if far <= bar + 2 * noise else "no"
        yield row_of("replayed after another shape", {"relative_l2": far, "outlives": outlives})


def _prediction(work: Work) -> Array:
    work.run()
    return work.outputs()["prediction"]
