import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from latentrt.engines.errors import CancelledError, LatentrtError, MemoryLimitError, NumericError
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.jobs.events import TERMINAL
from latentrt.serve.jobs.failure import INTERNAL, Failure, without_paths
from latentrt.serve.jobs.job import Job, Once
from latentrt.serve.jobs.refusals import (
    DeadlineError,
    GoneError,
    IdempotencyKeyError,
    IdempotencyMismatchError,
    UnknownJobError,
    UnknownPictureError,
)
from latentrt.serve.jobs.table import Jobs
from tests.serve.serving import Desk, SetClock, asked, picture

BOUNDS = Bounds(result_seconds=100, result_bytes=1000, records=8)
NUMERIC = NumericError("NaN in /home/somebody/model.onnx", expected="numbers", fix="Export again.")
STOPPED = CancelledError("stopped", expected="pictures", fix="Ask again.")


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def jobs(clock: SetClock) -> Jobs:
    return Jobs(BOUNDS, clock)


ASK = "Leave it out, or ask who runs this server."


def ran(jobs: Jobs, *sizes: int, owner: str = "a", once: Once | None = None) -> str:
    """The id of a job that has completed with pictures of these sizes."""
    name = jobs.add(owner, asked(once=once)).id
    assert jobs.start(name)
    for index, size in enumerate(sizes):
        assert jobs.keep(name, picture(size, index))
    assert jobs.complete(name)
    return name


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_goes_from_queued_through_running_to_completed(jobs: Jobs, clock: SetClock) -> None:
    seen: list[tuple[str, float | None, float | None]] = []
    jobs.watch(lambda job: seen.append((job.state, job.started, job.ended)))
    name = jobs.add("a", asked(timeout_s=50)).id
    assert jobs.get(name, "a").deadline == 1050
    clock.time = 1001
    started = jobs.start(name)
    assert started is not None
    assert started.submission.request == ["what the worker reads"]
    assert jobs.start(name) is None
    clock.time = 1003
    assert jobs.complete(name)
    job = jobs.get(name, "a")
    assert (job.state, job.created, job.started, job.ended) == ("completed", 1000, 1001, 1003)
    assert seen == [("queued", None, None), ("running", 1001, None), ("completed", 1001, 1003)]
    assert job.submission.request is None, "a start picture would stay in memory"


ENDS: dict[str, Callable[[Jobs, str], object]] = {
    "completed": lambda jobs, name: jobs.complete(name),
    "failed": lambda jobs, name: jobs.fail(name, NUMERIC),
    "cancelled": lambda jobs, name: jobs.fail(name, STOPPED),
}


@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("second", ENDS)
def test_a_job_ends_once(jobs: Jobs, first: str, second: str) -> None:
    name = jobs.add("a", asked()).id
    jobs.start(name)
    assert ENDS[first](jobs, name) is True
    job = jobs.get(name, "a")
    assert job.state == first
    assert ENDS[second](jobs, name) is False
    assert jobs.start(name) is None
    assert jobs.keep(name, picture(1)) is False
    assert jobs.cancel(name, "a") is job
    assert jobs.get(name, "a") is job
    assert [event.kind for event in job.log.after(0).events] == ["started", first]
    counts = jobs.counts()
    assert (counts.accepted, counts.completed + counts.failed + counts.cancelled) == (1, 1)


def test_what_waits_is_neither_completed_nor_given_pictures(jobs: Jobs) -> None:
    name = jobs.add("a", asked()).id
    assert jobs.complete(name) is False
    assert jobs.keep(name, picture(1)) is False
    assert jobs.get(name, "a").state == "queued"


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_when_its_worker_sees_it(jobs: Jobs) -> None:
    waiting, running = jobs.add("a", asked()), jobs.add("a", asked())
    jobs.start(running.id)
    assert jobs.cancel(waiting.id, "a").state == "cancelled"
    assert waiting.stop.is_set()
    assert not running.stop.is_set()
    assert jobs.cancel(running.id, "a", "disconnect").state == "running"
    assert running.stop.is_set()
    assert jobs.cancel(running.id, "a").cancel_reason == "disconnect", "the first reason stays"
    assert jobs.keep(running.id, picture(3))
    assert jobs.fail(running.id, STOPPED)
    job = jobs.get(running.id, "a")
    assert (job.state, job.cancel_reason, job.error) == ("cancelled", "disconnect", None)
    assert job.log.after(0).events[-1].data["reason"] == "disconnect"
    assert jobs.picture(running.id, "a", 0).data == bytes(3), "finished pictures are not lost"


