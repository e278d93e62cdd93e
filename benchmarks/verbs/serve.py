"""`latentrt bench serve`: mixed requests that arrive by themselves, drawn in three ways by one opened model.

Capacity is what one at a time draws in a closed loop; loads are shares of it. The ways take turns, on the
same arrivals. Then the same is simulated, with what this machine takes and with what a GPU might.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, median
from typing import Any

from ...engines.errors import LatentrtError
from ...engines.package import Package
from ...runtime.loop.job import UNetCall
from ...runtime.loop.sharing import ROWS, rows_that_gain
from ...runtime.pipeline import Pipeline
from ...serve.worker import AT_ONCE
from ..case import Case
from ..load.costs import Cost, MadeUpClock, gpu_like, measure_cost, simulated
from ..load.open_loop import Limits, LoadClock, Played, Policy, Start, SteadyClock, play, time_alone
from ..load.traffic import Kind, Request, arrivals, mix_of
from ..machine import clocks, describe_machine
from ..records import Document, Row, short
from ..sides.contract import OURS, Task
from ..sides.ours import open_pipeline
from .latency import Progress, document_of, silent

# Shared steps are ours: what `latentrt serve` does.
ONE_BY_ONE, BATCHED = f"{OURS}, one at a time", f"{OURS}, equal requests batched"
ALONE, MIXED, SIMULATED = "request alone", "mixed requests", "mixed requests, simulated"
MEASURED = "this machine, measured"  # whose cost
SEED = 18


@dataclass(frozen=True, kw_only=True)
class LoadRules:
    """What the runs keep to; all of it is written into the document.

    Attributes:
        loads: shares of the capacity.
        rounds: in which every way has a run at every load, with arrivals of its own.
        requests: that count, of each run.
        warm_up: requests before them.
        jobs: that wait or are drawn at most at a load above 1, where any other queue would grow without end.
        in_time: a request is in time within so many times what one of its kind takes alone.
        at_once: requests side by side, where steps are shared.
        batch: equal requests in a batch, at most.
        rows: of a shared call of the UNet, at most; None is measured, as a server does at its start.
        alone: how often each kind is drawn alone.
        simulated: requests that count, of each simulated run.
        seed: of the arrivals.
    """

    loads: tuple[float, ...] = (0.6, 0.9, 1.2)
    rounds: int = 3
    requests: int = 100
    warm_up: int = 10
    jobs: int = 8
    in_time: float = 3.0
    at_once: int = AT_ONCE
    batch: int = 8
    rows: int | None = None
    alone: int = 5
    simulated: int = 3000
    seed: int = SEED

    @classmethod
    def quick(cls, **changes: Any) -> LoadRules:
        """For a look."""
        return replace(cls(rounds=1, requests=16, warm_up=2, alone=1, simulated=200), **changes)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The ways, in the order of a document."""
        return (
            Policy(side=ONE_BY_ONE),
            Policy(side=BATCHED, pictures=self.batch),
            Policy(side=OURS, at_once=self.at_once),
        )


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What requests are drawn on.

    Attributes:
        workload: of its rows.
        case: of all of them.
        start: makes generations.
        clock: what they take time by.
        alone: seconds of a request of each kind that nothing else is drawn beside.
        rows: of a shared call, at most.
        figures: what else is known.
        stamp: what it ran on.
    """

    workload: str
    case: Mapping[str, Any]
    start: Start
    clock: LoadClock
    alone: Mapping[Kind, float]
    rows: int
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stamp: Callable[[], Mapping[str, Any]] = dict[str, Any]

    @property
    def per_s(self) -> float:
        """The capacity: requests a second, of all kinds in their shares, one at a time."""
        return 1 / sum(kind.share * seconds for kind, seconds in self.alone.items())


def measure_serve(
    package: Package, task: Task, case: Case, *, rules: LoadRules, progress: Progress = silent
) -> Document:
    """Rows of each kind alone, then of each way at each load: measured here, and simulated for two costs.

    Samples are seconds from the moment a request was due until its picture was there. All ways draw with one
    pipeline, which is opened in this process.

    Raises:
        LatentrtError: it cannot be opened, or a request cannot be drawn alone.
    """
    kinds, clock = mix_of(case, package.manifest), SteadyClock()
    facts = {"width": case.width, "height": case.height, "guidance_scale": case.guidance_scale}
    facts["steps"] = case.steps
    with closing(open_pipeline(task)) as pipe:
        start = drawn_by(pipe, case.prompt)
        progress("each kind of request alone")
        seconds = time_alone(start, kinds, rules.alone, clock)
        rows = rules.rows or rows_that_gain(_first_call(start, kinds[0]))
        machine = describe_machine()
        ground = Ground(
            workload=MIXED,
            case=facts,
            start=start,
            clock=clock,
            alone={kind: median(taken) for kind, taken in zip(kinds, seconds, strict=True)},
            rows=rows,
            stamp=lambda: {**machine, **clocks(), "side": {"backend": pipe.backend}},
        )
        found = [
            Row(side=OURS, workload=ALONE, case=kind.to_json(), rounds=tuple((one,) for one in taken))
            for kind, taken in zip(kinds, seconds, strict=True)
        ]
        found += loaded(ground, rules, rules.requests, rules.rounds, progress)
        cost = measure_cost(MEASURED, start, kinds[0], clock)
    for made_up, most in ((cost, rows), (gpu_like(kinds[0].pixels), ROWS)):
        found += loaded(simulation(made_up, kinds, facts, rows=most), rules, rules.simulated, 1, progress)
    settings = {**asdict(rules), "rows": rows, "requests_per_s": ground.per_s}
    return document_of("serve", package, task, found, settings)


def drawn_by(pipe: Pipeline, prompt: str) -> Start:
    """Makes generations of a pipeline: of one request, or of several of a kind as one batch."""

    def start(requests: Sequence[Request]) -> Generator[Any, None, Any]:
        seeds = [request.number for request in requests]
        prompts = [prompt] * len(seeds)
        parameters = requests[0].kind.parameters()
        return pipe.shared({"prompt": prompts, "seed": seeds, "output_type": "pil", **parameters})

    return start


def _first_call(start: Start, kind: Kind) -> UNetCall:
    steps = start((Request(number=0, kind=kind, due=0.0),))
    with closing(steps):
        return next(item for item in steps if isinstance(item, UNetCall))


def simulation(cost: Cost, kinds: Sequence[Kind], case: Mapping[str, Any], *, rows: int) -> Ground:
    """Requests that take what a cost says and draw nothing, by a clock that they set forward."""
    clock = MadeUpClock()
    return Ground(
        workload=SIMULATED,
        case={**case, "cost": cost.name},
        start=simulated(cost, clock),
        clock=clock,
        alone={kind: cost.alone(kind) for kind in kinds},
        rows=rows,
        figures={"cost": cost.to_json()},
    )


def loaded(
    ground: Ground, rules: LoadRules, counted: int, rounds: int, progress: Progress = silent
) -> Iterator[Row]:
    """A row for each load and way. In a round all have the same requests; the order of ways flips."""
    runs: dict[tuple[float, str], list[Played]] = {}
    failed: dict[str, str] = {}  # the reason, by side: it has no time at any load
    for number in range(rounds):
        for load in rules.loads:
            jobs = rules.jobs if load > 1 else None
            limits = Limits(warm_up=rules.warm_up, counted=counted, jobs=jobs, rows=ground.rows)
            for policy in rules.policies[:: -1 if number % 2 else 1]:
                if policy.side in failed:
                    continue
                progress(f"{ground.workload}: load {load:g}, {policy.side}, round {number + 1} of {rounds}")
                requests = arrivals(tuple(ground.alone), load * ground.per_s, rules.seed + number)
                try:
                    played = play(policy, limits, requests, ground.start, ground.clock)
                except LatentrtError as error:
                    failed[policy.side] = short(error.found)
                    continue
                runs.setdefault((load, policy.side), []).append(played)
    for load in rules.loads:
        for policy in rules.policies:
            reason = failed.get(policy.side, "")
            yield _row(ground, rules, load, policy.side, runs.get((load, policy.side), []), reason)


def _row(
    ground: Ground, rules: LoadRules, load: float, side: str, runs: Sequence[Played], reason: str
) -> Row:
    row = Row(side=side, workload=ground.workload, case={**ground.case, "load": load}, stamp=ground.stamp())
    turns = tuple(tuple(one.latency for one in played.measured) for played in runs)
    if not reason and not all(turns):
        reason = "every request of a round was refused"
    if reason:
        return replace(row, status="FAILED", reason=reason)
    limits = {kind: rules.in_time * seconds for kind, seconds in ground.alone.items()}
    figures = {**ground.figures, "offered_per_s": load * ground.per_s, **figures_of(runs, limits)}
    return replace(row, rounds=turns, figures=figures)


def figures_of(runs: Sequence[Played], limits: Mapping[Kind, float]) -> dict[str, Any]:
    """What became of the requests of a way at a load, over all runs.

    Args:
        runs: of each round.
        limits: seconds within which a request of a kind is in time.

    Returns:
        `requests_per_s` and `in_time_per_s`, pictures a second between the first counted arrival and the
        last: all, and those in time ("goodput"); `unet_calls` and `mean_rows` in that time; `refused`, the
        share of the counted requests that was.
    """
    seconds = sum(played.seconds for played in runs)
    ended = [one for played in runs for one in played.finished if played.within(one.at)]
    rows = [rows for played in runs for at, rows in played.calls if played.within(at)]
    refused = [one.number in played.numbers for played in runs for one in played.refused]
    in_time = sum(one.latency <= limits[one.request.kind] for one in ended)
    return {
        "requests_per_s": len(ended) / seconds,
        "in_time_per_s": in_time / seconds,
        "refused": sum(refused) / sum(len(played.counted) for played in runs),
        "unet_calls": len(rows),
        "mean_rows": fmean(rows) if rows else None,
    }
