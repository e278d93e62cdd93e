"""Fresh processes, few times."""

from pathlib import Path

import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.records import Document, read_document
from latentrt.benchmarks.sides.contract import Task
from latentrt.benchmarks.verbs import cold_start
from latentrt.benchmarks.verbs.cold_start import PARTS, measure_cold_start
from latentrt.engines.package import Package
from latentrt.runtime.pipeline import SHIPPED


@pytest.fixture(scope="module")
def package() -> Package:
    return Package.open(SHIPPED["demo"])


def measure(package: Package, said: list[str], **task: str) -> Document:
    case = Case.of(package.manifest, width=64, height=64, steps=2)
    opened = Task(package=package.root, threads=1, **task)  # pyright: ignore[reportArgumentType]
    return measure_cold_start(package, opened, case, repeats=1, said=said.append)


def test_processes_and_their_parts(package: Package, tmp_path: Path) -> None:
    said: list[str] = []
    document = measure(package, said)
    document.write(tmp_path / "cold.json")
    assert len(read_document(tmp_path / "cold.json").rows) == len(document.rows)
    assert said == ["a first round, not counted", "round 1 of 1"]
    assert not document.failed, [row.reason for row in document.rows]
    rows = {row.workload: row for row in document.rows}
    whole = ["bare interpreter", "import numpy", "import latentrt.runtime", "--help", "whole process"]
    assert list(rows) == [*whole, *PARTS]
    assert all(len(row.rounds) == len(row.samples) == 1 for row in document.rows)
    inside, total = sum(rows[name].samples[0] for name in PARTS), rows["whole process"].samples[0]
    assert total / 2 < inside < total
    assert min(rows["import numpy"].samples) > min(rows["bare interpreter"].samples)
    assert rows["--help"].figures == {"bar_s": 0.2, "met": rows["--help"].samples[0] <= 0.2}
    assert rows["first picture"].case["width"] == 64
    assert rows["first picture"].stamp["side"]["backend"].startswith("onnxruntime ")


def test_a_process_that_fails_says_why_and_is_not_started_again(package: Package) -> None:
    variants = cold_start._variants(  # pyright: ignore[reportPrivateUsage]
        package, Task(package=package.root, backend="abacus"), Case.of(package.manifest)
    )
    failing = variants[-1]
    failing.start(counted=False)
    failing.arguments = ["-c", "pass"]
    failing.start(counted=True)
    rows = failing.rows({})
    assert {row.status for row in rows} == {"FAILED"}
    assert "unknown backend 'abacus'" in rows[0].reason
    assert not any(row.rounds for row in rows)


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_start, "_LIMIT", 0.2)
    variant = cold_start._Variant(  # pyright: ignore[reportPrivateUsage]
        arguments=["-c", "import time; time.sleep(60)"], workloads=("import",)
    )
    variant.start(counted=True)
    assert variant.reason == "it did not end within 0 s"
