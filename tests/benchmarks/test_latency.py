from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import read_document
from latentrt.benchmarks.rounds import Pace, Turns
from latentrt.benchmarks.sides.contract import AGAIN, OURS, YARDSTICK, Task
from latentrt.benchmarks.verbs import latency
from latentrt.benchmarks.verbs.latency import Bench, Sides, measure_latency, medians
from latentrt.engines.errors import MemoryLimitError
from tests.benchmarks.stand_in_side import CASE, PACKAGE, TASK, StandInSide

PACE = Pace(runs=6, rounds=3, budget=1.0, turn=0.02)
PREDICTION = {"prediction": np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)}


def _bench(workload: str = "unet", references: tuple[str, ...] = (AGAIN,), device: str = "cpu") -> Bench:
    sides = Sides(task=replace(TASK, device=device), references=references)
    return Bench(package=PACKAGE, sides=sides, workload=workload, case=CASE, progress=lambda line: None)


def _measure(*sides: Any) -> dict[str, Any]:
    rows = _bench().measure(sides, PACE)
    return {row.workload if row.side == "ceiling" else row.side: row for row in rows}


def _side(name: str, seconds: float = 0.01, times: float = 1.0, **more: Any) -> StandInSide:
    """A side that takes so long, and predicts `times` what ours does."""
    outputs = {"prediction": PREDICTION["prediction"] * np.float32(times)}
    return StandInSide(name, lambda workload, case: seconds, outputs, **more)


def test_peers_count_only_where_they_compute_what_ours_does() -> None:
    best = {"gemm": 0.004, "copy": 0.002}
    rows = _measure(
        _side(OURS),
        _side("onnxruntime", 0.02, 1.00005),
        _side("openvino", 0.001, 1.01),
        _side("diffusers", error=SideError("not available", "no torch")),
        StandInSide(
            "ceiling", lambda workload, case: best[workload], figures=lambda: {"flops": 10**9, "bytes": 10**8}
        ),
    )
    assert (rows[OURS].status, rows[OURS].summary["p50"]) == ("ok", 0.01)
    assert rows["onnxruntime"].summary["p50"] == 0.02
    assert rows["onnxruntime"].figures["relative_l2"] == pytest.approx(5e-5, rel=0.01)
    assert (rows["openvino"].status, rows["openvino"].rounds) == ("FAILED", ())
    assert "relative L2 1.00e-02" in rows["openvino"].reason
    assert (rows["diffusers"].status, rows["diffusers"].reason) == ("not available", "no torch")
    assert [rows[name].figures["during"] for name in ("gemm", "copy")] == ["unet", "unet"]
    assert rows["gemm"].figures["flop_per_s"] == pytest.approx(10**9 / 0.004)
    flops = rows[OURS].figures["flops"]
    assert rows[OURS].figures["of_best_gemm"] == pytest.approx(flops / 0.01 / (10**9 / 0.004))
    assert {len(row.rounds) for row in rows.values() if row.rounds} == {6}
    rows = _measure(_side(OURS, error=SideError("FAILED", "out of memory")), _side(AGAIN), _side("openvino"))
    assert [row.status for row in rows.values()] == ["FAILED", "not available", "not available"]
    assert rows["openvino"].reason == "ours failed: there is nothing to compare with"


def _ours(seconds: float) -> Any:
    return [_side(OURS, seconds), _side(AGAIN, seconds)]


def test_ours_over_the_yardstick_are_rows_of_their_own() -> None:
    rows = _bench(references=(AGAIN, YARDSTICK)).measure(_ours(0.01), PACE)
    assert [(row.side, row.unit, row.figures.get("of")) for row in rows] == [
        (OURS, "s", None),
        (AGAIN, "s", None),
        (YARDSTICK, "1", OURS),
        (YARDSTICK, "1", AGAIN),
    ]
    assert {row.workload for row in rows} == {"unet"}
    for row in rows[2:]:
        assert set(row.samples) == {0.01 / 0.002}
        assert len(row.rounds) == len(rows[0].rounds) > 1
        assert row.figures["yardstick_p50_s"] == 0.002


