from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import CancelledError, NumericError
from latentrt.serve.answers import answer_to
from latentrt.serve.jobs.admission import Load, Place, Queue, deadline_passed
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.jobs.job import ANYONE, Once, Submission
from latentrt.serve.jobs.pace import Pace, ends
from latentrt.serve.jobs.refusals import NeverInTimeError, RefusedError, TooLargeError
from latentrt.serve.jobs.table import Jobs
from tests.serve.serving import Desk, SetClock, asked, picture

WIDE = Bounds(jobs=100, input_bytes=10_000, pixel_steps=100_000, owner_share=1)
NUMERIC = NumericError("NaN", expected="numbers", fix="Export again.")


def refused(desk: Desk, owner: str, submission: Submission) -> RefusedError:
    before = desk.jobs.counts()
    with pytest.raises(RefusedError) as caught:
        desk.queue.submit(owner, submission)
    assert desk.jobs.counts() == before
    return caught.value


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────

FILLED: dict[str, Callable[[], Submission]] = {
    "jobs": asked,
    "input_bytes": lambda: asked(input_bytes=500),
    "pixel_steps": lambda: asked(50),
}
TIGHT = {
    "jobs": Bounds(jobs=4, owner_share=1),
    "input_bytes": Bounds(input_bytes=2000, owner_share=1),
    "pixel_steps": Bounds(pixel_steps=20_000, owner_share=1),
}
SHARED = {
    "jobs": Bounds(jobs=8),
    "input_bytes": Bounds(input_bytes=4000),
    "pixel_steps": Bounds(pixel_steps=40_000),
}


@pytest.mark.parametrize("bound", FILLED)
def test_a_full_queue_names_its_bound_and_ends_make_room(bound: str) -> None:
    desk, submission = Desk(TIGHT[bound]), FILLED[bound]
    for number in range(4):
        desk.queue.submit(f"owner {number}", submission())
    running = desk.queue.take()
    assert running is not None
    error = refused(desk, "b", submission())
    assert (error.bound, error.retry_after_s) == (bound, 1)
    assert "the queue is full" in error.found
    assert str(getattr(TIGHT[bound], bound)) in error.expected
    assert desk.queue.refused == {bound: 1}
    desk.jobs.complete(running.id)
    assert desk.queue.submit("b", submission())


@pytest.mark.parametrize("bound", FILLED)
def test_one_owner_has_a_share_and_leaves_the_rest_to_others(bound: str) -> None:
    desk, submission = Desk(SHARED[bound]), FILLED[bound]
    for _ in range(4):
        desk.queue.submit("a", submission())
    error = refused(desk, "a", submission())
    assert (error.bound, "your share" in error.found) == (f"owner_{bound}", True)
    for _ in range(4):
        desk.queue.submit("b", submission())
    assert refused(desk, "c", submission()).bound == bound


@pytest.mark.parametrize("bound", FILLED)
def test_without_keys_everybody_may_have_everything(bound: str) -> None:
    desk, submission = Desk(SHARED[bound]), FILLED[bound]
    for _ in range(8):
        desk.queue.submit(ANYONE, submission())
    assert refused(desk, ANYONE, submission()).bound == bound


@pytest.mark.parametrize(
    ("submission", "found"),
    [
        (asked(input_bytes=5001), "5001 bytes of input"),
        (asked(501), "50100 pixel-steps"),
        (asked(9, pictures=80), "72000"),
    ],
)
def test_what_no_queue_would_take_is_refused_for_good(submission: Submission, found: str) -> None:
    desk = Desk(Bounds(input_bytes=10_000, pixel_steps=100_000))
    with pytest.raises(TooLargeError, match=found):
        desk.queue.submit("a", submission)
    assert desk.queue.load == Load()
    assert desk.queue.submit(ANYONE, submission), "which may have more than a share"


def test_a_share_is_one_job_at_least() -> None:
    desk = Desk(Bounds(jobs=1, owner_share=0.1))
    assert desk.queue.submit("a", asked())
    assert refused(desk, "a", asked()).bound == "jobs"


def test_a_repeated_submission_is_no_new_job_even_where_none_is_taken() -> None:
    desk = Desk(Bounds(jobs=1, owner_share=1))
    once = Once(key="k", body="x")
    job = desk.queue.submit("a", asked(once=once))
    desk.queue.drain()
    assert desk.queue.submit("a", asked(once=once)) is job


