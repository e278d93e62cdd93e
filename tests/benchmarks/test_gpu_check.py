"""The GPU check as a whole: its processes, what becomes of it when they end badly, its document and table."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.benchmarks.gpu import check as gpu_check
from latentrt.benchmarks.gpu import opener as gpu_opener
from latentrt.benchmarks.gpu import plan
from latentrt.benchmarks.gpu.check import run_step
from latentrt.benchmarks.gpu.opener import collect, row_of, why_not
from latentrt.benchmarks.gpu.plan import BACKENDS, ORT, STEPS, Place, planned
from latentrt.benchmarks.gpu.summary import summary
from latentrt.benchmarks.machine import describe_machine
from latentrt.benchmarks.records import Document, Row, read_document
from latentrt.engines.cuda.facts import available
from latentrt.engines.errors import BackendError, CancelledError, StorageError, UsageError
from tests.benchmarks.gpu_stand_in import PACKAGE

WITHOUT_GPU = pytest.mark.skipif(available() is None, reason="there is a GPU")
MACHINE = {"gpu": {"name": "NVIDIA H200 (x)", "driver": "580.1", "cuda": "13.0"}, "libraries": {"torch": "2"}}
FAKE = "-I", "-S", "-c"  # a child that starts in 10 ms
PRINTED = f"print({json.dumps(Row(side='latentrt', workload='a').to_json())!r}, flush=True)"
NAMES = [name for name, _ in planned([ORT])]
Main = Callable[..., int]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """The command, where there is a GPU, and every step's process runs the code that is passed."""

    def run(code: str, *arguments: str, limit: float = 20.0, said: list[str] | None = None) -> int:
        def child(step: str, place: Place) -> list[str]:
            assert step in STEPS
            return [*FAKE, code.replace("STEP", step)]

        short = {name: replace(step, limit=limit) for name, step in STEPS.items()}
        monkeypatch.setattr(gpu_check, "STEPS", short)
        monkeypatch.setattr(gpu_check, "available", lambda: None)
        monkeypatch.setattr(gpu_check, "Document", partial(Document, machine=MACHINE))
        monkeypatch.setattr(gpu_check, "child_arguments", child)
        return gpu_check.main(["--out", str(tmp_path / "found.json"), *arguments])

    return run


# ── a step that ends badly ─────────────────────────────────────────────────────────────────────────

ROW = Row(side="latentrt", workload="a").to_json()


def odd(field: str, value: Any) -> str:
    """Code that prints a row with something else in a field."""
    return f"print({json.dumps({**ROW, field: value})!r}, flush=True)"


