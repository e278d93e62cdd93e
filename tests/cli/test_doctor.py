"""`latentrt doctor`, on this machine and on broken ones."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from latentrt import cli
from latentrt.engines.backends import BACKENDS
from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.installed import install_command
from latentrt.engines.onnxruntime import session
from latentrt.engines.openvino import library
from latentrt.engines.processors import usable_processors
from latentrt.engines.store.engine_store import EngineStore
from latentrt.runtime import doctor as runtime_doctor
from latentrt.runtime.doctor import examine
from tests.engines.engine_keys import builder, numbered
from tests.engines.layout_setting import GPU

HERE = [name for name in BACKENDS if name == "onnxruntime"]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", "doctor", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capsys.readouterr().out

    return call


def test_on_this_machine(doctor: Any, store: Path) -> None:
    code, out = doctor("--json")
    found = json.loads(out)
    assert (code, found["can_draw"], found["problems"]) == (0, True, [])
    assert found["auto"] in ("onnxruntime", "onnxruntime-cuda")
    assert [one["name"] for one in found["backends"]] == list(BACKENDS)
    for one in found["backends"]:
        if one["seconds"] is None:
            assert all(one[part] for part in ("found", "expected", "fix"))
    for name in ("latentrt", "numpy", "onnxruntime", "torch"):
        assert found["versions"][name] == version(name)
    assert found["versions"]["python"] == platform.python_version()
    cpu = found["processors"]
    assert cpu["usable"] == usable_processors() <= cpu["schedulable"] <= cpu["machine"] == os.cpu_count()
    assert (found["store"]["path"], found["store"]["writable"]) == (str(store), True)
    assert not store.exists(), "looking makes nothing"
    demo = Path(found["shipped"]["path"])
    assert found["shipped"]["bytes"] <= sum(one.stat().st_size for one in demo.rglob("*") if one.is_file())


def test_in_words(doctor: Any, store: Path) -> None:
    code, out = doctor()
    assert code == 0
    assert f"latentrt {version('latentrt')}, Python {platform.python_version()}" in out
    assert "  onnxruntime       draws: onnxruntime " in out
    assert f"numpy {version('numpy')}" in out
    assert f"store        {store}: 0.0 MB, engines: none" in out
    assert "None" not in out


def test_nothing_can_draw(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (session, library):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    code, out = doctor()
    assert code == 4
    assert "auto takes none of them" in out
    assert f"Install it: {install_command('cpu')}\n" in out
    code, out = doctor("--json")
    assert (code, json.loads(out)["can_draw"], json.loads(out)["auto"]) == (4, False, "")


@pytest.mark.parametrize(
    "broken", [["numpy"], ["PIL"], ["tokenizers", "cuda", "pynvml"], ["onnxruntime", "openvino"]]
)
def test_broken_installations_are_findings(broken: list[str], store: Path) -> None:
    """What is None in sys.modules raises ImportError, wherever it is imported."""
    store.mkdir()
    code = (
        "import sys\n"
        f"for name in ['torch', 'diffusers', *{broken}]: sys.modules[name] = None\n"
        "sys.argv = ['latentrt', 'doctor', '--json']\n"
        "from latentrt import cli; cli.main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (4, "")
    found = json.loads(run.stdout)
    assert not found["can_draw"]
    assert found["processors"]["usable"] >= 1
    words = " ".join(str(one) for one in (found["problems"], found["backends"], found["gpu"]))
    assert broken[0] in words
    for one in found["backends"]:
        assert all(one[part] for part in ("found", "expected", "fix"))


@pytest.mark.parametrize("name", ["versions", "wheels", "gpu", "processors", "memory", "store", "shipped"])
def test_a_probe_that_fails_is_a_problem(doctor: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fails() -> Mapping[str, Any]:
        raise LookupError("no such\nthing")

    fails.__name__ = name if name == "memory" else f"_{name}"
    monkeypatch.setattr(runtime_doctor, name if name == "memory" else f"_{name}", fails)
    code, out = doctor()
    assert code == 0
    assert f"problem      {name}: LookupError: no such thing\n" in out


def test_a_gpu_and_engines(doctor: Any, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_facts, "refusal", lambda: None)
    monkeypatch.setattr(cuda_facts, "facts", lambda _=0: GPU)

    EngineStore(store).get_or_build(numbered(1), builder(b"x" * 2_000_000))
    _, out = doctor()
    assert f"GPU          {GPU.name} ({GPU.sm}), " in out
    assert f", engines: 1 of {numbered(1).backend};" in out
    assert "             engines  2.0 MB\n" in out


def test_a_store_that_cannot_be_written(doctor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file" / "store"))
    code, out = doctor()
    assert code == 0
    assert "NOT WRITABLE" in out


def test_the_limit_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "above").mkdir()
    (tmp_path / "above/memory.max").write_text("max\n")
    (tmp_path / "above/memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    monkeypatch.setattr(runtime_doctor, "control_groups", lambda controller: [tmp_path / "above"])
    assert examine().memory["limit"] is None
    monkeypatch.setattr(runtime_doctor, "control_groups", lambda controller: [tmp_path, tmp_path / "above"])
    assert examine().memory["limit"] == 1_000_000
