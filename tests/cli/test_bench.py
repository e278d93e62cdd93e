"""`latentrt bench`: what a verb is told reaches what it measures; what is found decides the exit code."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentrt import cli
from latentrt.benchmarks.models.open import Model
from latentrt.benchmarks.records import Document, Row, read_document
from latentrt.benchmarks.sides.contract import Task
from latentrt.benchmarks.sides.watched import BLOCKS, SETTLED
from latentrt.benchmarks.verbs import build as build_time
from latentrt.benchmarks.verbs import latency, memory, parity, scaling, serve, suite, throughput
from latentrt.benchmarks.verbs.latency import Sides, silent
from latentrt.benchmarks.verbs.scaling import AXES
from latentrt.cli.bench import device_of
from latentrt.engines.backend import choose_backend
from latentrt.engines.cuda.facts import available
from latentrt.engines.errors import BackendError
from latentrt.engines.package import Package
from latentrt.engines.processors import usable_processors
from latentrt.runtime.model import SHIPPED

GOOD = Row(side="latentrt", workload="unet", rounds=((0.01, 0.02), (0.01, 0.03)))
BAD = Row(side="latentrt", workload="unet", status="FAILED", reason="not finite")


def _document(*rows: Row) -> Document:
    return Document(benchmark="latency", model={"name": "x", "dtype": "fp32"}, settings={}, rows=rows)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call a verb: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", "bench", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every measurement answers with one good row, and leaves behind what it was asked."""
    asked: dict[str, Any] = {}

    def measure(package: Any, what: Any, *more: Any, **options: Any) -> Document:
        asked.update(options, what=what, more=more, package=package)
        return _document(GOOD)

    for module, name in (
        (latency, "measure_latency"),
        (scaling, "measure_scaling"),
        (memory, "measure_memory"),
        (throughput, "measure_throughput"),
        (build_time, "measure_build"),
        (parity, "measure_parity"),
        (serve, "measure_serve"),
    ):
        monkeypatch.setattr(module, name, measure)
    return asked


def test_latency_is_told_everything(bench: Any, found: dict[str, Any], tmp_path: Path) -> None:
    options = "--width 64 --height 192 --steps 3 --batch 2 --guidance-scale 1 --sampler ddim --threads 1"
    peers = "--peers diffusers,openvino --workloads unet,picture --backend onnxruntime --budget 9"
    code, out, err = bench(
        "latency", "demo", *options.split(), *peers.split(), "--out", str(tmp_path / "a.json")
    )
    assert (code, err) == (0, "")
    assert "15.0 ms" in out
    case = found["more"][0][0]
    assert (case.width, case.height, case.steps, case.pictures, case.guided) == (64, 192, 3, 2, False)
    assert (case.sampler, found["workloads"]) == ("ddim", ("unet", "picture"))
    sides = found["what"]
    assert (sides.peers, sides.task.threads, sides.task.backend) == (
        ("diffusers", "openvino"),
        1,
        "onnxruntime",
    )
    assert sides.task.checkpoint is not None, "the demo's own, in a checkout"
    assert found["pace"].budget == 9
    assert read_document(tmp_path / "a.json").model["name"] == "demo"


def test_no_side_gets_more_threads_than_processors(bench: Any, found: dict[str, Any]) -> None:
    assert bench("latency", "demo", "--threads", "9999")[0] == 0
    assert found["what"].task.threads == usable_processors()


