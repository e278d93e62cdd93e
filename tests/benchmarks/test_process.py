import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.process import Child, Server, SideError, SideProcess, run, serve
from latentrt.benchmarks.sides.contract import OpenSide, Work
from tests.benchmarks.stand_in_side import CASE, TASK

ORPHAN = """
import sys, time
from latentrt.benchmarks.process import SideProcess
from latentrt.benchmarks.sides.contract import Task

side = SideProcess("latentrt", "latentrt", Task.parse(sys.argv[1]))
print(side.pid, flush=True)
time.sleep(60)
"""


def _work(value: float) -> Work:
    runs: list[int] = []

    def call() -> Mapping[str, Any]:
        runs.append(1)
        return {"image": np.array([1.0, value])}

    return Work(call=call, figures=lambda: {"run": len(runs)})


def _serve(*commands: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """The answers of a side whose workloads compute what they are called, and what it closed."""
    closed, answers = list[str](), list[Any]()
    makers: Any = {word: lambda case, stack, word=word: _work(float(word)) for word in ("1", "nan", "a word")}
    side = OpenSide(name="it", versions={}, makers=makers, memory=lambda: {"ledger": 3})
    side.resources.callback(closed.append, "closed")
    serve((json.dumps(command) for command in commands), Server(side, TASK), answers.append)
    return answers, closed


def _prepare(workload: str, slot: str = "") -> dict[str, Any]:
    return {"do": "prepare", "workload": workload, "case": CASE.to_json(), "slot": slot}


def _time(runs: int, slot: str = "", **more: Any) -> dict[str, Any]:
    return {"do": "time", "runs": runs, "slot": slot, **more}


def test_a_child_answers() -> None:
    answers, was_closed = _serve(_prepare("1"), _time(3), {"do": "memory"}, {"do": "close"}, _time(1))
    prepared, timed, memory, closed = answers
    assert prepared["figures"] == {"run": 1}
    assert [item["run"] for item in timed["figures"]] == [2, 3, 4]
    assert len(timed["seconds"]) == 3
    assert memory == {"own": {"ledger": 3}}
    assert closed == {}
    assert was_closed == ["closed"]
    assert gc.isenabled()


def test_a_child_tells_errors_and_lives_on() -> None:
    first, second = _prepare("1", "a"), _prepare("nan", "b")
    answers, _ = _serve(_prepare("none"), _prepare("a word"), first, second, _time(1, "b"), _time(1, "a"))
    none, word, *_, nan, good = answers
    assert none == {"error": "it has no workload 'none'", "kind": "not available"}
    assert word["kind"] == "FAILED"
    assert "ValueError" in word["error"]
    assert nan == {"error": "FloatingPointError: the output image is not finite", "kind": "FAILED"}
    assert answers[3] == nan
    assert len(good["seconds"]) == 1, "slots are apart"


def test_a_slot_that_runs_beside_another_has_its_seconds() -> None:
    """And the yardstick is a workload of every side."""
    answers, _ = _serve(
        _prepare("1", "own"),
        _prepare("yardstick", "yardstick"),
        _time(3, "own", beside="yardstick"),
        _time(1, "own", beside=None),
    )
    beside, alone = answers[2:4]
    assert [item["run"] for item in beside["figures"]] == [2, 3, 4]
    assert all(item["beside_s"] > 1e-4 for item in beside["figures"])
    assert alone["figures"] == [{"run": 5}]


def test_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with SideProcess("latentrt", "latentrt", TASK) as side:
        assert "onnxruntime" in side.stamp["side"]["backend"]
        assert {"cpu", "commit", "libraries", "cpu_mhz", "load_1min"} <= set(side.stamp)
        answer, outputs = side.prepare("vae_decoder", CASE)
        assert outputs["image"].shape == (1, 64, 64, 3)
        assert answer["seconds"] > 0
        side.prepare("unet", CASE, slot="small")
        seconds, figures = side.time(2, slot="small")
        assert len(seconds) == len(figures) == 2
        with pytest.raises(SideError, match="no workload 'gemm'") as error:
            side.prepare("gemm", CASE)
        assert error.value.status == "not available"
        monkeypatch.setattr("latentrt.benchmarks.process.LIMIT", 0.0)
        with pytest.raises(SideError, match="no answer within 0 s"):
            side.ask(do="memory")
        monkeypatch.undo()
        with pytest.raises(SideError, match="it ended with SIGKILL"):
            side.time(1)
        with pytest.raises(SideError, match="it ended with SIGKILL"):
            side.time(1)


def test_what_cannot_be_opened(tmp_path: Any) -> None:
    with pytest.raises(SideError, match="does not exist") as error:
        SideProcess("latentrt", "latentrt", replace(TASK, model=tmp_path / "none"))
    assert error.value.status == "FAILED"
    assert str(tmp_path) not in error.value.reason
    with pytest.raises(SideError, match="unknown backend") as error:
        SideProcess("latentrt", "latentrt", replace(TASK, backend="abacus"))
    assert error.value.status == "not available"
    with pytest.raises(SideError, match="unknown side 'abacus'"):
        SideProcess("abacus", "abacus", TASK)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", r"it ended with SIGABRT: .*Fatal Python error: Aborted"),
        ("raise ValueError('a defect in /home/me/x')", r"it ended with exit code 1: .*a defect in …/x"),
        ("import sys; sys.exit(3)", r"it ended with exit code 3;"),
    ],
)
def test_a_child_that_ends_badly_says_how_after_its_lines(code: str, reason: str) -> None:
    with Child("-X", "faulthandler", "-c", f"print('a', flush=True)\n{code}") as child:
        lines = child.lines(30)
        assert next(lines) == "a"
        with pytest.raises(SideError, match=reason):
            next(lines)


def test_a_child_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    sign = tmp_path / "alive"
    grandchild = f"import time; time.sleep(3); open({str(sign)!r}, 'w')"
    start = f"subprocess.Popen([sys.executable, '-c', {grandchild!r}])"
    code = f"import subprocess, sys, time\n{start}\ntime.sleep(99)"
    began = time.perf_counter()
    with pytest.raises(SideError, match="it did not end within 1 s"):
        run(["-c", code], limit=1)
    assert time.perf_counter() - began < 3
    time.sleep(3)
    assert not sign.exists()


def test_a_child_that_hangs_after_its_last_line_is_ended() -> None:
    code = "import os, time; print(os.environ['HERE'], flush=True); os.close(1); time.sleep(99)"
    with Child("-c", code, environment={"HERE": "a"}) as child:
        lines = child.lines(1)
        assert next(lines) == "a"
        with pytest.raises(SideError, match="it did not end within 1 s"):
            next(lines)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_stopped_process_ends_with_a_parent_that_was_killed() -> None:
    command = [sys.executable, "-c", ORPHAN, TASK.text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        status = Path("/proc") / parent.stdout.readline().strip() / "status"
        assert status.is_file()
        parent.kill()
    for _ in range(100):
        if not status.is_file() or "State:\tZ" in status.read_text(encoding="ascii"):
            return
        time.sleep(0.05)
    pytest.fail("it is still there")
