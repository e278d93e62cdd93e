"""`latentrt bench hosts`: what a server in between costs, beside the same pictures drawn in this process.

Servers are started by whoever measures, each with the same model on the same machine. One caller who asks
again once it has its picture shows what a request costs; several such callers show what is drawn a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from ...engines.errors import LatentrtError
from ...engines.package import Package
from ...engines.spec import Array
from ...runtime.pipeline import Pipeline
from ...runtime.result import Result
from ..case import Case
from ..load.callers import CALLERS, Caller
from ..machine import clocks, describe_machine
from ..records import Document, Row, short
from ..sides.contract import OURS, Task
from ..sides.ours import open_pipeline
from .latency import Progress, document_of, silent

ASKED = "requests, one after the other"
AT_ONCE = "requests, several callers"

Fields = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HostRules:
    """What the runs keep to; all of it is written into the document.

    Attributes:
        rounds: in which every side has a turn with one caller, and one with all.
        requests: of a turn, by each caller.
        callers: that ask at once in the second kind of turn.
        warm_up: requests of each side before the first round.
    """

    rounds: int = 12
    requests: int = 10
    callers: int = 4
    warm_up: int = 5


class Host(Protocol):
    """A side: something that answers requests."""

    def draw(self, fields: Fields) -> Array:
        """The picture (H, W, 3) uint8 of one request."""
        ...

    def turn(self, requests: Sequence[Fields], callers: int) -> tuple[float, ...]:
        """Seconds that each request took; so many callers ask, each again once it has its picture."""
        ...


@dataclass(frozen=True)
class InProcess:
    """The pipeline in this process; callers share its steps."""

    pipe: Pipeline

    def draw(self, fields: Fields) -> Array:
        """See `Host`."""
        return self.pipe(**fields, output_type="np").images[0]

    def turn(self, requests: Sequence[Fields], callers: int) -> tuple[float, ...]:
        """See `Host`."""
        if callers == 1:
            return tuple(_seconds(partial(self.draw, fields)) for fields in requests)
        began: dict[int, float] = {}
        found: dict[int, float] = {}

        def taken() -> Iterator[Fields]:
            for number, fields in enumerate(requests):
                began[number] = perf_counter()
                yield fields

        for number, item in self.pipe.stream_many(taken(), at_once=callers):
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Result):
                found[number] = perf_counter() - began[number]
        return tuple(found[number] for number in range(len(requests)))


@dataclass(frozen=True)
class OverHttp:
    """A server, and as many callers as ever ask at once."""

    callers: Sequence[Caller]

    def draw(self, fields: Fields) -> Array:
        """See `Host`."""
        return self.callers[0].draw(fields)

    def turn(self, requests: Sequence[Fields], callers: int) -> tuple[float, ...]:
        """See `Host`."""

        def asks(number: int) -> list[float]:
            own = requests[number::callers]
            return [_seconds(partial(self.callers[number].draw, fields)) for fields in own]

        with ThreadPoolExecutor(callers) as pool:
            found = list(pool.map(asks, range(callers)))
        return tuple(seconds for own in found for seconds in own)


def _seconds(draw: Callable[[], Array]) -> float:
    began = perf_counter()
    draw()
    return perf_counter() - began


@dataclass
class _Side:
    """A host while it takes turns; once it has a reason it takes no more."""

    name: str
    host: Host
    reason: str = ""
    rounds: dict[int, list[tuple[float, ...]]] = field(default_factory=dict[int, list[tuple[float, ...]]])
    wall: dict[int, float] = field(default_factory=dict[int, float])

    def turn(self, requests: Sequence[Fields], callers: int) -> None:
        """One turn, unless it has failed."""
        if self.reason:
            return
        began = perf_counter()
        try:
            taken = self.host.turn(requests, callers)
        except LatentrtError as error:
            self.reason = short(error.found)
            return
        self.wall[callers] = self.wall.get(callers, 0.0) + perf_counter() - began
        self.rounds.setdefault(callers, []).append(taken)

    def row(self, case: Mapping[str, Any], callers: int, stamp: Mapping[str, Any]) -> Row:
        """What its turns with so many callers found."""
        workload = ASKED if callers == 1 else AT_ONCE
        row = Row(side=self.name, workload=workload, case={**case, "callers": callers}, stamp=stamp)
        if self.reason:
            return replace(row, status="FAILED", reason=self.reason)
        rounds = tuple(self.rounds[callers])
        rate = sum(map(len, rounds)) / self.wall[callers]
        return replace(row, rounds=rounds, figures={"requests_per_s": rate})


def measure_hosts(
    package: Package,
    task: Task,
    case: Case,
    *,
    servers: Mapping[str, str],
    rules: HostRules,
    progress: Progress = silent,
) -> Document:
    """Two rows of each side: one caller, and several.

    A side whose first picture is not the one that is drawn here, pixel by pixel, has no times.

    Args:
        package: the model.
        task: how it is opened here.
        case: the request.
        servers: addresses by the names of CALLERS.
        rules: of the runs.
        progress: is told what is done.

    Raises:
        LatentrtError: the model cannot be opened, or a server is not there.
    """
    fields = {"prompt": case.prompt, **case.parameters}
    del fields["num_images_per_prompt"]
    with ExitStack() as stack:
        ours = InProcess(stack.enter_context(closing(open_pipeline(task))))
        sides = [_Side(OURS, ours)]
        for name, url in servers.items():
            callers = [stack.enter_context(closing(CALLERS[name](url))) for _ in range(rules.callers)]
            sides.append(_Side(name, OverHttp(callers)))
        wanted = ours.draw(fields)
        for side in sides[1:]:
            side.reason = _differs(side.host, fields, wanted)
        _take_turns(sides, fields, rules, progress)
        stamp = {**describe_machine(), **clocks(), "side": {"backend": ours.pipe.backend}}
    facts = {name: getattr(case, name) for name in ("width", "height", "steps", "guidance_scale")}
    rows = [side.row(facts, callers, stamp) for callers in (1, rules.callers) for side in sides]
    return document_of("hosts", package, task, rows, asdict(rules))


def _take_turns(sides: Sequence[_Side], fields: Fields, rules: HostRules, progress: Progress) -> None:
    """The order of sides flips from round to round; in a round all have the same requests."""
    for side in sides:
        progress(f"{side.name}, warm up")
        side.turn([fields] * rules.warm_up, 1)
        side.rounds.clear()
        side.wall.clear()
    for number in range(rules.rounds):
        for callers in (1, rules.callers):
            first = number * rules.requests * rules.callers
            requests = [{**fields, "seed": first + one} for one in range(rules.requests * callers)]
            for side in sides[:: -1 if number % 2 else 1]:
                progress(f"{side.name}, {callers} at once, round {number + 1} of {rules.rounds}")
                side.turn(requests, callers)


def _differs(host: Host, fields: Fields, wanted: Array) -> str:
    """Why a host's times do not count; "" where its picture is the one that is drawn here."""
    try:
        found = host.draw(fields)
    except LatentrtError as error:
        return short(error.found)
    if found.shape == wanted.shape and np.array_equal(found, wanted):
        return ""
    return "its picture is not the one that is drawn in this process: is it another model?"