BADLY = {
    "an exception": ("1 / 0", "it ended with exit code 1: Traceback", "ZeroDivisionError"),
    "a crash": (
        "import os, signal, sys; print('the driver says why', file=sys.stderr, flush=True);"
        " os.kill(os.getpid(), signal.SIGSEGV)",
        "it ended with SIGSEGV: the driver says why",
        "the driver",
    ),
    "a kill": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it ended with SIGKILL", ""),
    "a hang": ("import time; time.sleep(60)", "it did not end within 0 s", ""),
    "an exit code": ("raise SystemExit(3)", "it ended with exit code 3", ""),
    "no row": ("print('{', flush=True)", "it wrote a line that is no row: '{'", ""),
    "a row of another kind": (odd("case", None), "it wrote a line that is no row", ""),
    "a status": (odd("status", "well"), "it wrote a line that is no row", ""),
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are not Windows'")
@pytest.mark.parametrize("kind", BADLY)
def test_whatever_becomes_of_each_step_the_next_one_runs(check: Main, tmp_path: Path, kind: str) -> None:
    code, reason, logged = BADLY[kind]
    # a busy machine may not start a process within a hang's limit: that one has no row before
    first, limit = ([], 0.1) if kind == "a hang" else (["a"], 20.0)
    assert check(f"{PRINTED}; {code}" if first else code, limit=limit) == 1
    rows = read_document(tmp_path / "found.json").rows
    assert [(row.workload, row.case["what"], row.status) for row in rows] == [
        (name, what, "FAILED" if what == "process" else "ok")
        for name in NAMES
        for what in (*first, "process")
    ], "what came before counts"
    for row in rows[len(first) :: len(first) + 1]:
        assert row.reason.startswith(reason)
        assert row.samples[0] > 0
        assert row.stamp["at_s"] > 0
    for name in NAMES:
        assert logged in (tmp_path / "found-logs" / f"{ORT}-{name}.log").read_text()


def test_a_step_without_rows_failed() -> None:
    (row,) = run_step([*FAKE, "pass"], 9)
    assert (row.status, row.reason) == ("FAILED", "it ended without a row")


def test_an_error_in_a_step_is_a_row() -> None:
    def section() -> Iterator[Row]:
        yield row_of("first")
        raise ZeroDivisionError("by zero")

    first, last = collect(section())
    assert first.status == "ok"
    assert re.fullmatch(r"ZeroDivisionError: by zero \(test_gpu_check\.py:\d+\)", last.reason)


def test_the_minutes_are_kept(check: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    assert check(f"{PRINTED}; import time; time.sleep(60)", "--minutes", "0.03") == 1
    assert time.perf_counter() - began < 10
    rows = read_document(tmp_path / "found.json").rows
    assert [row.workload for row in rows] == [NAMES[0], *NAMES], "the first has a row, the others are told"
    assert {row.reason for row in rows[2:]} == {"no time is left of 2 s"}
    assert capsys.readouterr().out.count("no time is left of 2 s") >= len(NAMES) - 1


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are not Windows'")
def test_what_a_step_has_started_ends_with_it() -> None:
    """Its child holds the pipe that rows come through."""
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.perf_counter()
    (row,) = run_step([*FAKE, code], 1.0)
    assert "it did not end within 1 s" in row.reason
    assert time.perf_counter() - began < 20


def test_the_table_is_printed_where_somebody_stops_it(
    check: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, steps = gpu_check.run_step, iter(range(3))

    def stopped(*arguments: Any) -> Iterator[Row]:
        if next(steps) == 2:
            raise KeyboardInterrupt
        yield from usual(*arguments)

    monkeypatch.setattr(gpu_check, "run_step", stopped)
    assert check(PRINTED) == CancelledError.exit_code
    assert {row.workload for row in read_document(tmp_path / "found.json").rows} == set(NAMES[:2])
    assert "stopped: the table has what was found until now" in capsys.readouterr().out


def test_a_disk_that_is_full_ends_nothing(
    check: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, room = Document.write, iter([True, False])

    def write(self: Document, path: Path) -> None:
        if not next(room, False):
            raise OSError(28, "No space left on device")
        usual(self, path)

    monkeypatch.setattr(Document, "write", write)
    assert check(PRINTED) == 0
    found = capsys.readouterr()
    assert all(f" {name} " in found.out for name in NAMES)
    assert "found.json is not up to date: [Errno 28] No space left on device" in found.err
    monkeypatch.setattr(
        Document, "write", lambda self, path: write(self, path)
    )  # nothing fits from the start
    assert check(PRINTED) == StorageError.exit_code
    assert "cannot be written: No space left on device" in capsys.readouterr().err


def test_what_was_measured_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("found.json", "found-2.json", "found-3.json"):
        path = gpu_check._unused("found")
        assert path.name == expected
        path.touch()


KILLED = f"""
import sys
from latentrt.benchmarks.gpu import check
check.available = lambda: None
check.child_arguments = lambda step, place: ["-I", "-S", "-c", {PRINTED!r} + (
    "; import time; time.sleep(2)" if step == "smoke" else "")]
check.main(["--out", sys.argv[1]])
"""


def test_the_document_is_whole_when_all_of_it_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-c", KILLED, str(out)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " smoke " in line:
                process.kill()
                break
    expected = [(name, what) for name in NAMES[:3] for what in ("a", "process")]
    assert process.returncode == -signal.SIGKILL, "it went on for two seconds"
    rows = read_document(out).rows
    assert [(row.workload, row.case["what"]) for row in rows][:6] == expected
    assert len(rows) <= 7
    assert gpu_check.main(["--table", str(out)]) == 0


# ── what is run ──────────────────────────────────────────────────────────────────────────────────


def test_the_plan() -> None:
    assert NAMES[0] == "environment"
    assert NAMES[-1] == "outlived", "what may end the process comes last"
    assert NAMES.index("unet") < NAMES.index("whole") < NAMES.index("unet_plain")
    named = planned(BACKENDS[:2], ["parity", "smoke"])
    assert named == [("smoke", ORT), ("parity", ORT), ("parity", "tensorrt")]
    assert [name for name, _ in planned(["tensorrt"])] == [
        *("environment", "build", "picture", "placement", "parity", "graphs", "sharing")
    ]


def test_steps_can_be_named_and_listed(
    check: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in listed] == [[n, f"{s.limit:.0f}"] for n, s in STEPS.items()]
    assert check(PRINTED, "--steps", "whole,smoke") == 0
    rows = read_document(tmp_path / "found.json").rows
    assert [row.workload for row in rows] == ["smoke", "smoke", "whole", "whole"]
    assert [row.case for row in rows[:2]] == [{"backend": ORT, "what": what} for what in ("a", "process")]
    with pytest.raises(SystemExit):
        gpu_check.main(["--steps", "whole,abacus"])
    assert "there is no step 'abacus': --list prints all of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--minutes", "nan"], ["--minutes", "-1"], ["--minutes", "soon"], ["--steps", ","]]
)
def test_options_that_mean_nothing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_steps_that_are_for_no_backend(check: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(PRINTED, "--backends", "tensorrt", "--steps", "unet") == UsageError.exit_code
    assert "no step of unet is for tensorrt" in capsys.readouterr().err


def test_a_steps_process_has_its_variables(check: Main, tmp_path: Path) -> None:
    code = "import os; assert os.environ.get('CUDA_MODULE_LOADING') == 'EAGER', 'loaded lazily'; " + PRINTED
    check(code, "--steps", "eager_loading,unet")
    ended = {row.workload: row.status for row in read_document(tmp_path / "found.json").rows}
    assert ended == {"unet": "FAILED", "eager_loading": "ok"}


def test_torch_is_compiled_in_a_mode_that_takes_minutes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """max-autotune tunes for longer than a GPU is borrowed."""
    modes = list[str]()
    monkeypatch.setattr(plan, "torch_unet", lambda mode: modes.append(mode) or iter(()))
    place = Place(backend=ORT, package=Path(), full_size=Path(), folder=Path())
    for name in ("torch_eager", "torch_compiled"):
        list(STEPS[name].run(place))
    assert modes == ["", "reduce-overhead"]


def test_every_step_is_described() -> None:
    text = str(gpu_check.__doc__)
    head = [line[4:].partition("  ")[0] for line in text.splitlines() if re.match(r"    [a-z]", line)]
    named = {name for names in head for name in names.split(", ")}
    assert set(STEPS) <= named


def test_whether_a_backend_can_run_here_is_asked_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_opener, "choose_backend", lambda name: (name, None))
    for sm, reason in (
        ((8, 9), ""),
        ((9, 0), r"tensorrt-rtx lists [\d., ]+, and this GPU is sm_90"),
    ):
        gpu = SimpleNamespace(sm="sm_{}{}".format(*sm), compute_capability=sm)
        monkeypatch.setattr(gpu_opener, "facts", lambda gpu=gpu: gpu)
        assert re.fullmatch(reason, why_not("tensorrt-rtx"))
        assert why_not(ORT) == ""
    monkeypatch.setattr(plan, "fill_skeleton", lambda *arguments: 1 / 0)
    place = Place(backend="tensorrt-rtx", package=tmp_path, full_size=tmp_path / "none", folder=tmp_path)
    for name in ("build", "placement", "unet", "outlived"):
        (row,) = STEPS[name].run(place)
        assert (row.workload, row.status, row.reason) == ("backend", "not available", why_not("tensorrt-rtx"))


@WITHOUT_GPU
def test_a_real_child_says_that_the_backend_cannot_run_here(tmp_path: Path) -> None:
    place = Place(backend=ORT, package=PACKAGE.root, full_size=tmp_path / "sd15", folder=tmp_path)
    row, process = run_step(gpu_check.child_arguments("placement", place), 60)
    assert process.status == "ok", process.reason
    assert row.status == "not available", row.reason
    assert "CUDA" in row.reason
    assert "load_1min" in row.stamp


def test_the_large_package_is_made_once_and_never_half(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []

    def fill(name: str, folder: Path) -> Any:
        assert not folder.exists()
        folder.mkdir()
        made.append(name)
        if len(made) == 1:
            raise KeyboardInterrupt
        (folder / "manifest.json").write_bytes((PACKAGE.root / "manifest.json").read_bytes())

    monkeypatch.setattr(plan, "fill_skeleton", fill)
    monkeypatch.setattr(plan.Package, "open", lambda folder: replace(PACKAGE, root=folder))
    place = Place(backend=ORT, package=PACKAGE.root, full_size=tmp_path / "sd15", folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(STEPS["skeleton"].run(place))
    for _ in range(2):
        (row,) = STEPS["skeleton"].run(place)
        assert row.figures["mib"] > 0
    assert made == [plan.SKELETON] * 2


# ── the command ──────────────────────────────────────────────────────────────────────────────────


@WITHOUT_GPU
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == BackendError.exit_code
    printed = capsys.readouterr()
    assert re.match(r"gpu_check: .*NVIDIA.*\. Run it where", printed.err)
    assert not printed.out
    assert describe_machine()["gpu"] is None


def test_a_package_or_a_document_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "available", lambda: None)
    assert gpu_check.main(["--package", str(tmp_path)]) == 3
    assert "manifest.json" in capsys.readouterr().err
    assert gpu_check.main(["--full-size", str(tmp_path / "misspelt")]) == 3
    assert not (tmp_path / "misspelt").exists(), "2 GB would go there"
    assert "misspelt" in capsys.readouterr().err
    assert gpu_check.main(["--table", str(tmp_path / "none.json")]) == 3
    assert "no benchmark document" in capsys.readouterr().err


def test_the_child_runs_its_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[Any] = []
    monkeypatch.setattr(gpu_check, "become_child", lambda: written.append)
    run = lambda place: iter([row_of(place.backend, {"of": place.full_size.name})])  # noqa: E731
    monkeypatch.setitem(gpu_check.STEPS, "smoke", replace(STEPS["smoke"], run=run))  # type: ignore[arg-type]
    place = Place(backend="tensorrt", package=PACKAGE.root, full_size=tmp_path / "sd15", folder=tmp_path)
    command = gpu_check.child_arguments("smoke", place)
    assert gpu_check.main(command[command.index("--child") :]) == 0
    assert (written[0]["workload"], written[0]["figures"]) == ("tensorrt", {"of": "sd15"})
    assert written[0]["stamp"]["load_1min"] is not None


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def found(step: str, what: str, figures: dict[str, Any] | None = None, **more: Any) -> Row:
    case = {"backend": ORT, "what": what}
    return replace(row_of(what, figures, **more), workload=step, case=case, stamp={"at_s": 9.87})


def test_the_table_has_the_figures_and_says_what_is_missing() -> None:
    times = {"device_p50_s": 0.006, "host_p50_s": 0.004, "first_s": 1.5, "second_s": 1.0, "third_s": 1.0}
    memory = {"opened_mib": 2100.0, "peak_mib": 2900.0, "closed_mib": 12.0, "of_process_mib": None}
    rows = [
        found("unet", "unet opened", {"taken_mib": 1}, samples=[9.0]),
        found("unet", "unet replayed", times, samples=[0.0061]),
        found("unet", "process", samples=[20.0]),
        found("unet_plain", "unet plain", problems=["no | room"]),
        found("unet_plain", "process", problems=["it ended with SIGSEGV"]),
        found("torch_eager", "unet", missing="not installed: torch"),
        found("picture", "picture, sampler ddim", {"psnr_db": 61.5}),
        found("picture", "picture, sampler euler_a", {"psnr_db": "inf"}),
        found("parity", "unet, width 128", {"relative_l2": 2e-5}),
        found("parity", "unet, width 96", {"relative_l2": 3e-5}, problems=["relative L2 3.00e-05"]),
        found("graphs", "ddim", {"psnr_db": "inf"}),
        found("whole", "first picture", samples=[0.5]),
        found("whole", "memory", memory),
        found("whole", "replayed pictures", problems=["42.0 dB"]),
        found("shapes", "guided, turn 3", {"rebuilt_s": 0.123456}),
        found("outlived", "replayed after another shape", {"outlives": "yes"}),
    ]
    document = Document(benchmark="gpu_check", model={}, settings={}, rows=tuple(rows), machine=MACHINE)
    text = summary(document)
    assert text.splitlines()[0].startswith("NVIDIA H200 (x), driver 580.1, CUDA 13.0, torch 2; ")
    assert dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE)) == {
        "SD 1.5 UNet step, replayed": "6.10 ms (6.00 on the device, 4.00 of the host, the first run 1.50 s)",
        "SD 1.5 UNet step, layout `plain`": "FAILED: it ended with SIGSEGV",
        "SD 1.5 UNet step, torch eager": "not available: not installed: torch",
        "demo picture against the CPU's": "61.5 dB",
        "demo nets against the CPU's": "unet 3.0e-05 (relative L2); FAILED: relative L2 3.00e-05",
        "demo picture, replayed against plain": "identical",
        "SD 1.5 picture, replayed against plain": "FAILED: 42.0 dB",
        "SD 1.5 picture of 20 steps, replayed": "FAILED: 42.0 dB",
        "SD 1.5 first picture": "9.9 s from the start of the process",
        "SD 1.5 memory of the device": "opened 2100 MiB, at most 2900 MiB, closed 12 MiB",
        "another shape costs": "the first run 0.1235 s more",
        "a graph outlives other shapes": "the same values: yes",
        "FAILED": "unet_plain, parity, whole",
    }


def test_a_bar_in_a_reason_does_not_break_the_table() -> None:
    rows = (found("smoke", "x"), found("torch_eager", "unet", problems=["a | b"]))
    text = summary(Document(benchmark="gpu_check", model={}, settings={}, rows=rows, machine=MACHINE))
    assert "| SD 1.5 UNet step, torch eager | FAILED: a \\| b |" in text
