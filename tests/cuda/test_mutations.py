"""Each rule is broken on purpose, and the stand-in shows it: what test_nets.py asserts can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cuda import environment
from tests.cuda.test_nets import ENQUEUES


@pytest.fixture(scope="module")
def shown(built: Path) -> dict[str, Any]:
    return environment.ask(built, "mutations", "demo")


def test_shapes_that_are_computed_on_the_gpu_are_copied_and_waited_for(shown: dict[str, Any]) -> None:
    events = shown["shapes_on_the_gpu"]
    assert events["copies to the host"] > 0
    assert events["waits"] > 0
    assert events.keys() - ENQUEUES


def test_a_float_node_without_a_kernel_shows_in_the_profile(shown: dict[str, Any]) -> None:
    events = shown["float_node_on_the_cpu"]
    assert [name for name in events["floating-point nodes on the CPU"] if "(Det)" in name]
    assert len(events["copies between CPU and GPU"]) == 2


def test_an_allocation_in_a_capture_is_refused(shown: dict[str, Any]) -> None:
    capture = shown["first_run_captured"]
    assert capture["forbidden"]["cudaMalloc"] > 0
    assert "cannot be captured" in capture["error"]
    assert capture["replayed"] == {}


def test_a_plan_that_is_built_in_a_capture_is_noted(shown: dict[str, Any]) -> None:
    assert shown["another_shape_before_the_capture"]["note"]["a plan was built in a capture"] > 0


def test_a_run_that_waits_shows(shown: dict[str, Any]) -> None:
    assert shown["run_that_waits"]["waits"] == 1
    assert shown["run_that_waits"].keys() - ENQUEUES


def test_what_is_not_freed_is_open(shown: dict[str, Any]) -> None:
    assert shown["session_that_is_held"]["held"]["device memory"] > 0
    assert shown["session_that_is_held"]["after"] == {}
    assert shown["stream_that_is_not_destroyed"] == {"stream": 1}
