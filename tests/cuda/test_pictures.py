"""Whole pictures over the stand-in: what a warm one does, what changes of size cost, what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cuda import environment
from tests.cuda.test_nets import SKELETONS

Facts = dict[str, Any]
# A loop of rows that are replayed leaves the launches of the nets that run once per picture.
ALLOCATIONS = {"allocations", "page-locked allocations", "cuDNN plans"}


@pytest.fixture(scope="module", params=["demo", *SKELETONS])
def package(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pictures(built: Path, package: str) -> dict[str, Facts]:
    return environment.ask(built, "pictures", package)


@pytest.fixture(scope="module")
def failures(built: Path) -> list[Facts]:
    return environment.ask(built, "failures", "demo")


def test_a_warm_picture_allocates_and_plans_nothing(pictures: dict[str, Facts]) -> None:
    for facts in pictures.values():
        for size in ("pictures", "other_size", "first_size_again"):
            assert not [events for events in facts[size][1:] if ALLOCATIONS & events.keys()]


def test_a_warm_picture_waits_for_each_text_encoder_and_at_its_end(pictures: dict[str, Facts]) -> None:
    """A size's second picture waits more often: it compares plain rows with replayed ones."""
    waits = pictures["off"]["text_encoders"] + 1
    for facts in pictures.values():
        assert {events["waits"] for events in facts["pictures"][2:]} == {waits}
    plain = pictures["off"]
    drawn = [*plain["pictures"][1:], *plain["other_size"], *plain["first_size_again"]]
    assert {events["waits"] for events in drawn} == {waits}


def test_a_warm_picture_is_uploaded_and_downloaded_the_same_way_each_time(
    pictures: dict[str, Facts],
) -> None:
    ways = ("copies to the device", "copies to the host")
    copies = {
        tuple(events[way] for way in ways)
        for facts in pictures.values()
        for events in (facts["pictures"][0], *facts["pictures"][2:])
    }
    # SDXL has a second text encoder, with two outputs, and vectors for the time net
    up, down = (12, 6) if pictures["off"]["text_encoders"] == 2 else (8, 4)
    # one row of zeros for each encoder that takes extra embeddings: those of older packages take none
    assert copies == {(up + pictures["off"]["extra_embeddings"], down)}


def test_plain_rows_launch_the_same_in_every_picture(pictures: dict[str, Facts]) -> None:
    assert len({events["launches"] for events in pictures["off"]["pictures"]}) == 1
    assert not pictures["off"]["replays"]


@pytest.mark.parametrize("graphs", ["on", "auto"])
def test_rows_are_replayed(pictures: dict[str, Facts], graphs: str) -> None:
    facts, plain = pictures[graphs], pictures["off"]["pictures"][-1]
    assert facts["replays"]
    last = facts["pictures"][-1]
    assert last["graph launches"] == facts["steps"]
    kernels = ("launches", "library launches", "replayed launches")
    assert sum(last[name] for name in kernels) == sum(plain.get(name, 0) for name in kernels)
    assert last["launches"] < plain["launches"] / 4


def test_a_size_that_comes_back_is_replayed_from_its_second_picture_on(pictures: dict[str, Facts]) -> None:
    """The plans that its graph was recorded from are gone. It is known by then that a replay is right."""
    facts = pictures["on"]
    first, second, third = facts["first_size_again"]
    assert first["cuDNN plans"] == facts["pictures"][0]["cuDNN plans"]
    assert "graph launches" not in first
    assert second["graph launches"] == third["graph launches"] == facts["steps"]
    assert third == facts["pictures"][-1]


def test_nothing_is_captured_that_may_not_be(pictures: dict[str, Facts]) -> None:
    assert {graphs: facts["forbidden"] for graphs, facts in pictures.items() if facts["forbidden"]} == {}
    assert {graphs: facts["notes"] for graphs, facts in pictures.items() if facts["notes"]} == {}


def test_nothing_is_logged(pictures: dict[str, Facts]) -> None:
    assert [facts["log"] for facts in pictures.values()] == [[]] * 3


