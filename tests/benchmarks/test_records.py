"""Rows and documents, in files and in a terminal."""

import json
from pathlib import Path

import numpy as np
import pytest

from latentrt.benchmarks.records import SCHEMA, Document, Row, plain, read_document, short
from latentrt.benchmarks.words import lines
from latentrt.engines.errors import PackageError

ROW = Row(
    side="latentrt",
    workload="unet",
    case={"width": 128, "steps": 20},
    rounds=((0.011, 0.010), (0.0123456789, 0.5)),
    figures={"relative_l2": np.float32(0.5), "psnr_db": float("inf")},
    stamp={"cpu": "a processor"},
)


def _document(*rows: Row) -> Document:
    return Document(
        benchmark="latency", model={"name": "demo"}, settings={"peers": ("diffusers",)}, rows=rows
    )


def test_a_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    bytes_row = Row(side="latentrt", workload="peak", unit="B", rounds=((123456789012.0,),))
    failed = Row(side="openvino", workload="unet", status="FAILED", reason="no")
    written = _document(ROW, bytes_row, failed)
    written.write(tmp_path / "new folder" / "a.json")
    found = read_document(tmp_path / "new folder" / "a.json")
    assert found.rows[0].rounds == ((0.011, 0.010), (0.0123457, 0.5)), "six digits"
    assert found.rows[0].figures == {"relative_l2": 0.5, "psnr_db": "inf"}
    assert found.rows[1].samples == (123456789012.0,), "bytes are exact"
    assert found.rows[2] == failed
    assert (found.date, found.machine["commit"]) == (written.date, written.machine["commit"])
    assert found.settings == {"peers": ["diffusers"]}
    assert written.failed
    assert not _document(ROW).failed
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["a.json"]


def test_percentiles_are_numpys() -> None:
    samples = np.random.default_rng(0).exponential(1.0, 101)
    summary = Row(side="a", workload="b", rounds=(tuple(samples[:50]), tuple(samples[50:]))).summary
    assert summary["n"] == 101
    assert summary["p50"] == pytest.approx(np.sort(samples)[50])
    assert summary["p90"] == pytest.approx(np.sort(samples)[90])
    assert summary["p99"] == pytest.approx(np.sort(samples)[99])
    assert (summary["min"], summary["max"]) == (min(samples), max(samples))
    assert Row(side="a", workload="b").summary == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"schema": 1}', "KeyError"),
        (json.dumps({"schema": SCHEMA + 1}), f"its schema is {SCHEMA + 1}"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(PackageError, match=reason):
        read_document(tmp_path / "a.json")


def test_nothing_of_this_machine_is_published() -> None:
    assert short("cannot read /home/someone/models/x.onnx\nat all") == "cannot read …/x.onnx at all"
    assert len(short("x" * 2000)) < 700
    assert plain({"a": [np.int64(3), np.float64("nan"), "in /tmp/abc/d"]}) == {"a": [3, "nan", "in …/d"]}


CASE = {"width": 64, "steps": 20}


def _row(side: str, *rounds: tuple[float, ...], workload: str = "unet", **more: object) -> Row:
    return Row(side=side, workload=workload, case=CASE, rounds=rounds, **more)  # pyright: ignore[reportArgumentType]


def test_a_terminal_shows_ratios_and_failures() -> None:
    document = Document(
        benchmark="latency",
        model={},
        settings={},
        rows=(
            _row("latentrt", (0.010, 0.012), (0.011, 0.010), figures={"of_best_gemm": 0.9512}),
            _row("latentrt again", (0.0105, 0.0126), (0.011, 0.010)),
            _row("diffusers", (0.020, 0.024), (0.022, 0.020), figures={"relative_l2": 1.5e-6}),
            _row("openvino", status="FAILED", reason="its picture is another"),
            Row(side="latentrt", workload="peak", unit="B", rounds=((3.5 * 2**30,),)),
        ),
    )
    head, ours, again, diffusers, peak, openvino = lines(document)
    assert head.split() == ["workload", "side", "p50", "p90", "p99", "n"]
    assert "10.5 ms" in ours
    assert "of_best_gemm 0.951" in ours
    assert "A/A spread 2.4 %" in again
    assert "2.00x ours [2.00, 2.00]" in diffusers
    assert "relative_l2 1.5e-06" in diffusers
    assert "3.76 GB" in peak
    assert openvino == "unet, openvino: FAILED: its picture is another"