def test_long_runs_and_devices_have_no_yardstick() -> None:
    for seconds, references, device in (
        (1.5, (AGAIN, YARDSTICK), "cpu"),
        (0.01, (AGAIN, YARDSTICK), "cuda"),
        (0.01, (AGAIN,), "cpu"),
    ):
        rows = _bench(references=references, device=device).measure(_ours(seconds), PACE)
        assert [row.side for row in rows] == [OURS, AGAIN]


def test_what_no_net_took() -> None:
    stages = {"text_encoder": 0.1, "invariants": 0.1, "unet": 0.6, "update": 0.05, "vae_decoder": 0.1}
    turns = Turns(rounds=[(1.0, 1.0), (2.0,)], figures=[{"stages_s": stages, "device_s": 0.9}] * 2)
    turns.figures.append({"stages_s": {**stages, "unet": 1.6}, "device_s": 1.8})
    found = medians(turns, steps=10)
    assert found["non_engine_share"] == pytest.approx(0.1)
    assert found["non_engine_s_per_step"] == pytest.approx(0.01)
    assert found["stages_p50_s"]["unet"] == 0.6
    assert found["device_p50_s"] == 0.9
    assert medians(Turns(rounds=[(1.0,)], figures=[{"flops": 5}]), steps=1) == {"flops": 5}
    assert medians(Turns(), steps=1) == {}


def test_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: str, module: str, task: Task) -> StandInSide:
        if module == missing:
            raise SideError("not available", "not installed")
        return _side(name)

    monkeypatch.setattr(latency, "SideProcess", opened)
    assert Sides(task=TASK, references=()).names == (OURS,)
    sides = Sides(task=TASK, peers=("openvino",))
    assert sides.names == (OURS, AGAIN, "openvino", "ceiling")
    missing = "openvino"
    with ExitStack() as stack:
        found, rows = sides.open(stack)
    assert [item.name for item in found] == [OURS, AGAIN, "ceiling"]
    expected = [("openvino", "not available", "not installed")]
    assert [(row.side, row.status, row.reason) for row in rows] == expected
    missing = OURS
    with ExitStack() as stack, pytest.raises(SideError, match="not installed"):
        sides.open(stack)


def test_sides_that_do_not_fit_beside_each_other_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SideProcess", lambda name, module, task: _side(name))
    memory = {"total": 2**40, "available": 2**40, "limit": None}
    monkeypatch.setattr(latency.doctor, "memory", lambda: memory)
    sides = Sides(task=TASK, peers=("diffusers", "openvino"))
    with ExitStack() as stack:
        assert len(sides.open(stack)[0]) == 5
        for name in ("available", "limit"):
            memory.update({"available": 2**40, "limit": None, name: 30_000_000})
            with pytest.raises(MemoryLimitError, match=r"4 sides of demo at once take about .* GB"):
                sides.open(stack)
        memory.update(available=None, limit=None)  # a system that does not tell
        assert sides.open(stack)


def test_the_demo_model_for_real(tmp_path: Any) -> None:
    pace = Pace(runs=2, rounds=2, budget=0.5, turn=0.01, least=2, warm_up=1)
    sides = Sides(task=TASK, references=(AGAIN,))
    document = measure_latency(PACKAGE, sides, [CASE], pace=pace)
    document.write(tmp_path / "latency.json")
    rows = {(row.workload, row.side): row for row in read_document(tmp_path / "latency.json").rows}
    assert set(rows) == {(workload, side) for workload in latency.WORKLOADS for side in (OURS, AGAIN)}
    assert {row.status for row in rows.values()} == {"ok"}
    assert all(len(row.rounds) == 2 and min(row.samples) > 0 for row in rows.values())
    assert rows["unet", AGAIN].figures["relative_l2"] == 0
    picture = rows["picture", OURS]
    assert 0 < picture.figures["non_engine_share"] < 1
    assert picture.stamp["side"]["backend"].startswith("onnxruntime")
    assert {"cpu", "commit", "libraries", "cpu_mhz"} <= set(picture.stamp)