def test_sizes_in_turns_build_no_plan_in_a_capture(built: Path) -> None:
    facts = environment.ask(built, "alternating", "demo")
    assert facts["replays"]
    assert facts["forbidden"] == {}
    assert facts["notes"] == {}


def test_what_is_idle_is_freed_and_made_anew(pictures: dict[str, Facts]) -> None:
    for facts in pictures.values():
        assert facts["freed_idle"]
        assert facts["freed_bytes"] > 0
        first, second = facts["after_freeing"]
        assert first["allocations"] > 0
        assert "allocations" not in second


def test_a_closed_pipeline_leaves_nothing(pictures: dict[str, Facts]) -> None:
    assert {graphs: facts["left_open"] for graphs, facts in pictures.items() if facts["left_open"]} == {}


def test_little_memory_is_shared_out_and_comes_back(built: Path) -> None:
    facts = environment.ask(built, "memory", "demo")
    assert (facts["little"], facts["enough"]) == ("", "")
    assert [line for line in facts["log_little"] if "split the batch -> " in line]
    assert facts["log_none"]
    assert facts["left_open"] == {}


def test_a_set_of_adapters_draws_beside_the_base(built: Path) -> None:
    """In turns: each keeps its graphs, and once both are warm neither allocates."""
    facts = environment.ask(built, "adapted", "demo")
    for name in ("base", "set"):
        *_, last = facts[name]
        assert last["graph launches"] == facts["steps"]
        assert last == facts[name][-2]
        assert not ALLOCATIONS & last.keys()
    assert facts["base"][-1] == facts["set"][-1]
    assert facts["opened"]["allocations"] > 0, "the set has weights of its own"
    assert {kind: facts[kind] for kind in ("forbidden", "note") if facts[kind]} == {}


# ── failures ──────────────────────────────────────────────────────────────────────────────────


def named(failures: list[Facts], start: str) -> list[Facts]:
    found = [fact for fact in failures if fact["failing"].startswith(start)]
    assert found
    return found


def test_after_any_failure_nothing_is_left_open(failures: list[Facts]) -> None:
    assert {fact["failing"]: fact["left_open"] for fact in failures if fact["left_open"]} == {}


def test_every_failure_is_seen(failures: list[Facts]) -> None:
    """As an error or as a line of the log; else it was not injected."""
    assert [fact["failing"] for fact in failures if not (fact["error"] or fact.get("log"))] == []


def test_the_next_picture_is_drawn(failures: list[Facts]) -> None:
    # A convolution of the library's (1.31) may keep half a plan whose building failed, and build no other.
    kept = {fact["failing"] for fact in named(failures, "cudnnBackendFinalize")}
    assert {fact["failing"] for fact in failures if fact["next"]} <= kept


def test_a_row_that_cannot_be_captured_runs_plainly(failures: list[Facts]) -> None:
    starts = ("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphUpload")
    for fact in (fact for start in starts for fact in named(failures, start)):
        assert fact["error"] == ""
        assert fact["log"][0].startswith("rows are not replayed: ")


def test_memory_that_is_short_while_opening_is_a_limit(failures: list[Facts]) -> None:
    for fact in failures:
        if "while opening" in fact["failing"]:
            assert fact["error"].startswith("MemoryLimitError: "), fact


def test_a_controlnet_runs_on_the_device(built: Path) -> None:
    """With steps nothing grows but what is enqueued: no waits, no copies from or to the host, no memory."""
    facts = environment.ask(built, "steered", "demo")
    assert not facts["open"]
    assert not facts["forbidden"]
    for graphs in ("off", "on", "auto"):
        few, more, without = ([*facts[graphs][name][3:]] for name in ("few", "more", "without"))
        assert not [events for events in (*few, *more, *without) if ALLOCATIONS & events.keys()], graphs
        for what in ("waits", "copies to the device", "copies to the host"):
            assert {events.get(what, 0) for events in few} == {events.get(what, 0) for events in more}, what
        nets_before = 2  # of the demo's ControlNet, which reads no text: schedule and hint
        assert {events["waits"] for events in few} == {without[0]["waits"] + nets_before}
        assert few[-1]["copies on the device"] < more[-1]["copies on the device"]