def test_at_shutdown_all_are_cancelled_and_at_the_workers_death_all_fail(jobs: Jobs) -> None:
    first = [jobs.add(owner, asked()) for owner in "abc"]
    jobs.start(first[0].id)
    jobs.cancel_all("shutdown")
    assert [jobs.get(job.id, job.owner).state for job in first] == ["running", "cancelled", "cancelled"]
    assert all(job.stop.is_set() for job in first)
    second = [jobs.add(owner, asked()) for owner in "abc"]
    jobs.start(second[2].id)
    jobs.fail_all(RuntimeError("0x7f00 in /srv/secret"))
    ended = [jobs.get(job.id, job.owner) for job in (first[0], *second)]
    assert [job.state for job in ended] == ["failed"] * 4
    assert all(job.error == INTERNAL and job.stop.is_set() for job in ended)
    assert jobs.complete(first[0].id) is False, "a worker that still lives changes nothing"


# ── who sees what, and for how long ─────────────────────────────────────────────────────────────────────


def test_ten_thousand_ids_of_one_moment_differ_and_have_128_bits(clock: SetClock) -> None:
    """Report 16: jobs of the same second shared an id."""
    jobs = Jobs(Bounds(), clock)
    names = [jobs.add("a", asked()).id for _ in range(10_000)]
    assert len(set(names)) == 10_000
    assert {len(bytes.fromhex(name)) for name in names} == {16}
    ones = Counter(bit for name in names for bit in range(128) if int(name, 16) >> bit & 1)
    assert all(4_500 < ones[bit] < 5_500 for bit in range(128)), "a bit that is no coin"


def test_another_owner_sees_what_nobody_has(jobs: Jobs) -> None:
    name = ran(jobs, 10)
    texts: list[str] = []
    for call in (
        lambda: jobs.get(name, "b"),
        lambda: jobs.cancel(name, "b"),
        lambda: jobs.picture(name, "b", 0),
        lambda: jobs.get("0" * 32, "b"),
    ):
        with pytest.raises(UnknownJobError, match="unknown job") as caught:
            call()
        texts.append(str(caught.value))
    assert len(set(texts)) == 1
    assert jobs.owned("b", 9) == ()


def test_owned_jobs_are_listed_newest_first(jobs: Jobs, clock: SetClock) -> None:
    names: list[str] = []
    for _ in range(3):
        names.append(ran(jobs, 1))
        clock.time += 1
    names.append(jobs.add("a", asked()).id)
    jobs.add("b", asked())
    assert [job.id for job in jobs.owned("a", 9)] == names[::-1]
    assert [job.id for job in jobs.owned("a", 2)] == names[:1:-1]


def test_a_result_is_kept_then_gone_then_unknown(jobs: Jobs, clock: SetClock) -> None:
    name = ran(jobs, 10)
    clock.time = 1099.9
    assert jobs.picture(name, "a", 0).sha256 == hashlib.sha256(bytes(10)).hexdigest()
    clock.time = 1100
    assert jobs.kept_bytes == 0
    with pytest.raises(GoneError, match="gone"):
        jobs.get(name, "a")
    with pytest.raises(UnknownJobError):
        jobs.get(name, "b")
    clock.time = 1199.9
    with pytest.raises(GoneError):
        jobs.picture(name, "a", 0)
    clock.time = 1200
    with pytest.raises(UnknownJobError):
        jobs.get(name, "a")
    assert jobs.records == 0


def test_a_late_look_does_not_make_a_tombstone_stand_longer(jobs: Jobs, clock: SetClock) -> None:
    name = ran(jobs, 10)
    clock.time = 1150
    with pytest.raises(GoneError):
        jobs.get(name, "a")
    clock.time = 1200
    with pytest.raises(UnknownJobError):
        jobs.get(name, "a")


def test_fetched_results_go_first_and_the_longest_unused_of_them(jobs: Jobs) -> None:
    names = [ran(jobs, 250) for _ in range(4)]
    for number in (2, 1, 2):
        jobs.picture(names[number], "a", 0)
    gone: list[int] = []
    for _ in range(4):
        ran(jobs, 250)
        for number, name in enumerate(names):
            try:
                jobs.get(name, "a")
            except GoneError:
                gone += [number] * (number not in gone)
        assert jobs.kept_bytes == 1000
    assert gone == [1, 2, 0, 3]


