"""The report of the documents that are committed, and of the same with something planted in them.

That the pages are current is `tests/test_results.py`; here NumPy says what they should show.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from latentrt.benchmarks import words
from latentrt.benchmarks.intervals import ratio_by_round
from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.report import publish
from latentrt.benchmarks.report.figures import Sheet, house_style
from latentrt.benchmarks.report.publish import BEGIN, END, SUMMARY_BEGIN, SUMMARY_END, Pages
from latentrt.benchmarks.report.reading import Result, read_results
from latentrt.benchmarks.report.tables import full_tables, short_table
from latentrt.engines.errors import BackendError, PackageError, UsageError

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
RESULTS = {result.name: result for result in read_results(COMMITTED)[0]}
LATENCY = RESULTS["latency-demo"].document
FULL_SIZE = "latency-sd15-fp32-decoder"


def row_of(document: Document, workload: str, side: str = "latentrt") -> Row:
    return next(row for row in document.select(workload, side) if row.rounds or row.figures)


def changed(document: Document, workload: str, side: str, **changes: Any) -> Document:
    """The document with other facts in one of its rows."""
    chosen = row_of(document, workload, side)
    rows = (replace(row, **changes) if row is chosen else row for row in document.rows)
    return replace(document, rows=tuple(rows))


def result(document: Document, name: str = "document") -> Result:
    return Result(name=name, digest="0" * 64, document=document)


def tables(*rows: Row, of: str = "latency-demo", **facts: Any) -> str:
    document = RESULTS[of].document
    return full_tables([result(replace(document, rows=rows or document.rows, **facts))], {})


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def test_a_row_is_what_numpy_makes_of_the_samples() -> None:
    ours, theirs = (row_of(LATENCY, "unet", side) for side in ("latentrt", "diffusers"))
    p50, p90 = (words.seconds(float(np.percentile(ours.samples, q))) for q in (50, 90))
    ratio = np.median([np.median(a) / np.median(b) for a, b in zip(theirs.rounds, ours.rounds, strict=True)])
    cells = next(line for line in tables().splitlines() if line.startswith("| UNet step | ")).split(" | ")
    assert cells[1] == f"{p50} [{p90}]"
    assert cells[2].startswith(f"{ratio:.2f}× [")


def test_failures_are_told_and_have_no_time() -> None:
    reason = "image is not ours: relative L2 3.10e-01, 21.4 dB"
    document = changed(LATENCY, "picture", "openvino", status="FAILED", reason=reason, rounds=())
    assert f"- openvino, whole picture: FAILED: {reason}" in tables(*document.rows)
    assert "openvino takes" not in short_table([result(document)]).splitlines()[2]
    with house_style():
        assert "FAILED: image is not ours" in written(drawn(document, "waterfall"))


def test_the_newest_of_one_question_counts() -> None:
    old = replace(LATENCY, date="2026-11-01T00:00:00+00:00")
    links = {"a": ["a-peers.png"], "b": ["b-peers.png"]}
    text = full_tables([result(LATENCY, "a"), result(old, "b")], links)
    assert text.count("UNet step |") == 1
    assert "a-peers.png" in text
    assert "b-peers.png" not in text


def test_a_document_cannot_break_the_page() -> None:
    row = Row(side="latentrt", workload="unet", status="FAILED", reason=f"a|b {END} `c`\nd")
    assert "a\\|b &lt;!-- bench:end --> `c` d" in tables(row)
    assert END not in tables(row)


def test_numbers_have_three_digits_and_what_is_not_known_is_a_dash() -> None:
    found = [words.seconds(value) for value in (9.996, 0.01234, 5e-7, 217.4, 0.0, None)]
    assert found == ["10.0 s", "12.3 ms", "500 ns", "217 s", "0 s", "–"]
    row = Row(side="latentrt", workload="unet", case=LATENCY.rows[0].case, rounds=((1.0,),))
    assert "| UNet step | 1.00 s [1.00 s] | – | – | – |" in tables(row)
    assert "0.50 | – | – |" in tables(replace(row, figures={"of_best_gemm": 0.5, "of_floor": "nan"}))
    assert "latentrt bench latency demo" in full_tables([], {})


def test_lines_whose_answers_are_known() -> None:
    def line(name: str, workload: str, **facts: Any) -> str:
        return tables(Row(side="latentrt", workload=workload, unit="B", **facts), of=f"{name}-demo")

    fit = {"of": "steps", "workload": "picture", "points": [[5, 0.05], [10, 0.09]]}
    found = line("scaling", "fit", status="FAILED", reason="2 points", figures=fit)
    assert "| whole picture against steps | 5: 50.0 ms; 10: 90.0 ms; FAILED: 2 points |" in found
    nets = {"unet": {"weights": 5e6, "activations": None, "io": 2e6}}
    found = line("memory", "ledger", rounds=((1e7,),), figures={"nets": nets, "scratch": 3e6})
    assert "| memory of the nets | 10.0 MB; of activations the library does not tell |" in found
    marks = [{"stage": "unet", "at_s": 0.1}, {"stage": "vae_decoder", "at_s": 0.6}]
    figures = {"interval_s": 0.2, "seconds": 0.8, "marks": marks}
    found = line("memory", "timeline", rounds=((1e6, 3e6, 9e6, 4e6),), figures=figures)
    assert "| 1.00 MB at its beginning, peak 9.00 MB after 400 ms (VAE decoder) of 800 ms |" in found


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


def drawn(document: Document, kind: str) -> Sheet:
    return publish.planned_figures(result(document))[f"document-{kind}.png"]()


def texts(sheet: Sheet) -> list[Any]:
    """Everything written on a sheet; labels of ticks beyond an axis exist, and are not drawn."""
    sheet.figure.draw_without_rendering()
    axes, beyond = sheet.axes, list[Any]()
    for coordinate, axis in enumerate((axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        labels = axis.get_ticklabels()
        beyond += [label for label in labels if not low <= label.get_position()[coordinate] <= high]
    found = [text for text in sheet.figure.findobj(Text) if text not in beyond]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def written(sheet: Sheet) -> str:
    return "\n".join(text.get_text() for text in texts(sheet))


@pytest.fixture(scope="module")
def sheets() -> Iterator[dict[str, Sheet]]:
    """Every figure of a small model and of a full-size one, by file name."""
    with house_style():
        small, large = (publish.planned_figures(RESULTS[name]) for name in ("latency-demo", FULL_SIZE))
        yield {name.removesuffix(".png"): draw() for name, draw in {**small, **large}.items()}


def test_no_text_covers_another_or_leaves_the_sheet(sheets: dict[str, Sheet]) -> None:
    kinds = ("demo-waterfall", "demo-peers", "demo-roofline", "decoder-peers", "decoder-roofline")
    assert [name.split("-", 1)[1].removeprefix("sd15-fp32-") for name in sheets] == list(kinds)
    for name, sheet in sheets.items():
        found = [text for text in texts(sheet) if not text.get_rotation() % 90]
        boxes = {text.get_text(): text.get_window_extent() for text in found}
        width, height = sheet.figure.bbox.max
        for text, box in boxes.items():
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, (name, text)
        for (one, box), (other, beside) in combinations(boxes.items(), 2):
            across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            down = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            assert across <= 1 or down <= 3, (name, one, other)  # a line's box has room above its letters


def test_a_figure_says_whose_it_is(sheets: dict[str, Sheet]) -> None:
    for sheet in sheets.values():
        for fact in ("(SD 1.x, fp32)", "Intel Xeon Processor, 2 cores", "22 Nov 2026", "commit "):
            assert fact in written(sheet)
        assert sheet.axes.get_xlabel()


def test_ratios_and_their_bars_are_those_of_the_rounds(sheets: dict[str, Sheet]) -> None:
    sheet = sheets["latency-demo-peers"]
    ends = [bar.get_x() + bar.get_width() for bar in sheet.axes.patches]
    for workload in ("text_encoder", "unet", "vae_decoder", "picture"):
        ours, theirs = (row_of(LATENCY, workload, side) for side in ("latentrt", "diffusers"))
        found = ratio_by_round(theirs.rounds, ours.rounds)
        assert f"{found.value:.2f}×  [{found.low:.2f}, {found.high:.2f}]" in written(sheet)
        assert min(abs(end - found.value) for end in ends) < 1e-9


def test_the_waterfall_says_what_the_stages_took(sheets: dict[str, Sheet]) -> None:
    labels = [text.get_text() for text in sheets["latency-demo-waterfall"].axes.get_yticklabels()]
    assert labels[:3] == ["text encoder", "invariants", "20 × UNet step"]
    taken = row_of(LATENCY, "picture").figures["stages_p50_s"]["unet"]
    assert f"{words.seconds(taken)}  " in written(sheets["latency-demo-waterfall"])


def test_a_tail_that_would_squeeze_everything_is_an_arrow_with_its_number() -> None:
    turns = row_of(LATENCY, "picture", "diffusers").rounds
    wild = tuple((40 * turn[0] if number % 5 == 0 else turn[0],) for number, turn in enumerate(turns))
    with house_style():
        sheet = drawn(changed(LATENCY, "picture", "diffusers", rounds=wild), "waterfall")
        samples = [value for turn in wild for value in turn]
        assert f"p90 {words.seconds(float(np.percentile(samples, 90)))}" in written(sheet)
        assert sheet.axes.get_xlim()[1] < 1000 * max(samples) / 4


def test_the_rooflines_points_are_the_rows(sheets: dict[str, Sheet]) -> None:
    figures = row_of(RESULTS[FULL_SIZE].document, "vae_decoder").figures
    wanted = pytest.approx((figures["flops"] / figures["bytes"], figures["flop_per_s"]))
    lines = [line.get_data() for line in sheets[f"{FULL_SIZE}-roofline"].axes.lines]
    assert any((x[0], y[0]) == wanted for x, y in lines if len(x) == 1)


def test_what_a_document_lacks_is_not_drawn() -> None:
    ours = tuple(row for row in LATENCY.rows if row.side.startswith("latentrt"))
    assert list(publish.planned_figures(result(replace(LATENCY, rows=ours)))) == ["document-waterfall.png"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r"\[bench\]"), house_style():
        raise AssertionError("nothing can be drawn")


# ── files ────────────────────────────────────────────────────────────────────────────────────────

FIGURE = "box/latency-waterfall.png"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One document with one figure, and files that are none."""
    folder = tmp_path / "results"
    ours = tuple(row for row in LATENCY.rows if row.side == "latentrt")
    replace(LATENCY, rows=ours).write(folder / "box" / "latency.json")
    (folder / "old.json").write_text('{"benchmark": "cold_start", "rows": []}')
    (folder / "text.json").write_text("{")
    return folder


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    """Both pages with stale tables."""
    readme, measurements = tmp_path / "README.md", tmp_path / "docs" / "all.md"
    measurements.parent.mkdir()
    for path, begin, end in ((readme, SUMMARY_BEGIN, SUMMARY_END), (measurements, BEGIN, END)):
        path.write_text(f"before\n{begin}\nstale\n{end}\nbehind\n", encoding="utf-8")
    return Pages(readme=readme, measurements=measurements, figures=tmp_path / "figures")


