"""The report: every number in it is one of a document's, and whoever reads a figure can read all of it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.text
import numpy as np
import pytest
from PIL import Image

from latentrt.benchmarks.intervals import ratio_by_round
from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.report import BEGIN, END, outdated, report_is_current, write_report, words
from latentrt.benchmarks.report.figures import draw_figures, planned_figures
from latentrt.benchmarks.report.memory import first_of_each, ledger
from latentrt.benchmarks.report.reading import against, stages
from latentrt.benchmarks.report.results import Result, read_results
from latentrt.benchmarks.report.roofline import ceiling_rates, points
from latentrt.benchmarks.report.sheet import Sheet, house_style
from latentrt.benchmarks.report.summary import summaries
from latentrt.benchmarks.report.sweeps import line_of, sweeps
from latentrt.benchmarks.report.tables import markdown
from latentrt.engines.errors import PackageError, UsageError
from tests.benchmarks import sample_documents
from tests.benchmarks.sample_documents import FULL, SCALES, SMALL, VERBS, Scale, of_memory, write_samples

KINDS = ("waterfall", "peers", "roofline", "scaling", "ledger", "timeline")


def result(document: Document, name: str = "document") -> Result:
    return Result(name=name, digest="0" * 64, document=document)


def texts(sheet: Sheet) -> list[Any]:
    """Everything written on a sheet, that is to be seen."""
    sheet.settle()
    found = sheet.figure.findobj(matplotlib.text.Text)
    return [text for text in found if text.get_visible() and text.get_text().strip() and shown(text)]


def shown(text: Any) -> bool:
    """Ticks outside of their axis exist, but are not drawn."""
    axes = text.axes
    if axes is None or text not in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        return True
    axis = axes.xaxis if text in axes.get_xticklabels() else axes.yaxis
    place = text.get_position()[0 if axis is axes.xaxis else 1]
    low, high = sorted(axis.get_view_interval())
    return low <= place <= high


def written(sheet: Sheet) -> str:
    return "\n".join(text.get_text() for text in texts(sheet))


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sheets() -> Iterator[dict[str, Sheet]]:
    """Every figure of every sample, by `scale-kind`."""
    found: dict[str, Sheet] = {}
    with house_style():
        for scale_name, scale in SCALES.items():
            for make in VERBS.values():
                for name, drawn in planned_figures(result(make(scale), scale_name)).items():
                    found[name.removesuffix(".png")] = drawn()
        yield found


def test_every_figure_of_the_issue_is_there(sheets: dict[str, Sheet]) -> None:
    assert set(sheets) == {f"{scale}-{kind}" for scale in SCALES for kind in KINDS}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_covers_another_or_leaves_the_sheet(sheets: dict[str, Sheet], scale: str, kind: str) -> None:
    sheet = sheets[f"{scale}-{kind}"]
    boxes = {text.get_text(): sheet.extent(text) for text in texts(sheet) if not text.get_rotation() % 90}
    assert len(boxes) > 8
    width, height = sheet.figure.bbox.max
    for text, box in boxes.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for (one, box), (other, beside) in combinations(boxes.items(), 2):
        across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        down = min(box.y1, beside.y1) - max(box.y0, beside.y0)
        assert across <= 1 or down <= 3, f"{one!r} and {other!r}"  # a line's box has room above its letters


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_says_whose_it_is(sheets: dict[str, Sheet], kind: str) -> None:
    said = written(sheets[f"full-{kind}"])
    for fact in ("sd15 (SD 1.x, fp32)", "Made-up Processor, 2 cores", "22 Nov 2026", "commit 0123abc"):
        assert fact in said
    assert any(axes.get_xlabel() for axes in sheets[f"full-{kind}"].axes)


def test_the_waterfall_says_what_the_stages_took(sheets: dict[str, Sheet]) -> None:
    said = written(sheets["full-waterfall"])
    assert "20 × UNet step" in said
    assert "198 s  90." in said  # 20 steps of 9.9 s
    assert "8.00 ms  <0.1 %" in said
    assert "FAILED: image is not ours" in said
    assert "not available: torch.compile needs a C++ compiler" in said


def test_a_ratio_of_the_figure_is_that_of_the_rounds(sheets: dict[str, Sheet]) -> None:
    document = sample_documents.latency(SMALL)
    ours, theirs = (next(document.select("unet", side)) for side in ("latentrt", "diffusers"))
    found = ratio_by_round(theirs.rounds, ours.rounds)
    assert f"{found.value:.2f}×  [{found.low:.2f}, {found.high:.2f}]" in written(sheets["small-peers"])


def test_bars_begin_at_one_and_end_at_the_ratio(sheets: dict[str, Sheet]) -> None:
    ends = [bar.get_x() + bar.get_width() for bar in sheets["small-peers"].axes[0].patches]
    document = sample_documents.latency(SMALL)
    wanted = [item.ratio.value for item in against(document, SMALL.case, "diffusers") if item.ratio]
    assert len(wanted) == 4
    for value in wanted:
        assert min(abs(end - value) for end in ends) < 1e-9


def test_a_tail_that_would_squeeze_everything_is_an_arrow_with_its_number() -> None:
    document = sample_documents.latency(SMALL)
    wild = [
        replace(row, rounds=tuple((*turn[:-1], 40 * turn[0]) for turn in row.rounds))
        if (row.side, row.workload) == ("diffusers", "picture")
        else row
        for row in document.rows
    ]
    with house_style():
        sheet = planned_figures(result(replace(document, rows=tuple(wild))))["document-waterfall.png"]()
        assert "p90 17." in written(sheet)  # seconds: forty times 0.44
        assert sheet.axes[0].get_xlim()[1] < 1000  # ms


def test_the_rooflines_points_are_the_rows() -> None:
    document = sample_documents.latency(FULL)
    unet = next(point for point in points(document, FULL.case) if point.workload == "unet")
    flops, moved = FULL.work["unet"]
    assert unet.intensity == pytest.approx(flops / moved)
    assert unet.flop_per_s == pytest.approx(flops / FULL.seconds["unet"])
    assert ceiling_rates(document, "copy") == [pytest.approx(FULL.copy, rel=0.03)]
    assert len(ceiling_rates(document, "gemm")) == 6


def test_a_ceiling_may_be_in_its_own_unit() -> None:
    row = Row(side="ceiling", workload="gemm", unit="FLOP/s", rounds=((2e11,),))
    assert ceiling_rates(replace(sample_documents.latency(FULL), rows=(row,)), "gemm") == [2e11]


def test_without_ceilings_there_is_no_roofline_and_without_peers_no_bars() -> None:
    document = sample_documents.latency(SMALL)
    ours = tuple(row for row in document.rows if row.side.startswith("latentrt"))
    assert list(planned_figures(result(replace(document, rows=ours)))) == ["document-waterfall.png"]


def test_a_picture_nobody_timed_is_added_up_and_says_so() -> None:
    document = sample_documents.latency(FULL)
    rows = tuple(row for row in document.rows if row.workload != "picture")
    found = stages(replace(document, rows=rows), FULL.case)
    unet = next(document.select("unet", "latentrt"))
    assert found is not None
    assert found.total is None
    assert found.seconds["unet"] == 20 * np.median(unet.samples)
    with house_style():
        drawn = planned_figures(result(replace(document, rows=rows)))["document-waterfall.png"]
        assert "no whole picture was timed" in written(drawn())
    assert stages(replace(document, rows=rows[:4]), FULL.case) is None


def test_sweeps_are_the_rows_at_their_points() -> None:
    document = sample_documents.scaling(SMALL)
    batch = next(sweep for sweep in sweeps(document) if sweep.of == "batch")
    assert [point[0] for point in batch.points] == [1, 2, 4, 8]
    row = next(
        row for row in document.rows if row.figures.get("axis") == "batch" and row.case["pictures"] == 4
    )
    p50, p90, p99 = np.percentile(row.samples, (50, 90, 99))
    assert batch.points[2] == (4, pytest.approx(p50), pytest.approx(p90), pytest.approx(p99))


def test_a_fit_that_failed_is_no_line() -> None:
    document = sample_documents.scaling(SMALL)
    rows = tuple(replace(row, status="FAILED") if row.workload == "fit" else row for row in document.rows)
    failed = replace(document, rows=rows)
    assert {line_of(sweep) for sweep in sweeps(failed)} == {""}
    assert list(summaries(failed)) == []
    with house_style():
        assert "per step" not in written(planned_figures(result(failed))["document-scaling.png"]())


def test_the_ledger_adds_up_and_does_not_hide_what_is_not_told() -> None:
    row = of_memory(SMALL, "ledger", nets={"unet": {"weights": 5, "activations": None, "io": 2}}, scratch=3)
    unet, shared = ledger(row)
    assert (unet.total, unet.activations, shared.total) == (7, None, 3)
    document = sample_documents.memory(SMALL)
    assert "of activations the library does not tell" in dict(summaries(document))["memory of the nets"]


def test_a_mark_is_where_a_stage_begins_first() -> None:
    assert first_of_each([(0.0, "a"), (1.0, "b"), (2.0, "a")]) == ((0.0, "a"), (1.0, "b"))


def test_a_timeline_on_a_device_is_a_figure_of_its_own() -> None:
    document = sample_documents.memory(SMALL)
    line = next(document.select("timeline"))
    device = replace(line, figures={**line.figures, "device": [1e9, 2e9, 2e9]})
    rows = tuple(device if row is line else row for row in document.rows)
    with house_style():
        drawn = planned_figures(result(replace(document, rows=rows)))["document-timeline-device.png"]
        assert "peak 2.00 GB" in written(drawn())


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def table() -> str:
    return markdown(
        [result(make(SMALL), verb) for verb, make in VERBS.items()], {"latency": ["a/latency-peers.png"]}
    )


@pytest.mark.parametrize(
    "line",
    [
        "| invariants | 4.04 ms [4.11 ms] | – | – | – | 0.061 | 0.061 | 0.1 % |",
        "- openvino, whole picture: FAILED: image is not ours: relative L2 3.10e-01, 21.4 dB",
        "| time outside the engines, 128×128, 20 steps, guidance 5 | 0.4 % of a picture, 60.0 µs per step |",
        "| whole picture against steps | 5.10 ms per step + 21.0 ms, largest residual 2.1 % |",
        "| throughput, Server highest rate | not available: a run of Server takes about 900 s |",
        "| allocations that steps leave behind | 0 B over 97 steps |",
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


def test_tables_are_whole(table: str) -> None:
    for block in table.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) <= 1, block


def test_the_newest_of_one_question_counts() -> None:
    old = replace(sample_documents.latency(SMALL), date="2026-11-01T00:00:00+00:00")
    new = sample_documents.latency(SMALL)
    said = markdown([result(new, "a"), result(old, "b")], {"a": ["a-peers.png"], "b": ["b-peers.png"]})
    assert said.count("UNet step |") == 1
    assert "a-peers.png" in said
    assert "b-peers.png" not in said


def test_a_document_cannot_break_the_page() -> None:
    row = Row(side="latentrt", workload="unet", case=SMALL.case, status="FAILED", reason=f"a|b {END} `c`\nd")
    said = markdown([result(replace(sample_documents.latency(SMALL), rows=(row,)))], {})
    assert "a\\|b &lt;!-- bench:end --> `c` d" in said
    assert END not in said


def test_what_is_not_known_is_a_dash() -> None:
    row = Row(side="latentrt", workload="unet", case=SMALL.case, rounds=((1.0,),))
    said = markdown([result(replace(sample_documents.latency(SMALL), rows=(row,), machine={}))], {})
    assert "| UNet step | 1.00 s [1.00 s] | – | – | – |" in said
    assert "on unknown processor; 22 Nov 2026; commit –" in said


def test_without_documents_the_table_says_how_to_measure() -> None:
    assert "latentrt bench latency demo" in markdown([], {})


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


# ── files ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One document with a figure that is quick to draw, and files that are none."""
    folder = tmp_path / "results"
    of_one_net = replace(SMALL, weights={"unet": 1e6})
    sample_documents.memory(of_one_net).write(folder / "box" / "memory.json")
    (folder / "old.json").write_text('{"benchmark": "cold_start", "rows": []}')
    (folder / "text.json").write_text("{")
    return folder