def test_a_draining_queue_refuses_all_and_goes_on_with_what_is_there() -> None:
    desk = Desk(WIDE)
    desk.pace.feed(1, 100, 7)
    desk.queue.submit("a", asked())
    assert not desk.queue.draining
    desk.queue.drain()
    assert desk.queue.draining
    error = refused(desk, "a", asked())
    assert (error.bound, error.retry_after_s) == ("draining", 7)
    assert desk.queue.take() is not None
    assert desk.queue.refused == {"draining": 1}


# ── estimates ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_pace_follows_what_is_measured() -> None:
    pace = Pace()
    assert (pace.seconds_per_pixel_step, pace.seconds(1, 5)) == (None, None)
    pace.feed(0, 0, 1)
    pace.feed(1, 5, 0)
    assert pace.seconds_per_pixel_step is None
    pace.feed(2, 200, 2)
    assert pace.seconds(1, 50) == pytest.approx(0.5), "pixels alone"
    pace.feed(1, 100, 2)
    assert pace.seconds(1, 100) == pytest.approx(0.8 * 1 + 0.2 * 2)
    for _ in range(100):
        pace.feed(1, 100, 3)
    assert pace.seconds_per_pixel_step == pytest.approx(0.03)


@pytest.mark.parametrize("order", ["tiny first", "mixed"])
def test_a_large_picture_is_not_told_the_pace_of_tiny_ones(order: str) -> None:
    """A step of 0.02 s and 0.1 s for 512 x 512: a mean over pixels would tell 64 x 64 six times its pace."""
    side, tiny = 512**2, 64**2

    def seconds(steps: int, pixel_steps: int) -> float:
        return 0.02 * steps + 0.1 * pixel_steps / side

    pace = Pace()
    pace.feed(2, 2 * side, seconds(2, 2 * side))
    generator = np.random.default_rng(0)
    for number in range(400):
        pixels = tiny if order == "tiny first" or number % 2 else side
        noise = generator.uniform(0.9, 1.1)
        pace.feed(5, 5 * pixels, noise * seconds(5, 5 * pixels))
    for pixels in (tiny, side):
        assert pace.seconds(20, 20 * pixels) == pytest.approx(seconds(20, 20 * pixels), rel=0.25)


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_jobs_that_take_turns_end_as_a_simulation_says(at_once: int) -> None:
    """Round by round, one after the other."""
    generator = np.random.default_rng(at_once)
    for _ in range(50):
        count = int(generator.integers(0, 9))
        jobs = [(int(generator.integers(0, 9)), float(generator.uniform(0.1, 1))) for _ in range(count)]
        now, waiting, running, wanted = 0.0, list(range(len(jobs))), [], [0.0] * len(jobs)
        left = [rounds for rounds, _ in jobs]
        while waiting or running:
            running += [waiting.pop(0) for _ in range(min(at_once - len(running), len(waiting)))]
            if all(left[one] for one in running):
                now += sum(jobs[one][1] for one in running)
                for one in running:
                    left[one] -= 1
            for one in running:
                wanted[one] = now
            running = [one for one in running if left[one]]
        assert ends(jobs, at_once) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("seconds_per_step", "steps", "done", "expected"),
    [(0.001, 5, 0, 1), (1, 5, 0, 10), (1, 5, 3, 7), (1, 5, 99, 5), (1.01, 5, 0, 11), (50, 5, 0, 120)],
)
def test_retry_after_is_the_time_of_all_that_is_there_within_bounds(
    seconds_per_step: float, steps: int, done: int, expected: int
) -> None:
    """Two jobs, of which one runs."""
    desk = Desk(Bounds(jobs=2, owner_share=1))
    desk.pace.feed(1, 100, seconds_per_step)
    for _ in range(2):
        desk.queue.submit("a", asked(steps))
    running = desk.queue.take()
    assert running is not None
    desk.queue.progress(running.id, done * 100)
    desk.queue.progress("no job", 100)
    assert refused(desk, "a", asked()).retry_after_s == expected


def test_how_much_of_a_job_is_done() -> None:
    desk = Desk(Bounds())
    job = desk.queue.submit("a", asked(4))
    assert desk.queue.share_done(job.id) == 0
    desk.queue.take()
    desk.queue.progress(job.id, 300)
    assert desk.queue.share_done(job.id) == 0.75
    desk.queue.progress(job.id, 500)
    assert desk.queue.share_done(job.id) == 1
    desk.jobs.complete(job.id)
    assert desk.queue.share_done(job.id) == 0