def test_a_second_time_changes_nothing(results: Path, pages: Pages) -> None:
    assert publish.outdated(results, pages)
    first = publish.write_report(results, pages)
    assert first.figures == (pages.figures / FIGURE,)
    assert set(first.changed) == {*first.figures, pages.readme, pages.measurements}
    assert [remark.partition(" ")[0] for remark in first.remarks] == ["old.json", "text.json"]
    for path, begin, end in ((pages.readme, SUMMARY_BEGIN, SUMMARY_END), (pages.measurements, BEGIN, END)):
        assert path
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"before\n{begin}\n\n")
        assert text.endswith(f"\n\n{end}\nbehind\n")
        assert "stale" not in text
    assert f"(../figures/{FIGURE})" in text
    assert publish.outdated(results, pages) == ()
    assert publish.write_report(results, pages).changed == ()


def rewrite(results: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = results / "box" / "latency.json"
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def test_what_is_outdated_is_named(results: Path, pages: Pages) -> None:
    publish.write_report(results, pages)
    rewrite(results, lambda data: data)
    assert publish.outdated(results, pages) == (), "white space is not another document"
    rewrite(results, lambda data: {**data, "date": "2026-12-24T00:00:00+00:00"})
    assert publish.outdated(results, pages) == (
        "all.md does not have the tables of the documents",
        f"{FIGURE} is missing, or was drawn from another document",
    )
    shutil.rmtree(results / "box")
    assert f"{FIGURE} is of no document any more: delete it" in publish.outdated(results, pages)


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", None])
def test_without_markers_nothing_is_written(results: Path, pages: Pages, text: str | None) -> None:
    assert pages.measurements
    pages.measurements.unlink()
    if text is not None:
        pages.measurements.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=f"{BEGIN} and {END}"):
        publish.write_report(results, pages)
    assert not pages.figures.exists()


def test_what_cannot_be_read_is_not_left_out_in_silence(results: Path) -> None:
    rewrite(results, lambda data: {**data, "rows": [{}]})
    with pytest.raises(PackageError, match="no benchmark document"):
        read_results(results)
    with pytest.raises(UsageError, match="is no folder"):
        read_results(results / "no")
