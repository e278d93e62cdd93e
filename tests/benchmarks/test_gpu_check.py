"""The GPU check as a whole: its processes, its document, and what it says where there is no GPU."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from latentrt.benchmarks.gpu import check as gpu_check
from latentrt.benchmarks.gpu import child as gpu_child
from latentrt.benchmarks.gpu.child import SECTIONS, run_child, section_command
from latentrt.benchmarks.gpu.memory import Lowest
from latentrt.benchmarks.gpu.opener import backend_opener
from latentrt.benchmarks.gpu.rows import Row, collect
from latentrt.benchmarks.machine import describe_gpu, describe_machine
from latentrt.benchmarks.records import short
from latentrt.engines.cuda.facts import available
from latentrt.engines.device import DeviceMemory
from latentrt.engines.errors import BackendError
from latentrt.engines.package import Package
from tests.benchmarks.gpu_stand_in import MIB, SCALE, Hungry, WatchedDevice, stand_in
from tests.runtime.device_bench import package_with_step

WITHOUT_GPU = pytest.mark.skipif(available() is None, reason="there is a GPU")

# ── processes ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package_with_step(tmp_path_factory.mktemp("demo") / "package")


def child(code: str) -> list[str]:
    return [sys.executable, "-X", "faulthandler", "-c", f"import json, os, sys, time\n{code}"]


ROW = """with open(sys.argv[1], 'a') as rows:
    print(json.dumps(dict(what='a', status='ok', reason='', figures={})), file=rows)
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.abort()", r"it crashed with SIGABRT: .*Fatal Python error: Aborted"),
        ("raise ValueError('a defect')", r"it ended with exit code 1: .*ValueError: a defect"),
        ("sys.exit(3)", r"it ended with exit code 3"),
    ],
)
def test_a_child_that_ends_badly_is_a_row_after_its_own(code: str, reason: str) -> None:
    done, last = run_child(child(f"{ROW}\n{code}"), 30)
    assert done.what == "a"
    assert last.status == "FAILED"
    assert re.match(reason, last.reason)


def test_a_child_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    sign = tmp_path / "alive"
    grandchild = f"import time; time.sleep(4); open({str(sign)!r}, 'w')"
    code = (
        f"{ROW}\nimport subprocess\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}])\ntime.sleep(99)"
    )
    began = time.perf_counter()
    done, last = run_child(child(code), 2)
    assert done.what == "a"
    assert last.reason == "it did not end within 2 s"
    assert time.perf_counter() - began < 4
    time.sleep(4)
    assert not sign.exists()


def test_a_child_without_rows_and_one_with_half_a_row() -> None:
    (row,) = run_child(child("pass"), 30)
    assert row.reason == "it ended without a row"
    (row,) = run_child(child("open(sys.argv[1], 'w').write('{\"what\": ')"), 30)
    assert row.reason == "it ended without a row"
    (row,) = run_child(
        child(f"assert os.environ['LATENTRT_CACHE'] == 'here'\n{ROW}"), 30, {"LATENTRT_CACHE": "here"}
    )
    assert row.status == "ok"


@WITHOUT_GPU
def test_a_real_child_says_that_the_backend_cannot_run_here(package: Package) -> None:
    (row,) = run_child(section_command("tensorrt-rtx", "available", package.root), 60)
    assert row.status == "not available", row.reason
    assert "NVIDIA" in row.reason


def test_an_error_in_a_section_is_a_row() -> None:
    def section() -> Iterator[Row]:
        yield Row(what="first", status="ok")
        raise ZeroDivisionError("by zero")

    first, last = collect(section())
    assert first.status == "ok"
    assert re.fullmatch(r"ZeroDivisionError: by zero \(test_gpu_check\.py:\d+\)", last.reason)


def test_a_childs_main_writes_rows(tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_child, "backend_opener", lambda backend, package: stand_in(package))
    monkeypatch.setattr(gpu_child.Scale, "of", classmethod(lambda cls, manifest: SCALE))
    gpu_child.main(["stand-in", "open", str(package.root), str(tmp_path / "rows")])
    assert json.loads((tmp_path / "rows").read_text())["status"] == "ok"


# ── the whole ────────────────────────────────────────────────────────────────────────────────────

OK, FAILED, NOT = (Row(what="w", status=status, reason="") for status in ("ok", "FAILED", "not available"))


def checked(rows: dict[str, list[Row]], limit: float = 99) -> tuple[gpu_check.Found, list[str]]:
    lines: list[str] = []
    *_, found = gpu_check.check(
        ["tensorrt"], lambda backend, section, left: rows.get(section, [OK]), limit=limit, said=lines.append
    )
    return found, lines