def test_places_and_estimates_of_those_that_wait() -> None:
    desk = Desk(WIDE)
    first, second, third = (desk.queue.submit("a", asked(steps)) for steps in (10, 20, 30))
    assert desk.queue.place(second.id) == Place(position=2, eta_s=None)
    desk.pace.feed(1, 100, 1)
    assert desk.queue.take() is not None
    desk.queue.progress(first.id, 400)
    assert desk.queue.place(first.id) is None
    assert desk.queue.place(second.id) == Place(position=1, eta_s=pytest.approx(26))
    assert desk.queue.place(third.id) == Place(position=2, eta_s=pytest.approx(56))
    urgent = desk.queue.submit("a", asked(5, priority=1))
    assert desk.queue.place(urgent.id) == Place(position=1, eta_s=pytest.approx(11))
    assert desk.queue.place(third.id) == Place(position=3, eta_s=pytest.approx(61))


def test_a_move_looks_at_each_that_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(WIDE)
    for _ in range(100):
        desk.queue.submit("a", asked())
    counted: list[int] = []
    monkeypatch.setattr(desk.pace, "seconds", lambda *left: counted.append(left))
    desk.queue.take()
    assert len(counted) == 100, "who runs, too"


def test_events_tell_of_every_move_in_the_queue() -> None:
    desk = Desk(WIDE)
    desk.pace.feed(1, 100, 1)
    jobs = [desk.queue.submit("a", asked()) for _ in range(3)]
    desk.queue.take()
    desk.jobs.cancel(jobs[1].id, "a")
    assert desk.jobs.get(jobs[2].id, "a").log.after(0).events[-1].data["position"] == 1, "at once"
    desk.queue.take()
    told = [[(event.kind, event.data.get("position")) for event in job.log.after(0).events] for job in jobs]
    assert told == [
        [("queued", 1), ("started", None)],
        [("queued", 2), ("queued", 1), ("cancelled", None)],
        [("queued", 3), ("queued", 2), ("queued", 1), ("started", None)],
    ]
    assert jobs[2].log.after(0).events[0].data == {"position": 3, "eta_s": pytest.approx(3)}


# ── deadlines ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_that_the_estimate_exceeds_is_refused_at_once() -> None:
    desk = Desk(WIDE)
    assert desk.queue.submit("a", asked(10, timeout_s=0.1)), "no pace is known yet"
    desk.pace.feed(1, 100, 1)
    error = refused(desk, "a", asked(5, timeout_s=14.9))
    assert (error.bound, error.retry_after_s) == ("deadline", 10)
    assert "14.9 s" in error.found
    assert "15.0 s" in error.found
    assert desk.queue.submit("a", asked(5, timeout_s=15))
    assert refused(desk, "a", asked(5, timeout_s=15)).bound == "deadline"
    assert desk.queue.submit("a", asked(5, timeout_s=5, priority=1)), "it starts before the others"


def test_a_deadline_that_no_queue_would_meet_is_refused_for_good() -> None:
    desk = Desk(WIDE)
    desk.pace.feed(1, 100, 1)
    with pytest.raises(NeverInTimeError, match=r"a deadline in 4.9 s, for a job that takes 5.0 s by itself"):
        desk.queue.submit("a", asked(5, timeout_s=4.9))
    assert desk.queue.refused == {"deadline": 1}
    assert answer_to(NeverInTimeError("a", expected="b", fix="c")).status == 400, "no client tries again"


def test_a_short_job_does_not_wait_for_the_end_of_long_ones() -> None:
    desk = Desk(WIDE, at_once=2)
    desk.pace.feed(1, 100, 1)
    desk.queue.submit("a", asked(100))
    desk.queue.take()
    short = desk.queue.submit("a", asked(5, timeout_s=10))
    assert desk.queue.place(short.id) == Place(position=1, eta_s=pytest.approx(10)), "they take turns"
    error = refused(desk, "a", asked(5, timeout_s=14.9))
    assert "would be done in 20.0 s" in error.found, "when the other short one has ended: 10 and 2 x 5"


def test_a_job_waits_for_those_of_its_own_model() -> None:
    clock = SetClock()
    paces = {"": Pace(), "other": Pace()}
    queue = Queue(Jobs(WIDE, clock), WIDE, clock, paces, 1)
    paces[""].feed(1, 100, 100)
    paces["other"].feed(1, 100, 1)
    queue.submit("a", asked(50))
    job = queue.submit("a", replace(asked(5, timeout_s=6), model="other"))
    assert queue.place(job.id) == Place(position=2, eta_s=pytest.approx(5))
    assert queue.retry_after_s() == 120