def page(folder: Path) -> Path:
    path = folder / "README.md"
    path.write_text(f"before\n{BEGIN}\nstale\n{END}\nbehind\n", encoding="utf-8")
    return path


def test_a_second_time_changes_nothing(results: Path, tmp_path: Path) -> None:
    readme, figures = page(tmp_path), tmp_path / "figures"
    assert not report_is_current(results, readme, figures)
    first = write_report(results, readme, figures)
    assert {path.relative_to(figures).as_posix() for path in first.figures} == {
        "box/memory-ledger.png",
        "box/memory-timeline.png",
    }
    assert set(first.changed) == {*first.figures, readme}
    assert [remark.partition(" ")[0] for remark in first.remarks] == ["old.json", "text.json"]
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n\n**demo")
    assert text.endswith(f"\n\n{END}\nbehind\n")
    assert "stale" not in text
    assert "(figures/box/memory-ledger.png)" in text
    assert report_is_current(results, readme, figures)
    assert write_report(results, readme, figures).changed == ()


def test_what_is_outdated_is_named(results: Path, tmp_path: Path) -> None:
    readme, figures = page(tmp_path), tmp_path / "figures"
    write_report(results, readme, figures)
    path = results / "box" / "memory.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "date": "2026-12-24T00:00:00+00:00"}), encoding="utf-8")
    assert outdated(results, readme, figures) == (
        "README.md does not have the tables of the documents",
        "box/memory-ledger.png is missing, or was drawn from another document",
        "box/memory-timeline.png is missing, or was drawn from another document",
    )
    path.unlink()
    assert "box/memory-ledger.png is of no document any more: delete it" in outdated(results, None, figures)