def test_json_is_the_document(bench: Any, found: dict[str, Any]) -> None:
    code, out, err = bench("scaling", "--axes", "steps,batch", "--quick", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["rows"][0]["summary"]["p50"] == 0.015
    assert list(found["axes"]) == ["steps", "batch"]
    assert found["pace"].budget < 10


def test_memory_and_throughput_are_told_everything(bench: Any, found: dict[str, Any]) -> None:
    assert bench("memory", "--peers", "onnxruntime", "--batch", "2")[0] == 0
    assert (found["what"].peers, found["what"].references, found["more"][0].pictures) == (
        ("onnxruntime",),
        (),
        2,
    )
    assert bench("throughput", "--batches", "1, 3", "--budget", "7")[0] == 0
    assert (found["batches"], found["rules"].budget) == ((1, 3), 7)


def test_build_and_parity_are_told_everything(bench: Any, found: dict[str, Any]) -> None:
    options = "--backend tensorrt --profile 64x64:b1 --nets unet_time,unet_context --repeats 3"
    assert bench("build", *options.split())[0] == 0
    builds = found["what"]
    assert (builds.backend, [str(profile) for profile in builds.profiles]) == ("tensorrt", ["64x64:b1"])
    assert (builds.nets, builds.repeats) == (("unet_time", "unet_context"), 3)
    options = "--backend tensorrt --reference openvino --samples 5 --threads 1 --steps 3"
    assert bench("parity", *options.split())[0] == 0
    assert (found["what"].backend, found["what"].threads) == ("tensorrt", 1)
    assert found["reference"] == "openvino"
    assert (found["more"][0].samples, found["more"][0].cases[0].steps) == (5, 3)


def test_the_load_test_is_told_everything(bench: Any, found: dict[str, Any]) -> None:
    options = "--loads 0.5,2 --rounds 4 --requests 50 --jobs 5 --rows 6 --steps 3 --threads 1 --width 64"
    assert bench("serve", *options.split())[0] == 0
    rules, case = found["rules"], found["more"][0]
    assert (rules.loads, rules.rounds, rules.requests, rules.jobs, rules.rows) == ((0.5, 2.0), 4, 50, 5, 6)
    assert (case.width, case.steps, found["what"].threads) == (64, 3, 1)
    assert bench("serve", "--quick", "--jobs", "5")[0] == 0
    assert (found["rules"].jobs, found["rules"].rows, found["rules"].loads) == (5, None, (0.6, 0.9, 1.2))
    assert found["rules"].requests < rules.requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--peers", "abacus"], "unknown name 'abacus'"),
        (["latency", "--workloads", "unet,all"], "unknown name 'all'"),
        (["latency", "--device", "gpu"], "'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["compare", "a.json", "b.json", "--threshold", "2"], "'--threshold'"),
        (["scaling", "--axes", "time"], "unknown name 'time'"),
        (["throughput", "--batches", "1,x"], "--batches is '1,x'"),
        (["throughput", "--batches", "0"], "--batches is '0'"),
        (["serve", "--loads", "0.5,high"], "the loads are '0.5,high'"),
        (["serve", "--loads", "0"], "the loads are '0'"),
        (["serve", "--loads", "inf"], "the loads are 'inf'"),
        (["serve", "--requests", "1"], "'--requests'"),
        (["latency", "no-such-model"], "there is no model 'no-such-model'"),
        (["build", "--nets", "unet,step,unet_whole"], "unknown name 'unet_whole'"),
        (["parity", "--reference", "yardstick"], "'yardstick' cannot be the reference"),
    ],
)
def test_wrong_usage(bench: Any, arguments: list[str], message: str) -> None:
    code, _, err = bench(*arguments)
    assert code == 2
    assert message in err