def test_what_waits_past_its_deadline_fails_without_work() -> None:
    desk = Desk(WIDE)
    late = desk.queue.submit("a", asked(timeout_s=10))
    other = desk.queue.submit("a", asked(timeout_s=11))
    desk.clock.time += 9.9
    desk.queue.expire()
    assert desk.jobs.get(late.id, "a").state == "queued"
    desk.clock.time += 0.1
    assert desk.queue.take() == desk.jobs.get(other.id, "a")
    job = desk.jobs.get(late.id, "a")
    assert (job.state, job.started) == ("failed", None)
    assert job.error is not None
    assert (job.error.type, job.error.retryable) == ("deadline", True)
    assert "while the job waited" in job.error.found
    assert [event.kind for event in late.log.after(0).events] == ["queued", "failed"]


def test_expired_jobs_give_room_and_places() -> None:
    desk = Desk(Bounds(jobs=2, owner_share=1))
    desk.queue.submit("a", asked(timeout_s=1))
    second = desk.queue.submit("a", asked())
    desk.clock.time += 1
    third = desk.queue.submit("a", asked())
    assert [desk.queue.place(job.id) for job in (second, third)] == [
        Place(position=1, eta_s=None),
        Place(position=2, eta_s=None),
    ]


@pytest.mark.parametrize("way", ["expire", "cancel_all", "fail_all"])
def test_those_who_leave_together_are_not_moved_up_before(way: str) -> None:
    desk = Desk(WIDE)
    jobs = [desk.queue.submit("a", asked(timeout_s=5)) for _ in range(4)]
    desk.clock.time += 5
    if way == "expire":
        desk.queue.expire()
    elif way == "cancel_all":
        desk.jobs.cancel_all("shutdown")
    else:
        desk.jobs.fail_all(NUMERIC)
    end = "cancelled" if way == "cancel_all" else "failed"
    assert [[event.kind for event in job.log.after(0).events] for job in jobs] == [["queued", end]] * 4


def test_a_worker_ends_what_runs_past_its_deadline() -> None:
    desk = Desk(WIDE)
    desk.queue.submit("a", asked(timeout_s=1))
    job = desk.queue.take()
    assert job is not None
    desk.clock.time += 2
    desk.queue.expire()
    assert desk.jobs.get(job.id, "a").state == "running", "which only its worker can end"
    desk.jobs.fail(job.id, deadline_passed("ran"))
    error = desk.jobs.get(job.id, "a").error
    assert error is not None
    assert (error.type, error.found) == ("deadline", "the deadline passed while the job ran")


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────


def test_higher_priorities_start_first_and_then_who_came_first() -> None:
    desk = Desk(WIDE)
    jobs = [desk.queue.submit("a", asked(priority=priority)) for priority in (0, 5, -1, 5, 0)]
    taken: list[Any] = []
    while (job := desk.queue.take()) is not None:
        taken.append(job.id)
    assert taken == [jobs[number].id for number in (1, 3, 0, 4, 2)]


def test_however_a_job_ends_the_queue_knows() -> None:
    desk = Desk(WIDE)
    ways: list[Callable[[str], object]] = [
        desk.jobs.complete,
        lambda name: desk.jobs.fail(name, NUMERIC),
        lambda name: desk.jobs.fail(name, CancelledError("a", expected="b", fix="c")),
        lambda name: desk.jobs.fail_all(NUMERIC),
    ]
    for end in ways:
        job = desk.queue.submit("a", asked(3, input_bytes=7))
        assert desk.queue.take() is not None
        assert desk.queue.load == Load(jobs=1, input_bytes=7, pixel_steps=300)
        end(job.id)
        assert desk.queue.load == Load()
    for end_waiting in (
        lambda job: desk.jobs.cancel(job.id, "a"),
        lambda job: desk.jobs.cancel_all("shutdown"),
    ):
        end_waiting(desk.queue.submit("a", asked()))
        assert (desk.queue.load, desk.queue.take()) == (Load(), None)
    started = desk.queue.submit("a", asked())
    desk.jobs.start(started.id)
    assert desk.queue.take() is None, "what the table starts is not started again"


def test_a_thousand_cancels_and_the_next_job_completes() -> None:
    """Report 3: after hours one abort aborted all later ones."""
    desk = Desk(WIDE)
    for number in range(1000):
        job = desk.queue.submit("a", asked())
        if number % 2:
            assert desk.queue.take() is not None
        desk.jobs.cancel(job.id, "a")
        if number % 2:
            desk.jobs.fail(job.id, CancelledError("a", expected="b", fix="c"))
    job = desk.queue.submit("a", asked())
    taken = desk.queue.take()
    assert taken is not None
    assert not taken.stop.is_set()
    assert desk.jobs.keep(job.id, picture(1))
    assert desk.jobs.complete(job.id)
    assert (desk.jobs.counts().cancelled, desk.jobs.counts().completed) == (1000, 1)