def test_every_section_is_run_and_told() -> None:
    found, lines = checked({"graphs": [NOT], "ladder": [OK, FAILED]})
    assert [row["section"] for row in found.sections] == list(SECTIONS)
    assert len(lines) == len(found.rows) == len(SECTIONS) + 1
    assert found.count("FAILED") == 1
    assert lines[0] == "tensorrt         available w: ok"


@pytest.mark.parametrize(
    ("section", "row", "last"),
    [
        ("available", NOT, "available"),
        ("build", FAILED, "build"),
        ("build", NOT, "timing"),
        ("open", NOT, "open"),
        ("open", FAILED, "open"),
        ("parity", FAILED, "timing"),
    ],
)
def test_where_a_backend_ends(section: str, row: Row, last: str) -> None:
    assert checked({section: [row]})[0].sections[-1]["section"] == last


def test_no_time_left() -> None:
    assert checked({}, limit=0)[0].rows[0]["reason"] == "no time is left of 0 s"


def test_sections_together_are_limited() -> None:
    given: list[float] = []
    list(gpu_check.check(["tensorrt"], lambda b, s, left: given.append(left) or [OK], limit=100, said=str))
    assert max(given) <= 100


@pytest.mark.parametrize(("row", "code"), [(OK, 0), (NOT, 0), (FAILED, 1)])
def test_the_document(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    row: Row,
    code: int,
) -> None:
    gpu = {"gpu": {"name": "NVIDIA H200 (x)"}}
    monkeypatch.setattr(gpu_check, "available", lambda: None)
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: gpu)
    monkeypatch.setattr(gpu_check, "run_child", lambda command, limit, environment: [row])
    out = tmp_path / "found.json"
    assert gpu_check.main(["--out", str(out), "--backends", "tensorrt"]) == code
    data = json.loads(out.read_text())
    assert data["machine"] == gpu
    assert data["schema"] == gpu_check.SCHEMA
    assert data["summary"][row.status] == len(data["rows"])
    assert set(data["rows"][0]) == {"backend", "section", "what", "status", "reason", "figures"}
    named = set(re.findall(r"^    ([a-z_]+) +\S", str(gpu_check.__doc__), re.MULTILINE))
    assert set(data) | set(SECTIONS) <= named, "what the docstring does not describe"
    assert "FAILED" in capsys.readouterr().out or code == 0


def test_where_the_document_goes() -> None:
    path = gpu_check.default_file("NVIDIA H200 (x)", "2026-11-21")
    assert path.name == "gpu_check-nvidia-h200-x-2026-11-21.json"
    assert path.parent.name == "results"


@WITHOUT_GPU
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 4
    told = capsys.readouterr()
    assert re.match(r"gpu_check: .*NVIDIA.*\. Run it where", told.err)
    assert not told.out


def test_a_package_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "available", lambda: None)
    assert gpu_check.main(["--package", str(tmp_path)]) == 3
    assert "manifest.json" in capsys.readouterr().err


def test_what_is_published_names_no_folder() -> None:
    text = short("File /home/someone/x-1/lib/python3.11/a.py, and\n  /tmp/store.lock; 3/4 of 16x16")
    assert text == "File …/a.py, and …/store.lock; 3/4 of 16x16"


def test_a_backend_without_a_device(package: Package) -> None:
    with pytest.raises(BackendError, match="'onnxruntime' runs on no device"):
        backend_opener("onnxruntime", package)


def test_nets_and_device_are_closed_also_where_one_fails(package: Package) -> None:
    class Once(WatchedDevice):
        closed = 0

        def close(self) -> None:
            self.closed += 1
            super().close()

    class Failing(Hungry):
        def close(self) -> None:
            closed.append(self)
            super().close()
            raise BackendError("this one fails", expected="closing", fix="None.")

    closed: list[Failing] = []
    device = Once(2**30)
    opener = stand_in(package, device, wrap=lambda name, net: Failing(net, 0))
    with pytest.raises(BackendError, match="this one fails"), opener.nets() as (_, nets):
        pass
    assert len(closed) == len(nets)
    assert device.closed == 1


def test_what_fails_while_memory_is_watched_is_raised() -> None:
    class Failing(WatchedDevice):
        """Its second answer, the first of the thread's, is an error."""

        asked = 0
        failed = Event()

        def memory(self) -> DeviceMemory:
            self.asked += 1
            if self.asked == 2:
                self.failed.set()
                raise BackendError("the device is lost", expected="an answer", fix="None.")
            return super().memory()

    device = Failing(MIB)
    with pytest.raises(BackendError, match="the device is lost"), Lowest(device).watching():
        assert device.failed.wait(30)


@WITHOUT_GPU
def test_a_machine_without_a_gpu() -> None:
    assert describe_machine()["gpu"] is None
    assert describe_gpu() is None
