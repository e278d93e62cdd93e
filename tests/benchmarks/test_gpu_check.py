"""The GPU check as a whole: its processes, its document, and what it says where there is no GPU."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from latentrt.benchmarks.gpu import check as gpu_check
from latentrt.benchmarks.gpu.check import SECTIONS, run_section
from latentrt.benchmarks.gpu.memory import lowest_free
from latentrt.benchmarks.gpu.opener import backend_opener, collect, judged
from latentrt.benchmarks.machine import describe_gpu, describe_machine
from latentrt.benchmarks.records import Document, Row, Status, read_document, short
from latentrt.engines.cuda.facts import available
from latentrt.engines.device import DeviceMemory
from latentrt.engines.errors import BackendError
from tests.benchmarks.gpu_stand_in import MIB, PACKAGE, SCALE, Hungry, WatchedDevice, stand_in

WITHOUT_GPU = pytest.mark.skipif(available() is None, reason="there is a GPU")

# ── processes ────────────────────────────────────────────────────────────────────────────────────


PRINTED = json.dumps(Row(side="latentrt", workload="a").to_json())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (f"print({PRINTED!r})", None),
        (f"print({PRINTED!r}, flush=True); os.abort()", "it ended with SIGABRT: Fatal Python error: Aborted"),
        (f"print({PRINTED!r}, flush=True); time.sleep(99)", "it did not end within 2 s"),
        ("pass", "it ended without a row"),
        ("print('{\"what\": ', flush=True); sys.exit(3)", "it ended with exit code 3"),
    ],
)
def test_a_process_is_its_rows_and_one_more(code: str, reason: str | None) -> None:
    command = ["-X", "faulthandler", "-c", f"import os, sys, time\n{code}"]
    *rows, last = run_section(command, 2)
    assert [row.workload for row in rows] == (["a"] if PRINTED in code else [])
    assert last.workload == "process"
    assert (last.status == "ok") == (reason is None)
    assert last.reason.startswith(reason or "")
    assert last.samples[0] > 0


@WITHOUT_GPU
def test_a_real_child_says_that_the_backend_cannot_run_here() -> None:
    module = ["-m", "latentrt.benchmarks.gpu.check", "--section", "available", "--backends", "tensorrt-rtx"]
    row, process = run_section([*module, "--package", str(PACKAGE.root)], 60)
    assert process.status == "ok", process.reason
    assert row.status == "not available", row.reason
    assert "NVIDIA" in row.reason


def test_an_error_in_a_section_is_a_row() -> None:
    def section() -> Iterator[Row]:
        yield judged("first", [], {})
        raise ZeroDivisionError("by zero")

    first, last = collect(section())
    assert first.status == "ok"
    assert re.fullmatch(r"ZeroDivisionError: by zero \(test_gpu_check\.py:\d+\)", last.reason)


def test_a_sections_main_writes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(gpu_check, "backend_opener", lambda backend, package: stand_in())
    monkeypatch.setattr(gpu_check, "become_child", lambda: written.append)
    monkeypatch.setattr(gpu_check.Scale, "of", classmethod(lambda cls, manifest: SCALE))
    gpu_check.write_rows("open", "stand-in", PACKAGE.root)
    assert [Row.from_json(data).status for data in written] == ["ok"]


# ── the whole ────────────────────────────────────────────────────────────────────────────────────

STATUSES: tuple[Status, ...] = ("ok", "FAILED", "not available")
OK, FAILED, NOT = (Row(side="latentrt", workload="w", status=status) for status in STATUSES)


def checked(rows: dict[str, list[Row]], limit: float = 99) -> tuple[list[Row], list[str]]:
    lines: list[str] = []
    *_, found = gpu_check.check(
        ["tensorrt"],
        lambda backend, section, left: iter(rows.get(section, [OK])),
        limit=limit,
        said=lines.append,
    )
    return found, lines


def test_every_section_is_run_and_printed() -> None:
    found, lines = checked({"graphs": [NOT], "ladder": [OK, FAILED]})
    assert list(dict.fromkeys(row.workload for row in found)) == list(SECTIONS)
    assert len(lines) == len(found) == len(SECTIONS) + 1
    assert [row.case for row in found if row.status == "FAILED"] == [{"backend": "tensorrt", "what": "w"}]
    assert lines[0] == "tensorrt         available   w: ok"
    assert "load_1min" in found[0].stamp


@pytest.mark.parametrize(
    ("section", "row", "last"),
    [
        ("available", NOT, "available"),
        ("build", FAILED, "build"),
        ("build", NOT, "peers"),
        ("open", NOT, "open"),
        ("open", FAILED, "open"),
        ("parity", FAILED, "peers"),
    ],
)
def test_where_a_backend_ends(section: str, row: Row, last: str) -> None:
    assert checked({section: [row]})[0][-1].workload == last


def test_no_time_left() -> None:
    assert checked({}, limit=0)[0][0].reason == "no time is left of 0 s"


def test_sections_together_are_limited() -> None:
    given: list[float] = []
    run = lambda b, s, left: given.append(left) or iter([OK])  # noqa: E731
    list(gpu_check.check(["tensorrt"], run, limit=100, said=str))
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
    monkeypatch.setattr(gpu_check, "Document", partial(Document, machine=gpu))
    monkeypatch.setattr(gpu_check, "run_section", lambda command, limit, environment: iter([row]))
    out = tmp_path / "found.json"
    assert gpu_check.main(["--out", str(out), "--backends", "tensorrt"]) == code
    document = read_document(out)
    assert document.benchmark == "gpu_check"
    assert document.machine == gpu
    assert {item.status for item in document.rows} == {row.status}
    named = set(re.findall(r"^    ([a-z_]+) +\S", str(gpu_check.__doc__), re.MULTILINE))
    assert set(SECTIONS) <= named, "what the docstring does not describe"
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


def test_a_backend_without_a_device() -> None:
    with pytest.raises(BackendError, match="'onnxruntime' runs on no device"):
        backend_opener("onnxruntime", PACKAGE)


def test_nets_and_device_are_closed_also_where_one_fails() -> None:
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
    opener = stand_in(device, wrap=lambda name, net: Failing(net, 0))
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
    with pytest.raises(BackendError, match="the device is lost"), lowest_free(device):
        assert device.failed.wait(30)


@WITHOUT_GPU
def test_a_machine_without_a_gpu() -> None:
    assert describe_machine()["gpu"] is None
    assert describe_gpu() is None