def test_a_png_has_no_date_and_the_documents_digest(results: Path, tmp_path: Path) -> None:
    found = read_results(results).found[0]
    name, png = next(draw_figures(found))
    path = tmp_path / "figure.png"
    path.write_bytes(png)
    assert name == "box/memory-ledger.png"
    with Image.open(path) as image:
        assert image.info["latentrt-document"] == found.digest
        assert {"Software", "Creation Time"}.isdisjoint(image.info)
        assert image.size[0] == 1350  # 9 inches at 150 dpi
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_white_space_is_not_another_document(results: Path) -> None:
    before = read_results(results).found[0].digest
    path = results / "box" / "memory.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert read_results(results).found[0].digest == before


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_markers_is_refused_before_anything_is_written(
    results: Path, tmp_path: Path, text: str
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=f"{BEGIN} and {END}"):
        write_report(results, readme, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_page_that_is_not_there_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="markers"):
        outdated(results, tmp_path / "no.md", tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        read_results(tmp_path / "no")


@pytest.mark.parametrize("change", [{"schema": 99}, {"rows": [{}]}])
def test_a_damaged_document_is_not_left_out_in_silence(results: Path, change: dict[str, Any]) -> None:
    path = results / "box" / "memory.json"
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


def test_a_scale_of_one_stage_still_draws() -> None:
    lean: Scale = replace(SMALL, seconds={"unet": 5e-3, "vae_decoder": 0.02}, work={})
    with house_style():
        drawn = planned_figures(result(sample_documents.latency(replace(lean, peers={}))))
        assert list(drawn) == ["document-waterfall.png"]
        assert "VAE decoder" in written(drawn["document-waterfall.png"]())
