"""Every net in every layout, on the real CUDA provider over the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import environment, launches

# What a run of a shape that has run before may do. Descriptors describe a call's addresses to cuDNN.
ENQUEUES = {"launches", "library launches", "copies on the device", "cuDNN descriptors"}
SKELETONS = [pytest.param(name, marks=pytest.mark.slow) for name in launches.PACKAGES if name != "demo"]

Facts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=["demo", *SKELETONS])
def package(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def every(built: Path, package: str) -> Facts:
    """What one child found: the facts by `net/layout`."""
    return environment.ask(built, "nets", package)


@pytest.fixture(scope="module")
def facts(every: Facts) -> Facts:
    """Those of nets that ran."""
    ran = {name: fact for name, fact in every.items() if "error" not in fact}
    assert {"unet/plain", "unet/nhwc", "vae_decoder/nhwc", "step/plain", "text_encoder/plain"} <= ran.keys()
    return ran


def wrong(facts: Facts, find: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """What is found of each net, without those of which nothing is."""
    return {name: found for name, fact in facts.items() if (found := find(fact))}


def test_every_net_runs_in_every_layout(every: Facts) -> None:
    assert wrong(every, lambda fact: fact.get("error")) == {}


def test_no_input_is_wanted_on_the_host(facts: Facts) -> None:
    assert wrong(facts, lambda fact: fact["on_host"]) == {}


def test_the_first_run_waits_once_at_most(facts: Facts) -> None:
    assert max(fact["runs"][0].get("waits", 0) for fact in facts.values()) <= 1


def test_from_the_second_run_on_work_is_only_enqueued(facts: Facts) -> None:
    assert wrong(facts, lambda fact: [run for run in fact["runs"][1:] if run.keys() - ENQUEUES]) == {}


def test_every_run_of_a_shape_enqueues_the_same(facts: Facts) -> None:
    def differing(fact: dict[str, Any]) -> Any:
        first, *later = fact["runs"][1:]
        return [run for run in later if run != first]

    assert wrong(facts, differing) == {}


def test_nothing_is_copied_between_cpu_and_gpu(facts: Facts) -> None:
    assert wrong(facts, lambda fact: fact["placement"]["copies between CPU and GPU"]) == {}


def test_no_floating_point_node_is_on_the_cpu(facts: Facts) -> None:
    assert wrong(facts, lambda fact: fact["placement"]["floating-point nodes on the CPU"]) == {}
    assert min(fact["placement"]["nodes"] for fact in facts.values()) > 0


def test_a_capture_does_nothing_that_is_forbidden(facts: Facts) -> None:
    kinds = ("error", "forbidden", "note")
    assert wrong(facts, lambda fact: [fact["capture"][kind] for kind in kinds if fact["capture"][kind]]) == {}


def test_a_graph_has_all_of_a_run(facts: Facts) -> None:
    for fact in facts.values():
        run, capture = fact["runs"][-1], fact["capture"]
        assert capture["captured"] == {name: run[name] for name in capture["captured"]}
        assert capture["captured"]["launches"] == run["launches"]
        kernels = run["launches"] + run.get("library launches", 0)
        assert capture["replayed"] == {"graph launches": 1, "replayed launches": kernels}


def test_another_shape_needs_a_plan_for_every_convolution_and_so_does_the_first_one_again(
    facts: Facts,
) -> None:
    for fact in facts.values():
        plans = fact["runs"][0].get("cuDNN plans", 0)
        after_a, b, after_b, a, after_a_again = (run.get("cuDNN plans", 0) for run in fact["shapes"])
        assert (after_a, after_b, after_a_again) == (0, 0, 0)
        # a convolution remembers one shape (1.31); a release that remembers more lowers the last number
        assert (b, a) == (plans, plans)


def test_shapes_that_alternate_allocate_and_wait_for_nothing_more(facts: Facts) -> None:
    forbidden = {"waits", "copies to the device", "copies to the host", "page-locked allocations"}
    assert wrong(facts, lambda fact: [run for run in fact["shapes"] if forbidden & run.keys()]) == {}
    assert wrong(facts, lambda fact: [run for run in fact["shapes"][2:] if "allocations" in run]) == {}


def test_a_closed_net_leaves_nothing(facts: Facts) -> None:
    assert wrong(facts, lambda fact: fact["left_open"]) == {}


def test_the_library_launches_as_many_kernels_as_recorded(facts: Facts, package: str) -> None:
    counted = {name: fact["runs"][-1]["launches"] for name, fact in facts.items()}
    changed = launches.changes(package, counted, launches.recorded()[package])
    assert not changed, "\n".join([*changed, f"If that is meant: {launches.COMMAND} {package}"])


def test_nets_with_other_weights_do_the_same(built: Path) -> None:
    """What adapters change are numbers alone: no kernel, no copy and no wait is added."""
    plain = environment.ask(built, "nets", "demo", "unet", "unet_context", "unet_time", "text_encoder")
    changed = environment.ask(built, "changed", "demo", "unet", "unet_context", "unet_time", "text_encoder")
    assert changed.keys() == plain.keys()
    for name, fact in changed.items():
        for kind in ("runs", "shapes", "capture", "placement", "left_open"):
            assert fact[kind] == plain[name][kind], (name, kind)
