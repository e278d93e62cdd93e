"""The one bounded queue: which jobs are accepted, which starts next, and when each may be done.

Bounds count what waits and what runs, as both hold memory and both are before the next one. Who is refused is
told which bound it was and when to come again.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from .bounds import Bounds, Clock
from .job import ANYONE, Job, Submission, Work
from .pace import Pace, ends
from .refusals import DeadlineError, NeverInTimeError, RefusedError, TooLargeError
from .table import Jobs

AMOUNTS = ("jobs", "input_bytes", "pixel_steps")


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much there is, or may be."""

    jobs: int = 0
    input_bytes: int = 0
    pixel_steps: int = 0

    @classmethod
    def of(cls, *works: Work) -> Load:
        """The sum over so many jobs."""
        return cls(
            jobs=len(works),
            input_bytes=sum(work.input_bytes for work in works),
            pixel_steps=sum(work.pixel_steps for work in works),
        )

    def above(self, most: Load) -> str | None:
        """The first amount that is more than `most` has."""
        return next((name for name in AMOUNTS if getattr(self, name) > getattr(most, name)), None)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A waiting job's place: 1 starts next. `eta_s` is when it may be done; None while no pace is known."""

    position: int
    eta_s: float | None


@dataclass(kw_only=True)
class _Entry:
    """A job that is there; `done` of its pixel-steps are."""

    job: Job
    done: int = 0
    position: int | None = None  # as its events have told it

    @property
    def model(self) -> str:
        return self.job.submission.model

    @property
    def rounds_left(self) -> int:
        """Steps of each of its pictures."""
        work = self.job.submission.work
        return max(0, work.steps - self.done * work.steps // work.pixel_steps)


class Queue:
    """The jobs of a table that wait and run. Any thread may call.

    Args:
        jobs: the table; however its jobs end, the queue knows.
        bounds: how much may be there.
        now: the table's clock.
        paces: of each model, what estimates are made of.
        at_once: jobs of a model that take turns.
    """

    def __init__(
        self, jobs: Jobs, bounds: Bounds, now: Clock, paces: Mapping[str, Pace], at_once: int
    ) -> None:
        self._jobs, self._bounds, self._now = jobs, bounds, now
        self._paces, self._at_once = paces, at_once
        self._lock = jobs.lock
        self._there: dict[str, _Entry] = {}
        self._waiting: list[tuple[int, int, str]] = []  # by -priority, then by arrival
        self._arrivals = 0
        self._draining = False
        self._refused = Counter[str]()
        jobs.watch(self._changed)

    def submit(self, owner: str, submission: Submission) -> Job:
        """A new job at its place in the queue, or the one that the same submission has made before.

        Raises:
            IdempotencyMismatchError: the key is for another body.
            TooLargeError: it is more than an empty queue takes.
            NeverInTimeError: its deadline is too early for an empty queue.
            RefusedError: there is no room, no time until its deadline, or the server is about to end.
        """
        with self._lock:
            once = submission.once
            if once is not None and (known := self._jobs.find(owner, once)) is not None:
                return known
            self.expire()
            self._check_bounds(owner, submission.work)
            self._check_deadline(submission)
            return self._jobs.add(owner, submission)

    def take(self, model: str = "") -> Job | None:
        """The next job for a model, running from now on; None if none waits."""
        with self._lock:
            self.expire()
            for *_, name in self._waiting:
                if self._there[name].job.submission.model == model:
                    return self._jobs.start(name)
            return None

    def expire(self) -> None:
        """Fail what waits and is past its deadline; a server calls it now and then, `take` always."""
        with self._lock:
            now = self._now()
            waiting = [self._there[name].job for *_, name in self._waiting]
            late = [job.id for job in waiting if job.deadline is not None and job.deadline <= now]
            for name in reversed(late):  # nobody is told of a place that is gone at once
                self._jobs.fail(name, deadline_passed("waited"))

    def progress(self, name: str, pixel_steps: int) -> None:
        """Take in how much of a running job is done, for the estimates of those behind it."""
        with self._lock:
            if (entry := self._there.get(name)) is not None:
                entry.done = pixel_steps

    def share_done(self, name: str) -> float:
        """How much of a job is done, 0 to 1; 0 where it is not there."""
        with self._lock:
            entry = self._there.get(name)
            return 0.0 if entry is None else min(1.0, entry.done / entry.job.submission.work.pixel_steps)

    def place(self, name: str) -> Place | None:
        """Where a job waits; None if it does not."""
        with self._lock:
            return next((place for entry, place in self._places() if entry.job.id == name), None)

    def drain(self) -> None:
        """Refuse all new jobs from now on; those that are there go on."""
        with self._lock:
            self._draining = True

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused for good."""
        return self._draining

    @property
    def load(self) -> Load:
        """What waits and runs."""
        with self._lock:
            return Load.of(*(entry.job.submission.work for entry in self._there.values()))

    @property
    def refused(self) -> Mapping[str, int]:
        """How many were refused, by bound."""
        with self._lock:
            return dict(self._refused)

    def retry_after_s(self) -> int:
        """When all that is there may be done, within the bounds of such an answer."""
        with self._lock:
            least, most = self._bounds.retry_after_s
            last = max((at or 0.0 for _, at in self._done_at()), default=0.0)
            return int(min(max(math.ceil(round(last, 3)), least), most))

    # ── inside, under the lock ──────────────────────────────────────────────────────────────────────────

    def _changed(self, job: Job) -> None:
        """Keep the books, whoever has changed a job."""
        self._waiting = [one for one in self._waiting if one[-1] != job.id]
        if job.state == "queued":
            self._arrivals += 1
            insort(self._waiting, (-job.submission.priority, self._arrivals, job.id))
        if job.ended is None:
            self._there[job.id] = _Entry(job=job)
        else:
            self._there.pop(job.id, None)
        self._tell_places()

    def _check_bounds(self, owner: str, work: Work) -> None:
        if self._draining:
            raise self._refusal("draining", "the server is about to end", "a server that takes jobs")
        most, own_most = self._most(1), self._most(1 if owner == ANYONE else self._bounds.owner_share)
        if (name := Load.of(work).above(own_most)) is not None:
            raise TooLargeError(
                f"a job of {getattr(Load.of(work), name)} {_words(name)}",
                expected=f"at most {getattr(own_most, name)}",
                fix="Ask for fewer or smaller pictures or fewer steps, or send smaller pictures.",
            )
        works = {key: entry.job.submission.work for key, entry in self._there.items()}
        own = [one for key, one in works.items() if self._there[key].job.owner == owner]
        if (name := Load.of(work, *works.values()).above(most)) is not None:
            bound = getattr(most, name)
            raise self._refusal(name, "the queue is full", f"at most {bound} {_words(name)} at a time")
        if (name := Load.of(work, *own).above(own_most)) is not None:
            bound = getattr(own_most, name)
            raise self._refusal(
                f"owner_{name}",
                "your share of the queue is full",
                f"at most {bound} {_words(name)} of yours at a time",
            )

    def _check_deadline(self, submission: Submission) -> None:
        timeout, model = submission.timeout_s, submission.model
        own = submission.work.steps, submission.work
        alone = self._ends(model, [own])
        if timeout is None or alone is None:
            return
        if alone[0] > timeout:
            self._refused["deadline"] += 1
            raise NeverInTimeError(
                f"a deadline in {timeout:g} s, for a job that takes {alone[0]:.1f} s by itself",
                expected="a later deadline",
                fix="Give it more time, or ask for fewer steps or a smaller picture.",
            )
        later = {name for key, _, name in self._waiting if key > -submission.priority}
        before = [entry for entry in self._in_order() if entry.job.id not in later]
        ahead = [(one.rounds_left, one.job.submission.work) for one in before if one.model == model]
        last = (self._ends(model, [*ahead, own]) or alone)[-1]
        if last > timeout:
            found = f"a deadline in {timeout:g} s, when the job would be done in {last:.1f} s"
            raise self._refusal("deadline", found, "a later deadline")

    def _refusal(self, bound: str, found: str, expected: str) -> RefusedError:
        self._refused[bound] += 1
        seconds = self.retry_after_s()
        fix = f"Try again in {seconds} s."
        return RefusedError(found, expected=expected, fix=fix, bound=bound, retry_after_s=seconds)

    def _most(self, share: float) -> Load:
        """A share of the bounds, and one job at least."""
        bounds = self._bounds
        return Load(
            jobs=max(1, int(bounds.jobs * share)),
            input_bytes=int(bounds.input_bytes * share),
            pixel_steps=int(bounds.pixel_steps * share),
        )

    def _in_order(self) -> list[_Entry]:
        """Who runs, and then who waits, the next first."""
        running = [entry for entry in self._there.values() if entry.job.state == "running"]
        return [*running, *(self._there[name] for *_, name in self._waiting)]

    def _places(self) -> Iterator[tuple[_Entry, Place]]:
        """Who waits, the next first, and where: one pass, however many there are."""
        done = self._done_at()
        waiting = done[len(done) - len(self._waiting) :]
        for position, (entry, at) in enumerate(waiting, 1):
            yield entry, Place(position=position, eta_s=at)

    def _done_at(self) -> list[tuple[_Entry, float | None]]:
        """Who is there, in order, and in how many seconds each is done; None without a pace.

        Jobs wait for those of their own model alone: each model draws in a thread of its own, and what the
        others' threads cost is in its pace.
        """
        there = self._in_order()
        at: dict[str, float] = {}
        for model in {entry.model for entry in there}:
            own = [entry for entry in there if entry.model == model]
            left = [(entry.rounds_left, entry.job.submission.work) for entry in own]
            at |= zip((entry.job.id for entry in own), self._ends(model, left) or (), strict=False)
        return [(entry, at.get(entry.job.id)) for entry in there]

    def _ends(self, model: str, jobs: Sequence[tuple[int, Work]]) -> list[float] | None:
        """In how many seconds each is done, of jobs of a model with so many rounds left."""
        pace = self._paces[model]
        each = [pace.seconds(work.pictures, work.pixel_steps // work.steps) for _, work in jobs]
        known = [seconds for seconds in each if seconds is not None]
        if len(known) < len(each):
            return None
        return ends([(rounds, one) for (rounds, _), one in zip(jobs, known, strict=True)], self._at_once)

    def _tell_places(self) -> None:
        """An event for each waiting job that is at another place than it was told."""
        for entry, place in self._places():
            if entry.position != place.position:
                entry.position = place.position
                entry.job.log.append("queued", asdict(place))


def deadline_passed(what: str) -> DeadlineError:
    """The error of a job that `what` ("waited", "ran") too long."""
    return DeadlineError(
        f"the deadline passed while the job {what}",
        expected="enough time for the jobs before it and its own steps",
        fix="Give it more time, ask for fewer steps, or try again when the queue is shorter.",
    )


def _words(amount: str) -> str:
    return {"input_bytes": "bytes of input", "pixel_steps": "pixel-steps"}.get(amount, amount)
