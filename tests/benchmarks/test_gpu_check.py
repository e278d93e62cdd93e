"""The GPU check as a whole: its processes, its document, and what it says where there is no GPU."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from latentrt.benchmarks.gpu import check as gpu_check
from latentrt.benchmarks.gpu.check import SECTIONS, run_section
from latentrt.benchmarks.gpu.opener import collect, row_of
from latentrt.benchmarks.machine import describe_machine
from latentrt.benchmarks.records import Document, Row, Status, read_document
from latentrt.engines.cuda.facts import available
from tests.benchmarks.gpu_stand_in import PACKAGE

WITHOUT_GPU = pytest.mark.skipif(available() is None, reason="there is a GPU")


PRINTED = f"print({json.dumps(Row(side='latentrt', workload='a').to_json())!r}, flush=True)"


@pytest.mark.parametrize(
    ("code", "workloads", "reason"),
    [
        (PRINTED, ["a", "process"], ""),
        ("pass", ["process"], "it ended without a row"),
        (f"{PRINTED}; print('{{'); raise SystemExit(3)", ["a", "process"], "it ended with exit code 3"),
    ],
)
def test_a_process_is_its_rows_and_one_more(code: str, workloads: list[str], reason: str) -> None:
    rows = list(run_section(["-c", code], 9))
    assert [row.workload for row in rows] == workloads
    assert rows[-1].status == ("FAILED" if reason else "ok")
    assert rows[-1].reason.startswith(reason)
    assert rows[-1].samples[0] > 0


@WITHOUT_GPU
def test_a_real_child_says_that_the_backend_cannot_run_here() -> None:
    module = ["-m", "latentrt.benchmarks.gpu.check", "--section", "available", "--backends", "tensorrt-rtx"]
    row, process = run_section([*module, "--package", str(PACKAGE.root)], 60)
    assert process.status == "ok", process.reason
    assert row.status == "not available", row.reason
    assert "NVIDIA" in row.reason


def test_an_error_in_a_section_is_a_row() -> None:
    def section() -> Iterator[Row]:
        yield row_of("first")
        raise ZeroDivisionError("by zero")

    first, last = collect(section())
    assert first.status == "ok"
    assert re.fullmatch(r"ZeroDivisionError: by zero \(test_gpu_check\.py:\d+\)", last.reason)


def test_sections_together_are_limited() -> None:
    allowed: list[float] = []
    run = lambda b, s, left: allowed.append(left) or iter([OK])  # noqa: E731
    list(gpu_check.check(["tensorrt"], run, limit=100, said=str))
    assert max(allowed) <= 100
    assert checked({}, limit=0)[0][0].reason == "no time is left of 0 s"


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
        ("build", NOT, "timing"),
        ("placement", NOT, "placement"),
        ("parity", FAILED, "timing"),
    ],
)
def test_where_a_backend_ends(section: str, row: Row, last: str) -> None:
    assert checked({section: [row]})[0][-1].workload == last


@pytest.mark.parametrize(("row", "code"), [(OK, 0), (NOT, 0), (FAILED, 1)])
def test_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], row: Row, code: int
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


@WITHOUT_GPU
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 4
    printed = capsys.readouterr()
    assert re.match(r"gpu_check: .*NVIDIA.*\. Run it where", printed.err)
    assert not printed.out
    assert describe_machine()["gpu"] is None


def test_a_package_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "available", lambda: None)
    assert gpu_check.main(["--package", str(tmp_path)]) == 3
    assert "manifest.json" in capsys.readouterr().err