def test_pictures_of_running_jobs_are_never_dropped_and_never_above_the_bound(jobs: Jobs) -> None:
    kept = ran(jobs, 900)
    name = jobs.add("a", asked()).id
    jobs.start(name)
    assert jobs.keep(name, picture(100))
    assert jobs.get(kept, "a")
    with pytest.raises(MemoryLimitError, match="1001 bytes"):
        jobs.keep(name, picture(901, 1))
    assert jobs.get(kept, "a"), "room that would not be enough is not made"
    assert jobs.keep(name, picture(900, 1))
    with pytest.raises(GoneError):
        jobs.get(kept, "a")
    assert jobs.kept_bytes == 1000
    assert [len(one.data) for one in jobs.get(name, "a").pictures] == [100, 900]


def test_a_picture_that_is_fetched_early_keeps_its_running_job(jobs: Jobs) -> None:
    name = jobs.add("a", asked()).id
    jobs.start(name)
    jobs.keep(name, picture(400))
    assert jobs.picture(name, "a", 0).data == bytes(400)
    ended = ran(jobs, 600)
    assert jobs.keep(name, picture(600, 1))
    with pytest.raises(GoneError):
        jobs.get(ended, "a")
    assert jobs.complete(name)
    assert len(jobs.get(name, "a").pictures) == 2


def test_a_picture_that_is_not_there_is_named(jobs: Jobs) -> None:
    name = jobs.add("a", asked()).id
    with pytest.raises(UnknownPictureError, match="picture 0 of a job that is queued and has 0"):
        jobs.picture(name, "a", 0)


def test_records_have_a_bound_and_the_oldest_go(jobs: Jobs) -> None:
    names = [ran(jobs, 1) for _ in range(12)]
    assert jobs.records == 8
    for name in names[:4]:
        with pytest.raises(UnknownJobError):
            jobs.get(name, "a")
    assert [job.id for job in jobs.owned("a", 99)] == names[4:]
    assert jobs.kept_bytes == 8


def test_tombstones_go_before_results(jobs: Jobs, clock: SetClock) -> None:
    old = [ran(jobs, 1) for _ in range(6)]
    clock.time = 1100
    new = [ran(jobs, 1) for _ in range(7)]
    assert [job.id for job in jobs.owned("a", 99)] == new
    with pytest.raises(UnknownJobError):
        jobs.get(old[4], "a")
    with pytest.raises(GoneError):
        jobs.get(old[5], "a")


def test_a_table_that_keeps_nothing_still_ends_jobs(clock: SetClock) -> None:
    jobs = Jobs(Bounds(records=0), clock)
    name = jobs.add("a", asked(once=Once(key="k", body="x"))).id
    assert jobs.cancel(name, "a").state == "cancelled"
    with pytest.raises(UnknownJobError):
        jobs.get(name, "a")
    assert jobs.find("a", Once(key="k", body="y")) is None


# ── idempotency ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_key_and_body_is_the_same_job_as_long_as_it_is_kept(clock: SetClock) -> None:
    desk = Desk(BOUNDS)
    jobs, queue, once = desk.jobs, desk.queue, Once(key="k", body="x")
    first = queue.submit("a", asked(once=once))
    assert queue.submit("a", asked(once=once)) is first
    assert queue.take() is not None
    assert queue.submit("a", asked(once=once)).state == "running"
    jobs.complete(first.id)
    again = queue.submit("a", asked(once=once))
    assert (again.id, again.state) == (first.id, "completed")
    assert queue.submit("b", asked(once=once)).id != first.id, "keys are an owner's own"
    with pytest.raises(IdempotencyMismatchError, match="another request"):
        queue.submit("a", asked(once=Once(key="k", body="y")))
    assert jobs.counts().accepted == 2
    desk.clock.time += 100
    assert queue.submit("a", asked(once=Once(key="k", body="y"))).id != first.id


def test_the_table_itself_takes_no_second_job_of_a_key(jobs: Jobs) -> None:
    jobs.add("a", asked(once=Once(key="k", body="x")))
    with pytest.raises(IdempotencyMismatchError, match="has a job"):
        jobs.add("a", asked(once=Once(key="k", body="x")))


@pytest.mark.parametrize("key", ["", "a" * 256, "a\n", "ä", "\x7f"])
def test_a_key_is_short_and_printable(key: str) -> None:
    with pytest.raises(IdempotencyKeyError, match="idempotency key"):
        Once(key=key, body="x")
    assert Once(key="a" * 255, body="x")


# ── what is told of errors ──────────────────────────────────────────────────────────────────────────────


def test_an_error_is_told_in_its_parts_without_paths(jobs: Jobs) -> None:
    name = jobs.add("a", asked()).id
    jobs.start(name)
    jobs.fail(name, NUMERIC)
    job = jobs.get(name, "a")
    told = {
        "type": "numeric",
        "found": "NaN in model.onnx",
        "expected": "numbers",
        "fix": "Export again.",
        "retryable": False,
    }
    assert job.error is not None
    assert job.error.record() == told
    assert json.loads(json.dumps(job.log.after(0).events[-1].data)) == {"images": [], "error": told}


