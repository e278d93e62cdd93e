"""Anything in any order: the table and its queue lose nothing, do nothing twice, and keep to their bounds."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from latentrt.engines.errors import CancelledError, MemoryLimitError, NumericError
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.jobs.events import TERMINAL
from latentrt.serve.jobs.job import Job, Once
from latentrt.serve.jobs.refusals import (
    GoneError,
    IdempotencyMismatchError,
    NeverInTimeError,
    RefusedError,
    TooLargeError,
    UnknownJobError,
)
from tests.serve.serving import Desk, asked, picture

BOUNDS = Bounds(
    jobs=6,
    input_bytes=600,
    pixel_steps=6000,
    owner_share=0.5,
    result_seconds=60,
    result_bytes=500,
    records=12,
    events=8,
)
OWNERS = st.sampled_from("ab")
NUMERIC = NumericError("NaN", expected="numbers", fix="Export again.")
STOPPED = CancelledError("stopped", expected="pictures", fix="Ask again.")


@dataclass
class Known:
    """What the model knows of an accepted job."""

    job: Job
    arrival: int
    state: str = "queued"
    ended: float | None = None
    order: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = (-self.job.submission.priority, self.arrival)


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(BOUNDS)
        self.known: dict[str, Known] = {}
        self.ends: list[str] = []
        self.draining = False
        self.desk.jobs.watch(lambda job: self.ends.append(job.id) if job.ended is not None else None)

    def of(self, state: str) -> list[Known]:
        return [one for one in self.known.values() if one.state == state]

    def end(self, one: Known, state: str) -> None:
        one.state, one.ended = state, self.desk.clock.time

    def expire(self) -> None:
        now = self.desk.clock.time
        for one in self.of("queued"):
            if one.job.deadline is not None and one.job.deadline <= now:
                self.end(one, "failed")

    def some(self, data: Any, state: str) -> Known:
        return data.draw(st.sampled_from(sorted(self.of(state), key=lambda one: one.arrival)))

    @rule(
        owner=OWNERS,
        steps=st.integers(1, 35),
        input_bytes=st.integers(0, 320),
        priority=st.integers(0, 2),
        timeout_s=st.none() | st.integers(0, 50),
        key=st.none() | st.sampled_from("kl"),
        body=st.sampled_from("xy"),
    )
    def submit(self, owner: str, key: str | None, body: str, **of: Any) -> None:
        once = Once(key=key, body=body) if key else None
        before = self.desk.jobs.counts().accepted
        try:
            job = self.desk.queue.submit(owner, asked(once=once, **of))
        except IdempotencyMismatchError:
            assert once
            return
        except TooLargeError:
            self.expire()
            assert of["steps"] > 30 or of["input_bytes"] > 300
            return
        except NeverInTimeError:
            self.expire()
            assert of["timeout_s"] is not None
            return
        except RefusedError as error:
            self.expire()
            self.draining_is_told(error)
            return
        if job.id in self.known:  # the same submission again
            assert once is not None
            assert job.submission.once == once
            assert job.owner == owner
            assert job.state == self.known[job.id].state
            return
        self.expire()
        assert not self.draining
        self.known[job.id] = Known(job, before)

    def draining_is_told(self, error: RefusedError) -> None:
        assert 1 <= error.retry_after_s <= 120
        assert (error.bound == "draining") == self.draining

    @rule()
    def take(self) -> None:
        self.expire()
        waiting = min(self.of("queued"), key=lambda one: one.order, default=None)
        job = self.desk.queue.take()
        assert (job and job.id) == (waiting and waiting.job.id)
        if waiting is not None:
            waiting.state = "running"

    @precondition(lambda self: self.of("running"))
    @rule(data=st.data(), size=st.integers(1, 200))
    def keep(self, data: Any, size: int) -> None:
        one = self.some(data, "running")
        index = len(self.desk.jobs.get(one.job.id, one.job.owner).pictures)
        try:
            assert self.desk.jobs.keep(one.job.id, picture(size, index))
        except MemoryLimitError:
            assert self.desk.jobs.fail(one.job.id, NUMERIC)
            self.end(one, "failed")

    @precondition(lambda self: self.of("running"))
    @rule(data=st.data(), way=st.sampled_from(["completed", "failed", "cancelled"]))
    def finish(self, data: Any, way: str) -> None:
        one, jobs = self.some(data, "running"), self.desk.jobs
        name = one.job.id
        assert (
            jobs.complete(name)
            if way == "completed"
            else jobs.fail(name, NUMERIC if way == "failed" else STOPPED)
        )
        self.end(one, way)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), owner=OWNERS)
    def cancel(self, data: Any, owner: str) -> None:
        one = data.draw(st.sampled_from(list(self.known.values())))
        try:
            self.desk.jobs.cancel(one.job.id, owner)
        except UnknownJobError:
            assert owner != one.job.owner or one.ended is not None
            return
        except GoneError:
            assert one.ended is not None
            return
        assert owner == one.job.owner
        if one.state == "queued":
            self.end(one, "cancelled")
        assert one.job.stop.is_set()

    @rule()
    def everything_ends_twice(self) -> None:
        ended = [one for one in self.known.values() if one.ended is not None]
        for one in ended:
            assert not self.desk.jobs.complete(one.job.id)
            assert not self.desk.jobs.fail(one.job.id, NUMERIC)

    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds: int) -> None:
        self.desk.clock.time += seconds

    @rule()
    def expire_now(self) -> None:
        self.desk.queue.expire()
        self.expire()

    @rule(seconds=st.floats(0.01, 2))
    def measure(self, seconds: float) -> None:
        self.desk.pace.feed(1, 100, seconds)

    @precondition(lambda self: len(self.known) > 5)
    @rule()
    def drain(self) -> None:
        self.desk.queue.drain()
        self.draining = True

    @precondition(lambda self: len(self.known) > 5)
    @rule(dies=st.booleans())
    def stop(self, dies: bool) -> None:
        if dies:
            self.desk.jobs.fail_all(NUMERIC)
        else:
            self.desk.jobs.cancel_all("shutdown")
        for one in [*self.of("queued"), *(self.of("running") if dies else [])]:
            self.end(one, "failed" if dies else "cancelled")

    @invariant()
    def the_counters_balance(self) -> None:
        counts = self.desk.jobs.counts()
        states = ("completed", "failed", "cancelled", "queued", "running")
        assert counts.accepted == len(self.known) == sum(getattr(counts, state) for state in states)
        for state in states:
            assert getattr(counts, state) == len(self.of(state)), state

    @invariant()
    def nothing_is_lost_and_nothing_ends_twice(self) -> None:
        assert sorted(self.ends) == sorted(name for name, one in self.known.items() if one.ended is not None)
        for name, one in self.known.items():
            ends = [event for event in one.job.log.after(0).events if event.kind in TERMINAL]
            assert [event.kind for event in ends] == ([] if one.ended is None else [one.state])
            try:
                job = self.desk.jobs.get(name, one.job.owner)
            except (GoneError, UnknownJobError):
                assert one.ended is not None
            else:
                assert job.state == one.state

    @invariant()
    def the_bounds_hold(self) -> None:
        queue, there = self.desk.queue, [*self.of("queued"), *self.of("running")]
        for owner, share in (("a", 0.5), ("b", 0.5), ("ab", 1)):
            works = [one.job.submission.work for one in there if one.job.owner in owner]
            assert len(works) <= BOUNDS.jobs * share
            assert sum(work.input_bytes for work in works) <= BOUNDS.input_bytes * share
            assert sum(work.pixel_steps for work in works) <= BOUNDS.pixel_steps * share
        assert queue.load.jobs == len(there)
        assert self.desk.jobs.kept_bytes <= BOUNDS.result_bytes
        assert self.desk.jobs.records <= BOUNDS.records
        kept = [job for owner in "ab" for job in self.desk.jobs.owned(owner, 99)]
        assert self.desk.jobs.kept_bytes == sum(job.picture_bytes for job in kept)

    @invariant()
    def places_count_those_that_wait(self) -> None:
        waiting = sorted(self.of("queued"), key=lambda one: one.order)
        places = [self.desk.queue.place(one.job.id) for one in waiting]
        assert [place and place.position for place in places] == list(range(1, len(waiting) + 1))
        for one in self.of("running"):
            assert self.desk.queue.place(one.job.id) is None


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


class TestQueue(QueueMachine.TestCase): ...


def test_the_machine_sees_a_lost_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its invariants fail when a job vanishes, or the books are not kept."""
    machine = QueueMachine()
    machine.submit("a", None, "x", steps=1, input_bytes=0, priority=0, timeout_s=None)
    machine.the_counters_balance()
    machine.desk.jobs._there.clear()
    for check in (machine.the_counters_balance, machine.nothing_is_lost_and_nothing_ends_twice):
        with pytest.raises(AssertionError):
            check()
