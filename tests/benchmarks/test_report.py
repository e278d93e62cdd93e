"""The report: every number in it is one of a document's, and a second time changes nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.report import Pages, outdated, words, write_report
from latentrt.benchmarks.report.publish import BEGIN, END, SUMMARY_BEGIN, SUMMARY_END, draw_figures
from latentrt.benchmarks.report.reading import Result, read_results
from latentrt.benchmarks.report.tables import full_tables, short_table
from latentrt.engines.errors import PackageError, UsageError
from tests.benchmarks import sample_documents
from tests.benchmarks.sample_documents import SCALES, SMALL, VERBS, write_samples


def result(document: Document, name: str = "document") -> Result:
    return Result(name=name, digest="0" * 64, document=document)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def table() -> str:
    return full_tables(
        [result(make(SMALL), verb) for verb, make in VERBS.items()], {"latency": ["a/latency-peers.png"]}
    )


@pytest.mark.parametrize(
    "line",
    [
        "| memory over the first request of a process | ",
        "UNet: time: weights 2.00 MB, activations 420 kB, in and out 80.0 kB; ",
        "- openvino, whole picture: FAILED: image is not ours: relative L2 3.10e-01, 21.4 dB",
        "| time outside the engines, 128×128, 20 steps, guidance 5 | 0.4 % of a picture, 60.0 µs per step |",
        "| whole picture against steps | 5.10 ms per step + 21.0 ms, largest residual 2.1 % (5: 46.0 ms; ",
        "| throughput, SingleStream | p90 132 ms, p50 128 ms, p99 141 ms |",
        "| throughput, Offline | 8.65 pictures/s at batch 4 |",
        "| what each step leaves behind | 0 B, over 97 steps |",
        "| cold start, its parts | import 312 ms, open 425 ms, first picture 936 ms |",
        "| build of the engines | 6 of 6 nets in 3.24 s, peak 215 MB, engines 11.8 MB |",
        "3 compared, largest relative L2 1.4e-06, lowest PSNR 81.2 dB |",
        "| `compare` finds a planted slowdown of 10 % | 20 of 20 times |",
        "| `compare` passes an A/A pair | 19 of 20 times |",
        "Figures: [ours against peers](a/latency-peers.png)",
    ],
)
def test_a_line_of_the_table(table: str, line: str) -> None:
    assert line in table


def test_a_row_is_what_numpy_makes_of_the_samples(table: str) -> None:
    ours, theirs = (
        next(sample_documents.latency(SMALL).select("unet", side)) for side in ("latentrt", "openvino")
    )
    p50, p90 = (f"{1e3 * np.percentile(ours.samples, q):.2f} ms" for q in (50, 90))
    ratio = np.median([np.median(a) / np.median(b) for a, b in zip(theirs.rounds, ours.rounds, strict=True)])
    cells = next(line for line in table.splitlines() if line.startswith("| UNet step | ")).split(" | ")
    assert cells[1] == f"{p50} [{p90}]"
    assert cells[4].startswith(f"{ratio:.2f}× [")
    assert cells[5] == "0.86"  # of the best GEMM: 7.1e8 FLOP in 5 ms, over 165 GFLOP/s


def test_tables_are_whole(table: str) -> None:
    for block in table.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) <= 1, block


def test_the_newest_of_one_question_counts() -> None:
    old = replace(sample_documents.latency(SMALL), date="2026-11-01T00:00:00+00:00")
    new = sample_documents.latency(SMALL)
    said = full_tables([result(new, "a"), result(old, "b")], {"a": ["a-peers.png"], "b": ["b-peers.png"]})
    assert said.count("UNet step |") == 1
    assert "a-peers.png" in said
    assert "b-peers.png" not in said


def test_a_document_cannot_break_the_page() -> None:
    row = Row(side="latentrt", workload="unet", case=SMALL.case, status="FAILED", reason=f"a|b {END} `c`\nd")
    said = full_tables([result(replace(sample_documents.latency(SMALL), rows=(row,)))], {})
    assert "a\\|b &lt;!-- bench:end --> `c` d" in said
    assert END not in said


def test_what_is_not_known_is_a_dash() -> None:
    row = Row(side="latentrt", workload="unet", case=SMALL.case, rounds=((1.0,),))
    said = full_tables([result(replace(sample_documents.latency(SMALL), rows=(row,), machine={}))], {})
    assert "| UNet step | 1.00 s [1.00 s] | – | – | – |" in said
    assert "on unknown processor; 22 Nov 2026\n" in said
    assert "commit" not in said


def test_without_documents_the_table_says_how_to_measure() -> None:
    assert "latentrt bench latency demo" in full_tables([], {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9.996, "10.0 s"),
        (0.9996, "1.00 s"),
        (0.01234, "12.3 ms"),
        (5e-7, "500 ns"),
        (217.4, "217 s"),
        (0.0, "0 s"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert words.seconds(value) == text


def test_numbers_that_are_none_are_dashes() -> None:
    for write in (words.seconds, words.percent, words.number):
        assert write(None) == write(float("nan")) == "–"
    assert words.amount(7_160_000_000, "B") == "7.16 GB"
    assert words.amount(999_999, "B") == "1.00 MB"


def test_server_of_earlier_releases_is_not_shown(table: str) -> None:
    assert any(row.workload == "Server" for row in sample_documents.throughput(SMALL).rows)
    assert "Server" not in table


def test_the_short_table() -> None:
    documents = [make(scale) for scale in SCALES.values() for make in VERBS.values()]
    lines = short_table([result(item, str(n)) for n, item in enumerate(documents)], "all.md").splitlines()
    rows = [line for line in lines[2:] if line.startswith("|")]
    assert len(rows) == 12, "no more, however many documents there are"
    assert rows[0].startswith("| demo (SD 1.x, fp32): whole picture, 128×128, 20 steps, guidance 5 | ")
    ours = next(sample_documents.latency(SMALL).select("picture", "latentrt"))
    assert f"| {1e3 * np.percentile(ours.samples, 50):.0f} ms; diffusers takes 3.39× [" in rows[0]
    assert "openvino" not in rows[0], "its picture is not ours: it has no time"
    assert lines[-1].endswith("[All measurements, and how they were made](all.md).")


# ── files ────────────────────────────────────────────────────────────────────────────────────────

FIGURE = "box/latency-waterfall.png"
ALONE = replace(SMALL, work={}, peers={})  # one figure


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One document with one figure, and files that are none."""
    folder = tmp_path / "results"
    sample_documents.latency(ALONE).write(folder / "box" / "latency.json")
    (folder / "old.json").write_text('{"benchmark": "cold_start", "rows": []}')
    (folder / "text.json").write_text("{")
    return folder


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    """Both pages with stale tables."""
    found = Pages(
        readme=tmp_path / "README.md",
        measurements=tmp_path / "docs" / "all.md",
        figures=tmp_path / "figures",
    )
    (tmp_path / "docs").mkdir()
    for path, begin, end in (
        (found.readme, SUMMARY_BEGIN, SUMMARY_END),
        (found.measurements, BEGIN, END),
    ):
        assert path
        path.write_text(f"before\n{begin}\nstale\n{end}\nbehind\n", encoding="utf-8")
    return found


