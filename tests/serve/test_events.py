import asyncio
import threading
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.jobs.events import TERMINAL, Event, EventLog, Kind
from latentrt.serve.waiting import unless_gone
from tests.serve.serving import SetClock


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


def log_of(clock: SetClock, events: int = 256, pictures: int = 1) -> EventLog:
    return EventLog(Bounds(events=events), clock, pictures)


def kinds(events: tuple[Event, ...]) -> list[Kind]:
    return [event.kind for event in events]


def test_numbers_increase_and_a_reader_gets_what_came_later(clock: SetClock) -> None:
    log = log_of(clock)
    log.append("queued", {"position": 2})
    log.append("started", {})
    log.step(0, {"index": 1})
    reading = log.after(0)
    assert (reading.snapshot, reading.ended) == (None, False)
    assert [event.number for event in reading.events] == [1, 2, 3]
    assert kinds(reading.events) == ["queued", "started", "step"]
    assert log.after(-1) == reading
    assert kinds(log.after(2).events) == ["step"]
    assert log.after(3).events == ()
    log.append("completed", {"images": []})
    assert kinds(log.after(3).events) == ["completed"]
    assert log.after(4).events == ()
    assert log.after(4).ended


def test_who_looks_on_once_is_told_all(clock: SetClock) -> None:
    log = log_of(clock)
    log.append("started", {})
    for index in range(3):
        log.step(1, {"index": index})
    log.append("preview", {"data": b"x"})
    assert (log.told.state, log.told.steps, log.told.preview) == (
        "started",
        {1: {"index": 2}},
        {"data": b"x"},
    )
    log.append("completed", {})
    assert log.told.preview is None


@pytest.mark.parametrize("kind", sorted(TERMINAL))
def test_nothing_follows_the_end(clock: SetClock, kind: Kind) -> None:
    log = log_of(clock)
    log.append(kind, {})
    log.append("completed", {"late": True})
    log.step(0, {"index": 1})
    assert kinds(log.after(0).events) == [kind]
    assert log.after(0).events[0].data == {}


def test_of_previews_only_the_newest_is_kept(clock: SetClock) -> None:
    log = log_of(clock)
    for number in range(50):
        log.append("preview", {"data": bytes([number])})
        log.append("queued", {"position": number})
    reading = log.after(0)
    assert reading.snapshot is None, "a preview that was replaced is not missed"
    assert [event.data for event in reading.events if event.kind == "preview"] == [{"data": b"\x31"}]
    assert len(reading.events) == 51


def test_an_ended_log_keeps_what_still_means_something(clock: SetClock) -> None:
    log = log_of(clock)
    log.append("started", {})
    log.step(0, {"index": 1})
    log.append("preview", {"data": b"large"})
    log.append("image", {"index": 0})
    log.append("completed", {})
    reading = log.after(0)
    assert reading.snapshot is None
    assert kinds(reading.events) == ["started", "image", "completed"]
    told = log.after(99).snapshot
    assert told is not None
    assert (told.preview, told.steps) == (None, {0: {"index": 1}})


def test_who_comes_too_late_gets_a_snapshot_and_goes_on_from_there(clock: SetClock) -> None:
    log = log_of(clock, events=4)
    log.append("queued", {"position": 1})
    log.append("started", {})
    log.append("image", {"index": 0})
    for index in range(1, 11):
        clock.time += 1
        log.step(0, {"index": index})
    log.append("preview", {"data": b"p"})
    assert kinds(log.after(10).events) == ["step", "step", "step", "preview"]
    assert log.after(10).snapshot is None
    reading = log.after(9)
    told = reading.snapshot
    assert told is not None
    assert (reading.events, told.number, told.state) == ((), 14, "started")
    assert (told.position, told.steps, told.images) == ({"position": 1}, {0: {"index": 10}}, ({"index": 0},))
    assert told.preview == {"data": b"p"}
    assert log.after(told.number).events == ()
    log.append("image", {"index": 1})
    assert kinds(log.after(told.number).events) == ["image"]


@pytest.mark.parametrize("number", [0, 3, 99])
def test_the_end_is_kept_for_every_reader(clock: SetClock, number: int) -> None:
    """Also for one that names a number of the server's last life."""
    log = log_of(clock, events=3)
    for index in range(6):
        log.append("image", {"index": index})
    log.append("failed", {"error": {}})
    reading = log.after(number)
    assert reading.snapshot is not None
    assert (reading.snapshot.number, len(reading.snapshot.images), reading.ended) == (6, 6, True)
    assert [(event.number, event.kind) for event in reading.events] == [(7, "failed")]


def test_a_number_from_another_life_gives_a_snapshot(clock: SetClock) -> None:
    log = log_of(clock)
    log.append("queued", {"position": 1})
    reading = log.after(40)
    assert reading.snapshot is not None
    assert (reading.snapshot.number, reading.snapshot.state, reading.events) == (1, "queued", ())


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 19), st.integers(0, 400)), max_size=300))
def test_no_second_has_more_than_twenty_steps(pictures: int, steps: list[tuple[int, int]]) -> None:
    clock = SetClock(0)
    log = log_of(clock, pictures=pictures)
    told: list[float] = []
    last: dict[int, int] = {}
    for index, (picture, milliseconds) in enumerate(steps):
        clock.time += milliseconds / 1000
        before = len(log.after(0).events)
        log.step(picture % pictures, {"index": index})
        last[picture % pictures] = index
        told += [clock.time] * (len(log.after(0).events) - before)
    for time in told:
        assert sum(time <= other < time + 1 - 1e-9 for other in told) <= 20
    snapshot = log.after(10**6).snapshot
    assert snapshot is not None
    assert {picture: data["index"] for picture, data in snapshot.steps.items()} == last