def test_the_gpu_check_is_a_verb(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr("latentrt.benchmarks.gpu.check.main", lambda arguments: calls.append(arguments) or 4)
    assert bench("gpu", "--minutes", "3", "--steps", "unet,whole", "--out", "x.json")[0] == 4
    assert bench("gpu")[0] == 4
    assert calls == [
        ["--package", "demo", "--minutes", "3.0", "--steps", "unet,whole", "--out", "x.json"],
        ["--package", "demo", "--minutes", "12.0"],
    ]


@pytest.mark.skipif(available() is None, reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--steps", "unet"], ["--minutes", "3"]])
def test_the_gpu_check_understands_what_the_verb_passes(bench: Any, arguments: list[str]) -> None:
    assert bench("gpu", *arguments)[0] == BackendError.exit_code


def test_torchs_mode_is_passed_on(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def measure(package: Any, sides: Sides, *parts: Any, **options: Any) -> Document:
        modes.append(sides.task.compile_mode)
        return _document(GOOD)

    monkeypatch.setattr(latency, "measure_latency", measure)
    assert bench("latency", "--compile-mode", "reduce-overhead")[0] == 0
    assert bench("latency")[0] == 0
    assert modes == ["reduce-overhead", ""]


def test_all_of_them(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {verb: BAD if verb == "parity" else GOOD for verb in ("latency", "parity", "build")}
    verbs = {verb: lambda progress, row=row: _document(row) for verb, row in rows.items()}
    monkeypatch.setattr(suite, "planned", lambda model, sides, quick: verbs)
    code, out, _ = bench("all", str(tmp_path), "--quick")
    assert code == 1, "one failed, the others are there"
    assert {path.name for path in tmp_path.iterdir()} == {f"{verb}-demo.json" for verb in verbs}
    assert out.count("FAILED") == 1
    monkeypatch.setattr(latency, "measure_latency", lambda *parts, **options: _document(GOOD, BAD))
    code, out, _ = bench("latency")
    assert code == 1
    assert "FAILED: not finite" in out


def test_quick_measures_less_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package.open(SHIPPED["demo"])
    model = Model(name="demo", package=package, path=package.root, checkpoint=None)
    about = model, Sides(task=Task(model=package.root))
    found: dict[str, list[dict[str, Any]]] = {}  # the keywords of each verb's function: quick, and in full
    for verb in ("scaling", "memory", "throughput", "latency"):
        calls = found.setdefault(verb, [])
        monkeypatch.setattr(
            suite, f"measure_{verb}", lambda *positional, calls=calls, **named: calls.append(named)
        )
        for quick in (True, False):
            suite.planned(*about, quick=quick)[verb](silent)
    axes, all_axes = (call["axes"] for call in found["scaling"])
    assert all_axes == {name: axis.values for name, axis in AXES.items()}
    assert axes == {name: values[:3] for name, values in all_axes.items()}, "as few as a residual needs"
    watched, all_watched = (call["steps"] for call in found["memory"])
    assert watched < all_watched
    assert watched - SETTLED >= 2 * BLOCKS, "what comes and goes with every other step is no growth"
    assert [call["batches"] for call in found["throughput"]] == [(1, 4), (1, 2, 4, 8)]
    pace, all_pace = (call["pace"] for call in found["latency"])
    assert pace.budget < all_pace.budget


def test_compare(bench: Any, tmp_path: Path) -> None:
    documents = {
        "fast": _document(replace(GOOD, rounds=((0.01,) * 9,) * 12)),
        "slow": _document(replace(GOOD, rounds=((0.02,) * 9,) * 12)),
        "other": _document(replace(GOOD, workload="picture")),
        "elsewhere": replace(_document(GOOD), machine={**_document().machine, "cpu": "another processor"}),
    }
    for name, document in documents.items():
        document.write(tmp_path / name)

    def compare(before: str, after: str, *options: str) -> tuple[int, str, str]:
        return bench("compare", str(tmp_path / before), str(tmp_path / after), *options)

    assert compare("fast", "slow")[0] == 1
    code, out, _ = compare("slow", "fast", "--json")
    assert (code, json.loads(out)["regressed"]) == (0, False)
    assert compare("fast", "none")[0] == 3
    code, out, _ = compare("fast", "other")
    assert code == 1
    assert "nothing was compared" in out
    code, _, err = compare("fast", "elsewhere")
    assert code == 2
    assert "different machines" in err


def test_report(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results").mkdir()
    _document(GOOD).write(tmp_path / "results" / "latency-x.json")
    pages = {"readme": "bench-summary", "measurements": "bench"}
    arguments = ["report", str(tmp_path / "results")]
    for name, marker in pages.items():
        (tmp_path / f"{name}.md").write_text(f"a\n<!-- {marker}:begin -->\n<!-- {marker}:end -->\nb\n")
        arguments += [f"--{name}", str(tmp_path / f"{name}.md")]
    code, out, _ = bench(*arguments)
    assert code == 0
    assert out.startswith("1 documents")
    assert "**x (fp32)**" in (tmp_path / "measurements.md").read_text()
    assert (
        "[All measurements, and how they were made](measurements.md)"
        not in (tmp_path / "readme.md").read_text()
    ), "no row, no table"
    assert json.loads(bench(*arguments, "--json")[1])["changed"] == []


@pytest.mark.parametrize(
    ("backend", "device", "found"),
    [
        ("onnxruntime", "auto", "cpu"),
        ("onnxruntime-cuda", "auto", "cuda"),
        ("onnxruntime-cuda", "cpu", "cpu"),
        ("imagined", "auto", "cpu"),
    ],
)
def test_peers_run_where_our_backend_does(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, found: str
) -> None:
    def choose(name: str) -> tuple[str, object]:
        return (name, None) if name == "onnxruntime-cuda" else choose_backend(name)

    monkeypatch.setattr("latentrt.engines.backend.choose_backend", choose)
    assert device_of(backend, device) == found