def test_of_an_error_that_is_not_ours_nothing_is_told() -> None:
    """Report 46."""
    assert Failure.of(RuntimeError("/srv/secret")) is INTERNAL
    assert "/" not in str(INTERNAL.record())


@pytest.mark.parametrize(
    ("fix", "told"),
    [
        ("Pass image=… (--image), or leave mask_image out.", "Send image, or leave mask_image out."),
        ("Pass image=…, or --image FILE.", "Send image."),
        ("Write num_inference_steps=…", "Write num_inference_steps"),
        ("Leave it out: control_type, or --control-type", "Leave it out: control_type"),
        (
            "Say what: control_type='depth' (--control-type depth)",
            "Say what: control_type='depth'",
        ),
        ("Load it first: pipe.load_lora_weights(FILE), --lora FILE, or --lora-dir FOLDER", ASK),
        ("Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE", ASK),
        (
            "Leave x out, or start the server with --lenient",
            "Leave x out, or start the server with --lenient",
        ),
        ("Use 64 or 72.", "Use 64 or 72."),
        ("Send base64, one picture a field.", "Send base64, one picture a field."),
    ],
)
def test_advice_is_for_who_sends_requests(fix: str, told: str) -> None:
    assert Failure.of(NumericError("a", expected="b", fix=fix)).fix == told


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (MemoryLimitError, ("memory_limit", True)),
        (DeadlineError, ("deadline", True)),
        (NumericError, ("numeric", False)),
    ],
)
def test_programs_learn_the_type_and_whether_another_try_may_help(
    kind: type[LatentrtError], expected: tuple[str, bool]
) -> None:
    failure = Failure.of(kind("a", expected="b", fix="c"))
    assert (failure.type, failure.retryable) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "/home/me/my models/x.safetensors is no file; expected a/b",
            "x.safetensors is no file; expected a/b",
        ),
        (r"C:\Users\me\x.onnx is bad", "x.onnx is bad"),
        (r"\\server\share\x.onnx", "x.onnx"),
        ("file:///etc/passwd and ~/.cache/x", "x"),
        ("run: latentrt build '/a b/c' --x", "run: latentrt build 'c' --x"),
        ("path=/etc/x, (/a/b/c)", "path=x, (c)"),
        ("fp16/fp32, 1/2, H/8, a / b", "fp16/fp32, 1/2, H/8, a / b"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("cannot identify <BytesIO object at 0x7f3a10>", "cannot identify <BytesIO object at (address)>"),
    ],
)
def test_paths_are_cut_to_names_and_addresses_go(text: str, told: str) -> None:
    assert without_paths(text) == told


# ── many threads ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that take turns as often as they can, also within a line."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_eight_threads_on_one_table_lose_nothing_and_end_nothing_twice() -> None:
    desk = Desk(Bounds(jobs=100_000, owner_share=1, records=100_000, result_bytes=2000))
    jobs, queue = desk.jobs, desk.queue
    ends = Counter[str]()
    added: list[Job] = []

    def watch(job: Job) -> None:  # under the table's lock
        ends[job.id] += job.ended is not None
        if job.state == "queued":
            added.append(job)

    jobs.watch(watch)
    won = Counter[str]()
    lock = threading.Lock()

    def end(name: str, turn: int) -> None:
        done = jobs.complete(name) if turn % 3 else jobs.fail(name, NUMERIC if turn % 2 else STOPPED)
        with lock:
            won[name] += done

    def hammer(thread: int) -> None:
        for turn in range(300):
            owner = f"owner {thread % 3}"
            queue.submit(owner, asked(priority=turn % 3))
            if (job := queue.take()) is not None:
                jobs.keep(job.id, picture(10))
                end(job.id, turn)
            other = added[turn * 7 % len(added)]
            with suppress(GoneError):  # others' pictures have taken its room
                jobs.cancel(other.id, other.owner)
            end(other.id, turn)
            jobs.owned(owner, 5)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(hammer, range(8))) == [None] * 8
    while (job := queue.take()) is not None:
        end(job.id, 1)
    counts = jobs.counts()
    assert counts.accepted == 2400 == len(added) == len(ends)
    assert counts.completed + counts.failed + counts.cancelled == 2400
    assert set(ends.values()) == {1}
    assert max(won.values()) == 1
    assert queue.load.jobs == 0
    assert jobs.kept_bytes <= 2000
    for job in added:
        (last,) = (event for event in job.log.after(0).events if event.kind in TERMINAL)
        assert last.number == job.log.after(0).events[-1].number
