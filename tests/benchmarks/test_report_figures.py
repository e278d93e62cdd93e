"""The figures: what is drawn is what the rows say, and all of it can be read."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from matplotlib.legend import Legend

from latentrt.benchmarks.intervals import ratio_by_round
from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.report.figures import Sheet, house_style, points
from latentrt.benchmarks.report.publish import planned_figures
from latentrt.benchmarks.report.reading import Result, against, ceiling_rates, stages
from latentrt.benchmarks.report.tables import summaries
from latentrt.engines.errors import BackendError
from tests.benchmarks import sample_documents
from tests.benchmarks.sample_documents import FULL, SCALES, SMALL, VERBS, Scale, of_memory

KINDS = ("waterfall", "peers", "roofline")


def result(document: Document, name: str = "document") -> Result:
    return Result(name=name, digest="0" * 64, document=document)


def texts(sheet: Sheet) -> list[Any]:
    """Everything written on a sheet."""
    sheet.figure.get_layout_engine().execute(sheet.figure)
    found = [*sheet.figure.texts]
    legends = sheet.figure.findobj(Legend)
    if legends:
        sheet.figure.draw_without_rendering()  # a legend has no place before
    found += [text for legend in legends for text in legend.get_texts()]
    axes = sheet.axes
    labels = [axes.title, axes.xaxis.label, axes.yaxis.label]
    found += [*axes.texts, *labels, *ticks(axes.xaxis, 0), *ticks(axes.yaxis, 1)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def extent(sheet: Sheet, text: Any) -> Any:
    """A text's box in pixels."""
    return text.get_window_extent(sheet.figure.canvas.get_renderer())


def ticks(axis: Any, coordinate: int) -> list[Any]:
    """The labels of those on the axis; others exist, and are not drawn."""
    low, high = sorted(axis.get_view_interval())
    return [text for text in axis.get_ticklabels() if low <= text.get_position()[coordinate] <= high]


def written(sheet: Sheet) -> str:
    return "\n".join(text.get_text() for text in texts(sheet))


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
    boxes = {text.get_text(): extent(sheet, text) for text in texts(sheet) if not text.get_rotation() % 90}
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
    assert sheets[f"full-{kind}"].axes.get_xlabel()


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
    ends = [bar.get_x() + bar.get_width() for bar in sheets["small-peers"].axes.patches]
    document = sample_documents.latency(SMALL)
    wanted = [item.ratio.value for item in against(document, SMALL.case, "diffusers").values() if item.ratio]
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
        assert sheet.axes.get_xlim()[1] < 2000  # ms


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


def test_stages_are_in_order_and_finite() -> None:
    known = {"else": 1.0, "vae_decoder": 2.0, "text_encoder": 3.0, "unet": float("nan")}
    row = Row(side="latentrt", workload="picture", figures={"stages_p50_s": known})
    assert list(stages(row).items()) == [("text_encoder", 3.0), ("vae_decoder", 2.0), ("else", 1.0)]
    assert stages(None) == {}


def test_a_fit_that_failed_is_no_line() -> None:
    row = Row(
        side="latentrt",
        workload="fit",
        status="FAILED",
        reason="2 points",
        figures={"of": "steps", "workload": "picture", "points": [[5, 0.05], [10, 0.09]]},
    )
    lines = dict(summaries(replace(sample_documents.scaling(SMALL), rows=(row,))))
    assert lines == {"whole picture against steps": "5: 50.0 ms; 10: 90.0 ms; FAILED: 2 points"}


def test_the_ledger_adds_up_and_does_not_hide_what_is_not_told() -> None:
    nets = {"unet": {"weights": 5e6, "activations": None, "io": 2e6}}
    row = of_memory(SMALL, "ledger", ((7e6,),), nets=nets, scratch=3e6)
    lines = dict(summaries(replace(sample_documents.memory(SMALL), rows=(row,))))
    assert lines["memory of the nets"] == "10.0 MB; of activations the library does not tell"
    assert lines["memory by net"] == "UNet step: weights 5.00 MB, in and out 2.00 MB"


def test_a_timeline_says_where_its_peak_is() -> None:
    marks = [{"stage": "unet", "at_s": 0.1}, {"stage": "vae_decoder", "at_s": 0.6}]
    row = of_memory(SMALL, "timeline", ((1e6, 3e6, 9e6, 4e6),), interval_s=0.2, seconds=0.8, marks=marks)
    lines = dict(summaries(replace(sample_documents.memory(SMALL), rows=(row,))))
    assert lines == {
        "memory over the first request of a process": "1.00 MB at its beginning, peak 9.00 MB after 400 ms"
        " (VAE decoder) of 800 ms"
    }


def test_a_scale_of_one_stage_still_draws() -> None:
    lean: Scale = replace(SMALL, seconds={"unet": 5e-3, "vae_decoder": 0.02}, work={})
    with house_style():
        drawn = planned_figures(result(sample_documents.latency(replace(lean, peers={}))))
        assert list(drawn) == ["document-waterfall.png"]
        assert "VAE decoder" in written(drawn["document-waterfall.png"]())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r"latentrt\[bench\]"), house_style():
        raise AssertionError("nothing can be drawn")
