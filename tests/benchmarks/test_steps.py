"""`latentrt bench steps`: its rows, its command, and what the report makes of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import Pipeline
from latentrt.benchmarks.records import Document, read_document
from latentrt.benchmarks.report.figures import house_style
from latentrt.benchmarks.report.publish import planned_figures
from latentrt.benchmarks.report.reading import Result
from latentrt.benchmarks.report.tables import full_tables
from latentrt.benchmarks.sides.contract import Task
from latentrt.benchmarks.verbs import steps
from latentrt.benchmarks.verbs.steps import VARIANTS, Inputs, distances, draw, measure_steps, steps_within
from latentrt.demo.shapes import held_out_scenes
from latentrt.engines.errors import UsageError

SHORT = {"sampler": "dpmpp_2m", "num_inference_steps": 12}
CALLS = (3, 6)
CHOSEN = ("dpmpp_2m", "heun", "dpmpp_2m guided to 0.6")


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(backend="onnxruntime", device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def document(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Document:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "REFERENCE", SHORT)
        task = Task(model=pipe.package.root, backend="onnxruntime")
        found = measure_steps(pipe, task, Inputs(prompts=2, calls=CALLS, variants=CHOSEN))
    path = tmp_path_factory.mktemp("steps") / "steps.json"
    found.write(path)
    return read_document(path)


def test_a_row_for_each_variant_and_number_of_calls(document: Document) -> None:
    found = [(row.workload, row.figures["calls"], row.figures["unet_rows"]) for row in document.rows]
    assert found == [
        ("reference", 12, 24),
        *(("dpmpp_2m", calls, 2 * calls) for calls in CALLS),
        ("heun", 3, 6),
        ("heun", 5, 10),  # an odd number, as each step but the last has two
        ("dpmpp_2m guided to 0.6", 3, 4),
        ("dpmpp_2m guided to 0.6", 6, 9),
    ]
    assert all(row.case == document.rows[0].case for row in document.rows)


def test_more_calls_are_nearer(document: Document) -> None:
    near = {row.figures["calls"]: row for row in document.select("dpmpp_2m")}
    assert near[6].summary["p50"] < near[3].summary["p50"]
    assert near[6].figures["psnr_db"] > near[3].figures["psnr_db"]
    (reference,) = document.select("reference")
    assert reference.samples == (0.0, 0.0)
    assert reference.figures["psnr_db"] is None, "equal pictures have no finite one"


def test_pictures_are_those_of_the_pipeline(pipe: Pipeline) -> None:
    scenes = held_out_scenes()[:12]  # more than a batch
    found = draw(pipe, scenes, {"sampler": "euler", "num_inference_steps": 2})
    alone = pipe(scenes[11].prompt(), seed=11, sampler="euler", num_inference_steps=2, output_type="np")
    assert np.abs(found.pictures[11].astype(int) - alone.images[0]).max() <= 1
    assert found.latents.shape[0] == 12


def test_distance_is_the_relative_norm() -> None:
    one, other = np.full((1, 2, 2, 2), 3.0), np.full((1, 2, 2, 2), 4.0)
    assert list(distances(one, other)) == [0.25]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_most_steps_that_calls_allow(pipe: Pipeline, variant: str) -> None:
    for calls in (4, 7):
        count = steps_within(pipe, variant, calls)
        drawn: Any = {"prompt": "", "seed": 0, **VARIANTS[variant]}
        used, more = (
            len(pipe.request_of({**drawn, "num_inference_steps": number}).schedule())
            for number in (count, count + 1)
        )
        assert used <= calls < more


def test_too_many_prompts() -> None:
    with pytest.raises(UsageError, match="211 prompts; expected 1 to 210"):
        Inputs(prompts=211)


def test_the_report_has_tables_and_figures(document: Document) -> None:
    result = Result(name="steps", digest="0" * 64, document=document)
    best = max(document.select("dpmpp_2m guided to 0.6"), key=lambda row: row.figures["calls"])
    text = full_tables([result], {})
    assert "pictures that are right after 6 calls" in text
    nearest = min(row.summary["p50"] for row in document.rows if row.figures["calls"] == 6)
    assert f"relative L2 {nearest:.3f}" in text
    planned = planned_figures(result)
    assert list(planned) == ["steps-accuracy.png", "steps-distance.png"]
    with house_style():
        sheet = planned["steps-distance.png"]()
        lines = {line.get_label(): line.get_xydata() for line in sheet.axes.get_lines()}
        assert set(lines) == set(CHOSEN)
        assert lines[best.workload][-1].tolist() == [6, best.summary["p50"]]
        assert sheet.png("0").startswith(b"\x89PNG")
        accuracy = planned["steps-accuracy.png"]()
        assert {line.get_label() for line in accuracy.axes.get_lines()} == {*CHOSEN, "12 calls"}


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentrt.cli.bench import bench

    monkeypatch.setattr(steps, "REFERENCE", SHORT)
    out = tmp_path / "steps.json"
    words = ["steps", "--prompts", "1", "--calls", "3", "--samplers", "unipc", "--out", str(out), "--json"]
    with pytest.raises(SystemExit) as ended:
        bench(words)
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["settings"]["prompts"] == 1
    assert [row.workload for row in read_document(out).rows] == ["reference", "unipc"]