def test_a_second_time_changes_nothing(results: Path, pages: Pages) -> None:
    assert pages.readme
    assert pages.measurements
    assert outdated(results, pages)
    first = write_report(results, pages)
    assert first.figures == (pages.figures / FIGURE,)
    assert set(first.changed) == {*first.figures, pages.readme, pages.measurements}
    assert [remark.partition(" ")[0] for remark in first.remarks] == ["old.json", "text.json"]
    text = pages.measurements.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n\n**demo")
    assert text.endswith(f"\n\n{END}\nbehind\n")
    assert "stale" not in text
    assert f"(../figures/{FIGURE})" in text
    short = pages.readme.read_text(encoding="utf-8")
    assert short.startswith(f"before\n{SUMMARY_BEGIN}\n\n")
    assert short.endswith(f"\n\n{SUMMARY_END}\nbehind\n")
    assert outdated(results, pages) == ()
    assert write_report(results, pages).changed == ()


def test_what_is_outdated_is_named(results: Path, pages: Pages) -> None:
    write_report(results, pages)
    path = results / "box" / "latency.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "date": "2026-12-24T00:00:00+00:00"}), encoding="utf-8")
    assert outdated(results, pages) == (
        "all.md does not have the tables of the documents",
        f"{FIGURE} is missing, or was drawn from another document",
    )
    path.unlink()
    assert f"{FIGURE} is of no document any more: delete it" in outdated(results, pages)


def test_a_png_has_no_date_and_the_documents_digest(results: Path, tmp_path: Path) -> None:
    found = read_results(results).found[0]
    ((name, png),) = draw_figures(found)
    path = tmp_path / "figure.png"
    path.write_bytes(png)
    assert name == FIGURE
    with Image.open(path) as image:
        assert image.info["latentrt-document"] == found.digest
        assert {"Software", "Creation Time"}.isdisjoint(image.info)
        assert image.size[0] == 1350  # 9 inches at 150 dpi
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_white_space_is_not_another_document(results: Path) -> None:
    before = read_results(results).found[0].digest
    path = results / "box" / "latency.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert read_results(results).found[0].digest == before


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_markers_is_refused_before_anything_is_written(
    results: Path, pages: Pages, text: str
) -> None:
    assert pages.measurements
    pages.measurements.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=f"{BEGIN} and {END}"):
        write_report(results, pages)
    assert not pages.figures.exists()


def test_a_page_that_is_not_there_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="markers"):
        outdated(results, Pages(readme=tmp_path / "no.md", measurements=None, figures=tmp_path))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        read_results(tmp_path / "no")


@pytest.mark.parametrize("change", [{"schema": 99}, {"rows": [{}]}])
def test_a_damaged_document_is_not_left_out_in_silence(results: Path, change: dict[str, Any]) -> None:
    path = results / "box" / "latency.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, **change}), encoding="utf-8")
    with pytest.raises(PackageError, match="no benchmark document"):
        read_results(results)


def test_samples_are_documents(tmp_path: Path) -> None:
    write_samples(tmp_path)
    found = read_results(tmp_path)
    assert len(found.found) == len(VERBS) * len(SCALES)
    assert found.remarks == ()
    assert {item.document.benchmark for item in found.found} == set(VERBS)
