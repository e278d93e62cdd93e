"""Memory that nets had goes back to the system, and large ones do without second copies."""

from typing import Any

import pytest

from latentrt.engines.onnxruntime import nets as onnxruntime
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.lowering import files
from latentrt.engines.onnxruntime.lowering.files import open_as_written, open_changed, read_graph
from latentrt.engines.onnxruntime.session import LARGE, library, session_options, spare_memory
from latentrt.engines.package import Package
from latentrt.engines.tuning.runs import measured_inputs
from latentrt.runtime.model import SHIPPED

DEMO = Package.open(SHIPPED["demo"])


@pytest.mark.parametrize("felt", [True, False])
def test_a_closed_net_gives_its_memory_back_once(felt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(onnxruntime, "give_back_heap", lambda: given.append("back"))
    monkeypatch.setattr(onnxruntime, "_FELT", 0 if felt else 2**40)
    net = ONNXRUNTIME.open_net(DEMO, "unet_time")
    before = len(given)
    net.close()
    net.close()
    assert len(given) - before == felt


def test_a_closed_net_of_openvino_does_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from latentrt.engines.openvino import nets
    from latentrt.engines.openvino.backend import OPENVINO

    given: list[str] = []
    monkeypatch.setattr(nets, "give_back_heap", lambda: given.append("back"))
    monkeypatch.setattr(nets, "_FELT", 0)
    with OPENVINO.open_net(DEMO, "unet_time"):
        pass
    assert given == [], "nothing was compiled"
    net = OPENVINO.open_net(DEMO, "unet_time")
    net(**measured_inputs(DEMO, "unet_time"))
    before = len(given)
    net.close()
    net.close()
    assert len(given) - before == 1


def test_large_nets_have_no_second_copy_of_their_convolutions() -> None:
    levels = library().GraphOptimizationLevel
    for weights, level in ((LARGE, levels.ORT_ENABLE_ALL), (LARGE + 1, levels.ORT_ENABLE_EXTENDED)):
        options = session_options(None)
        spare_memory(options, weights)
        assert options.graph_optimization_level == level


def test_sessions_of_changed_graphs_are_opened_as_nets_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def keep(path: Any, options: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(options)

    levels = library().GraphOptimizationLevel
    monkeypatch.setattr(files, "open_session", keep)
    for weights, level in ((LARGE, levels.ORT_ENABLE_ALL), (LARGE + 1, levels.ORT_ENABLE_EXTENDED)):
        monkeypatch.setattr(files, "engine_bytes", lambda package, net, weights=weights: weights)
        open_changed(DEMO, "unet", read_graph(DEMO, "unet"))
        assert seen[-1].graph_optimization_level == level
        open_as_written(DEMO, "unet")
        assert seen[-1].graph_optimization_level == levels.ORT_DISABLE_ALL
        assert seen[-1].enable_cpu_mem_arena == (weights <= LARGE)