@pytest.mark.parametrize(("every", "expected"), [(0.25, 20), (0.0625, 5)])
def test_slow_steps_are_all_told_and_of_fast_ones_each_picture_gets_its_share(
    clock: SetClock, every: float, expected: int
) -> None:
    """Four pictures have five events each in a second; the times are exact in binary."""
    log = log_of(clock, pictures=4)
    for index in range(20):
        for picture in range(4):
            log.step(picture, {"picture": picture, "index": index})
        clock.time += every
    events = log.after(0).events
    counts = [sum(event.data["picture"] == picture for event in events) for picture in range(4)]
    assert counts == [expected] * 4


KINDS = st.sampled_from(["queued", "started", "step", "preview", "image"])


@given(st.lists(st.tuples(KINDS, st.booleans()), max_size=60), st.booleans())
def test_a_reader_at_any_pace_learns_of_every_picture_and_of_the_end(
    writes: list[tuple[Any, bool]], ends: bool
) -> None:
    """What it is told adds up to what has happened, in order and without repetition."""
    clock = SetClock(0)
    log = log_of(clock, events=5)
    images: list[int] = []
    number = 0
    kinds_seen: list[Kind] = []

    def read() -> bool:
        nonlocal number, images
        reading = log.after(number)
        if reading.snapshot is not None:
            assert reading.snapshot.number != number
            number = reading.snapshot.number
            images = [data["index"] for data in reading.snapshot.images]
        for event in reading.events:
            assert event.number > number
            number = event.number
            kinds_seen.append(event.kind)
            images += [event.data["index"]] if event.kind == "image" else []
        return reading.ended

    wanted = 0
    for kind, looks in writes:
        clock.time += 1
        log.append(kind, {"index": wanted})
        wanted += kind == "image"
        if looks:
            assert not read()
        assert len(log.after(number).events) <= 5
    if ends:
        log.append("cancelled", {})
    assert read() is ends
    assert images == list(range(wanted))
    assert kinds_seen.count("cancelled") == ends


# ── readers that wait ───────────────────────────────────────────────────────────────────────────────────


def test_readers_are_nudged_until_they_leave(clock: SetClock) -> None:
    log = log_of(clock)
    nudges: list[str] = []
    leave = log.watch(lambda: nudges.append("a"))
    log.watch(lambda: nudges.append("b"))
    log.append("started", {})
    log.step(0, {})
    log.step(0, {"told": "too soon"})
    leave()
    leave()
    log.append("completed", {})
    log.append("completed", {})
    assert nudges == ["a", "b", "a", "b", "b"]


def test_a_reader_whose_loop_is_closed_is_dropped_and_stalls_nobody(clock: SetClock) -> None:
    log = log_of(clock)
    loop, nudges = asyncio.new_event_loop(), list[int]()
    loop.close()
    calls: list[int] = []

    def closed() -> None:
        calls.append(1)
        loop.call_soon_threadsafe(int)

    log.watch(closed)
    log.watch(lambda: nudges.append(1))
    for _ in range(3):
        log.append("queued", {})
    assert (len(calls), len(nudges)) == (1, 3)


def test_a_reader_may_read_and_leave_where_it_is_nudged(clock: SetClock) -> None:
    log = log_of(clock)
    seen: list[int] = []

    def wake() -> None:
        seen.append(len(log.after(0).events))
        leave()

    leave = log.watch(wake)
    log.append("queued", {})
    log.append("started", {})
    assert seen == [1]


def test_an_asyncio_reader_gets_all_of_a_writing_thread() -> None:
    """One that reads, one that sleeps through it: the writer waits for neither."""
    log = EventLog(Bounds(), SetClock())

    async def read() -> list[Event]:
        more = asyncio.Event()
        log.watch(partial(asyncio.get_running_loop().call_soon_threadsafe, more.set))
        writer.start()
        events: list[Event] = []
        ended = False
        while not ended:
            await asyncio.wait_for(more.wait(), 20)
            more.clear()
            reading = log.after(events[-1].number if events else 0)
            events += reading.events
            ended = reading.ended
        return events

    def write() -> None:
        for index in range(200):
            log.append("image", {"index": index})
        log.append("completed", {})

    asleep = asyncio.new_event_loop()
    log.watch(partial(asleep.call_soon_threadsafe, int))  # this loop never runs
    writer = threading.Thread(target=write)
    events = asyncio.run(read())
    writer.join()
    asleep.close()
    assert [event.data.get("index") for event in events] == [*range(200), None]


def test_threads_that_write_get_numbers_without_holes(clock: SetClock) -> None:
    log = log_of(clock, events=10_000)
    threads = [
        threading.Thread(target=lambda: [log.append("image", {}) for _ in range(500)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.number for event in log.after(0).events] == list(range(1, 4001))


def test_a_cancelled_request_leaves_its_job() -> None:
    """Ray Serve cancels the task of a request whose client has gone."""

    async def main() -> list[str]:
        left: list[str] = []
        work: Any = asyncio.sleep(60)
        asking = asyncio.ensure_future(
            unless_gone(lambda: asyncio.sleep(60, {}), work, lambda: left.append("left"))
        )
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        return left

    assert asyncio.run(main()) == ["left"]
