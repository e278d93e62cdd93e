"""The server without a network: its models, their workers, the queue before them, and how it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..engines.errors import UsageError
from ..runtime.pipeline import Pipeline
from .jobs.admission import Queue
from .jobs.bounds import Bounds, Clock
from .jobs.job import Job, Once, Submission, Work
from .jobs.pace import Pace
from .jobs.table import Jobs
from .order import Order, check_work
from .worker import AT_ONCE, Worker

_LOG = logging.getLogger(__name__)
SILENT_S = (
    120.0  # without a sign of life a worker counts as stuck: no turn takes as long on what it is made for
)
RESTARTS = 3  # of a model's worker, after which the server stays unhealthy: something else is wrong

Health = Literal["starting", "ready", "draining", "unhealthy"]


class UnknownModelError(UsageError):
    """No model of that name is served."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a server draws.

    Args:
        rows: of a call of the UNet, at most; None is measured for each model at the start.
        at_once: jobs of a model that run side by side.
        sizes: numbers of rows that calls of the UNet have, others are filled up; None is what the model's
            device has a use for.
        strict_models: refuse names of models that are not served, also where only one is.
        lenient: OpenAI's API leaves out fields that it does not know, and says so, in place of refusing them.
    """

    rows: int | None = None
    at_once: int = AT_ONCE
    sizes: Sequence[int] | None = None
    strict_models: bool = False
    lenient: bool = False


def steady_clock() -> Clock:
    """Seconds since 1970 by a clock that nobody sets."""
    ahead = time.time() - time.monotonic()
    return lambda: ahead + time.monotonic()


class Server:
    """What all APIs share. Any thread may call.

    Args:
        models: opened ones by their names, the first is the default; they are closed by who opened them.
        bounds: of everything that strangers can make more of.
        options: how it draws.
        now: a clock; by default one whose times are dates, and which is never set back.
    """

    def __init__(
        self,
        models: Mapping[str, Pipeline],
        bounds: Bounds | None = None,
        options: Options | None = None,
        now: Clock | None = None,
    ) -> None:
        now = now or steady_clock()
        self.bounds = bounds or Bounds()
        self.options = options or Options()
        self.began = now()
        self.jobs = Jobs(self.bounds, now)
        self.paces = {name: Pace() for name in models}
        self.queue = Queue(self.jobs, self.bounds, now, self.paces, self.options.at_once)
        self.now = now
        self.workers = {
            name: Worker(
                name,
                pipe,
                self.jobs,
                self.queue,
                self.paces[name],
                now,
                rows=self.options.rows,
                at_once=self.options.at_once,
                sizes=self.options.sizes,
            )
            for name, pipe in models.items()
        }
        self.restarts = dict.fromkeys(models, 0)
        self._started = self._ended = False

    @property
    def models(self) -> tuple[str, ...]:
        """The names, the default's first."""
        return tuple(self.workers)

    def start(self) -> None:
        """Warm the models up one after the other, and begin to draw."""
        for worker in self.workers.values():
            worker.warm_up()
            worker.start()
        self._started = True

    def find(self, model: str | None) -> Worker:
        """The worker of a model; that of the default for no name, and where only one is served, of any.

        Raises:
            UnknownModelError: none of several, or with `strict_models` any other name.
        """
        name = self.models[0] if model is None else model
        if name in self.workers:
            return self.workers[name]
        if len(self.workers) == 1 and not self.options.strict_models:
            return self.workers[self.models[0]]  # clients have names of others built in
        raise UnknownModelError(
            f"no model {name[:80]!r} is served",
            expected=f"one of {', '.join(self.models)}",
            fix="Use its name.",
        )

    def submit(
        self,
        owner: str,
        order: Order,
        *,
        once: Once | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Job:
        """A job for an order that its model draws: everything is checked before it waits.

        Raises:
            LatentrtError: what `Pipeline.request_of` raises for the values, TooLargeError, and what
                `Queue.submit` raises.
        """
        worker = self.find(order.model)
        passes = order.passes(worker.pipe)
        work = Work(
            width=passes[-1].width,  # a first pass counts as if it were as large as the last
            height=passes[-1].height,
            steps=max(1, sum(len(each.schedule()) for each in passes)),
            pictures=len(order.seeds),
            input_bytes=order.input_bytes,
        )
        return self.queue.submit(
            owner,
            Submission(
                work=check_work(work, self.bounds),
                model=worker.model,
                request=order,
                priority=priority,
                timeout_s=timeout_s,
                once=once,
            ),
        )

    # ── health and end ─────────────────────────────────────────────────────────────────────────────────

    def look(self) -> None:
        """Fail what is late, and start workers anew that have died; called every second or so."""
        self.queue.expire()
        for name, worker in self.workers.items():
            if self._started and not self._ended and not worker.alive and self.restarts[name] < RESTARTS:
                self.restarts[name] += 1
                _LOG.error(
                    "the worker of %s is started again (%d of %d)", name, self.restarts[name], RESTARTS
                )
                worker.start()

    @property
    def health(self) -> Health:
        """What a probe is told: only "ready" takes new jobs."""
        if self.queue.draining:
            return "draining"
        if not self._started:
            return "starting"
        return "ready" if all(map(self._draws, self.workers.values())) else "unhealthy"

    def _draws(self, worker: Worker) -> bool:
        return worker.alive and self.now() - worker.seen < SILENT_S

    def end(self, grace_s: float) -> None:
        """Refuse new jobs, let those that are there end for so long, and cancel the rest."""
        self.queue.drain()
        until = time.monotonic() + grace_s
        while time.monotonic() < until and self.jobs.counts().queued + self.jobs.counts().running:
            time.sleep(0.02)
        self.jobs.cancel_all("shutdown")
        self._ended = True
        for worker in self.workers.values():
            worker.end()


def named(models: Sequence[str]) -> dict[str, str]:
    """Name -> model: what stands before the first `=`, else the model's last part. Raises UsageError."""
    found: dict[str, str] = {}
    for text in models:
        name, equals, model = text.partition("=")
        if not equals or not name or "/" in name:
            name, model = Path(text).stem, text
        if name in found:
            raise UsageError(
                f"two models are called {name}",
                expected="a name for each",
                fix="Name them: latentrt serve first=MODEL second=MODEL",
            )
        found[name] = model
    return found
