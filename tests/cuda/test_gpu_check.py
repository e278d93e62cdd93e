"""The whole plan of the GPU check over the stand-in: its order, its time, what comes out of its steps."""

import os
import subprocess
from pathlib import Path

import pytest

from latentrt.benchmarks.gpu.plan import ORT, planned
from latentrt.benchmarks.records import Document, Row, read_document
from tests.cuda.environment import PYTHON, ROOT
from tests.cuda.skeleton import zero_package

# In every process of the check. Pictures of zeros are of a single colour, which is an error of the nets.
_SITE = """
from tests.cuda.runtime import StandIn
StandIn().install()
from latentrt.runtime import result
result.check_pictures = lambda images, dtype: None
"""
# Nothing computes there: what compares values fails by its bar, and by nothing else.
_VALUES = ("dB, below", "relative L2", "ones by ones", "single colour", "is not ours")
_EXPERIMENTS = ("exhaustive", "eager_loading", "weights_in_arena", "unet_plain")


@pytest.fixture(scope="module")
def document(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Document:
    folder = tmp_path_factory.mktemp("check")
    (folder / "sitecustomize.py").write_text(_SITE)
    zero_package("sd15-fp16", folder / "sd15")
    path = os.pathsep.join((str(folder), str(ROOT)))
    variables = {**os.environ, "LD_LIBRARY_PATH": str(built), "PYTHONPATH": path}
    out = folder / "found.json"
    command = [str(PYTHON), "-m", "latentrt.benchmarks.gpu.check", "--out", str(out)]
    command += ["--full-size", str(folder / "sd15")]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert "| sd15 UNet step, replayed | " in done.stdout
    return read_document(out)


def rows_of(document: Document, step: str) -> dict[str, Row]:
    return {row.case["what"]: row for row in document.rows if row.workload == step}


@pytest.mark.slow
def test_the_plan_over_the_stand_in(document: Document) -> None:
    steps = list(dict.fromkeys(row.workload for row in document.rows))
    assert steps == [name for name, _ in planned([ORT])]
    failed = [row for row in document.rows if row.status == "FAILED"]
    assert not [row.reason for row in failed if not any(text in row.reason for text in _VALUES)]
    assert {row.workload for row in failed} <= {"smoke", "picture", "parity"}
    for row in document.rows:
        if row.case["what"] == "process":
            assert row.status == "ok", f"{row.workload}: {row.reason}"
    assert {row.status for row in rows_of(document, "placement").values()} == {"ok"}
    seconds = sum(row.samples[0] for row in document.rows if row.case["what"] == "process")
    assert seconds < 500, "and a GPU's machine is faster"


@pytest.mark.slow
def test_what_the_stand_in_can_tell(document: Document) -> None:
    opened = rows_of(document, "unet")["unet opened"].figures
    assert 1600 < opened["taken_mib"] < 2000, "the UNet's weights in half precision"
    for step in ("unet", *_EXPERIMENTS):
        assert set(rows_of(document, step)) == {"unet opened", "unet plain", "unet replayed", "process"}
    memory = rows_of(document, "whole")["memory"].figures
    assert memory["opened_mib"] <= memory["of_process_mib"] <= memory["peak_mib"]
    assert memory["closed_mib"] < 100
    assert rows_of(document, "outlived")["replayed after another shape"].figures["outlives"] == "yes"
    assert all(row.figures.get("rebuilt_s", 1) > 0 for row in rows_of(document, "shapes").values())
