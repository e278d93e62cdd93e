"""Rows and documents, in files and in a terminal."""

import json
from functools import partial
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
    assert (summary["n"], summary["max"]) == (101, max(samples))
    found = [summary[name] for name in ("min", "p50", "p90", "p95", "p99")]
    assert found == pytest.approx(np.sort(samples)[[0, 50, 90, 95, 99]])
    assert Row(side="a", workload="b").summary == {}


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(PackageError, match="FileNotFoundError"):
        read_document(path)
    newer = json.dumps({"schema": SCHEMA + 1}), f"its schema is {SCHEMA + 1}"
    for text, reason in (("{", "JSONDecodeError"), ("[]", "TypeError"), ('{"schema": 1}', "KeyError"), newer):
        path.write_text(text)
        with pytest.raises(PackageError, match=reason):
            read_document(path)


def test_nothing_of_this_machine_is_published() -> None:
    assert short("cannot read /home/someone/models/x.onnx\nat all") == "cannot read …/x.onnx at all"
    assert len(short("x" * 2000)) < 700
    assert plain({"a": [np.int64(3), np.float64("nan"), "in /tmp/abc/d"]}) == {"a": [3, "nan", "in …/d"]}


def test_a_terminal_shows_ratios_and_failures() -> None:
    row = partial(Row, workload="unet", case={"width": 64, "steps": 20})
    ours, again = ((0.010, 0.012), (0.011, 0.010)), ((0.0105, 0.0126), (0.011, 0.010))
    theirs = ((0.020, 0.024), (0.022, 0.020))
    document = _document(
        row(side="latentrt", rounds=ours, figures={"of_best_gemm": 0.9512}),
        row(side="latentrt again", rounds=again),
        row(side="diffusers", rounds=theirs, figures={"relative_l2": 1.5e-6, "psnr_db": "inf"}),
        row(side="openvino", status="FAILED", reason="its picture is another"),
        Row(side="latentrt", workload="peak", unit="B", rounds=((3.5 * 2**30,),)),
    )
    shown = (
        *("p50", "10.5 ms", "A/A spread 2.4 %"),
        *("2.00x ours [2.00, 2.00]  relative_l2 1.5e-06  psnr_db inf", "3.76 GB"),
    )
    found = lines(document)
    assert "of_best_gemm 0.951" in found[1]
    assert [text for text, line in zip(shown, found, strict=False) if text not in line] == []
    assert found[-1] == "unet, openvino: FAILED: its picture is another"
