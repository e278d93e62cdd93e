"""Tables in files: printed and read back to the bit, drawn with to the byte, and every fault refused."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import Pipeline, redraw
from latentrt.engines.errors import SamplerError, UsageError
from latentrt.runtime.request.request import make_request
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import SAMPLERS, make_table
from latentrt.runtime.sampling.table import COLUMNS, Table
from latentrt.runtime.sampling.table_file import parse_table, read_table, table_sha256
from tests.runtime.diffusers_oracle import SD

FAST: dict[str, Any] = {"seed": 3, "height": 64, "width": 64, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(backend="onnxruntime", device="cpu") as opened:
        yield opened


def printed(table: Table) -> dict[str, Any]:
    return json.loads(json.dumps(table.to_json()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_printed_table_is_read_back_to_the_bit(name: str, tmp_path: Path) -> None:
    for table in (make_table(resolve(name, SD), 7), make_table(resolve(name, SD), 7).head(3)):
        (tmp_path / "table.json").write_text(json.dumps(table.to_json()))
        again = read_table(tmp_path / "table.json")
        for column in COLUMNS:
            ours, theirs = getattr(again, column), getattr(table, column)
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
        for name_of in ("name", "prediction_type", "init", "last_alpha_bar"):
            assert getattr(again, name_of) == getattr(table, name_of)
        assert table_sha256(again) == table_sha256(table)


@pytest.mark.parametrize("name", ["euler_a", "dpmpp_2m", "heun", "plms"])
def test_a_picture_of_a_table_is_that_of_its_sampler(pipe: Pipeline, name: str, tmp_path: Path) -> None:
    request = pipe.request_of({"prompt": "a star", "sampler": name, "num_inference_steps": 5, "seed": 1})
    (tmp_path / "own.json").write_text(json.dumps(request.schedule().to_json()))
    wanted = pipe("a star", sampler=name, num_inference_steps=5, **FAST)
    found = pipe("a star", table=tmp_path / "own.json", **FAST)
    np.testing.assert_array_equal(found.images, wanted.images)
    record = found.record()
    assert record["sampler"] == name
    assert record["table"] == {"name": "own.json", "sha256": table_sha256(request.schedule())}


def test_a_picture_says_which_table_and_a_redraw_finds_it(pipe: Pipeline, tmp_path: Path) -> None:
    values = printed(make_table(resolve("dpmpp_2m", pipe.package.manifest.scheduler), 4))
    (tmp_path / "own.json").write_text(json.dumps(values | {"name": "mine"}))
    drawn = pipe("a star", table=tmp_path / "own.json", **{**FAST, "output_type": "pil"})
    drawn.save(tmp_path / "picture.png")
    (tmp_path / "own.json").rename(tmp_path / "renamed.json")
    again = redraw(pipe, tmp_path / "picture.png")
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(drawn.images[0]))
    assert again.record() == drawn.record()
    with pytest.raises(UsageError, match="table is not what the picture started from"):
        redraw(pipe, tmp_path / "picture.png", table=make_table(resolve("ddim", SD), 4))
    (tmp_path / "renamed.json").unlink()
    with pytest.raises(UsageError, match="the table that the picture started from is missing"):
        redraw(pipe, tmp_path / "picture.png")


def test_a_picture_to_start_from_gets_the_noise_of_the_first_row(pipe: Pipeline) -> None:
    """A table begins where it says; `strength` of the sampler's own run is the same table, cut."""
    start: dict[str, Any] = {**FAST, "image": np.full((64, 64, 3), 90, np.uint8)}
    values: dict[str, Any] = {"prompt": "a star", "sampler": "euler", "num_inference_steps": 6}
    cut = pipe.request_of({**start, **values, "strength": 0.5}).schedule()
    wanted = pipe(**values, strength=0.5, **start)
    found = pipe("a star", table=cut, **start)
    np.testing.assert_array_equal(found.images, wanted.images)
    assert "strength" not in found.record()


def test_scales_are_one_for_each_row(pipe: Pipeline) -> None:
    table = make_table(resolve("heun", pipe.package.manifest.scheduler), 2)
    request = pipe.request_of({"prompt": "", "table": table, "guidance_scale": [5.0, 4.0, 3.0]})
    np.testing.assert_array_equal(request.guidance_scales(), [5, 4, 3])
    assert request.num_inference_steps == 3


GOOD = printed(make_table(resolve("dpmpp_2m", SD), 3))
Change = Callable[[dict[str, Any]], Any]


def put(name: str, value: Any) -> Change:
    return lambda values: values | {name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: [values], "holds a list; expected an object"),
        (lambda values: {name: values[name] for name in values if name != "alpha_bar"}, "has no alpha_bar"),
        (put("sigma", []), "has 'sigma'"),
        (put("name", 3), "has name 3"),
        (put("name", ""), "has name ''"),
        (put("prediction_type", "flow"), "prediction_type 'flow'"),
        (put("prediction_type", None), "has prediction_type None"),
        (put("t", "999"), "has 0 rows of t"),
        (put("t", []), "has 0 rows of t"),
        (put("t", [1.0] * 1001), "has 1001 rows of t"),
        (put("t", [999, 500]), "has shape"),
        (put("p", [1.0, None, 1.0]), "has None in p"),
        (put("p", [1.0, True, 1.0]), "has True in p"),
        (put("q", [1.0, "2", 1.0]), "has '2' in q"),
        (put("a", [1.0, float("nan"), 1.0]), "column a holds NaN"),
        (put("a", [1.0, 10**400, 1.0]), "in a that is too large"),
        (put("b", [1.0, 2.0, 3.0]), "rows of several lengths in b"),
        (put("b", [[1.0], [1.0, 2.0], [3.0]]), "rows of several lengths in b"),
        (put("b", [[]] * 3), "a history of 0"),
        (put("b", [[1.0] * 6] * 3), "a history of 6"),
        (put("c", [0.0, 0.5, 0.0]), "noise in a row that draws none"),
        (put("draws", [0, 1, 0]), "has 0 in draws"),
        (put("alpha_bar", [0.1, 0.5, 1.5]), "has alpha_bar outside 0 to 1"),
        (put("last_alpha_bar", -1.0), "has last_alpha_bar outside 0 to 1"),
        (put("init", 0.0), "an initial scale of 0"),
        (put("init", [1.0]), r"has \[1.0\] in init"),
    ],
)
def test_every_fault_is_named(change: Change, message: str) -> None:
    parse_table(GOOD, "good.json")
    with pytest.raises(SamplerError, match=message) as caught:
        parse_table(change(dict(GOOD)), "own.json")
    assert "the table 'own.json'" in str(caught.value)


def test_files_that_are_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.json"
    for content, message in (
        (b"{", "holds no JSON"),
        (b"\xff\xfe", "holds no JSON"),
        (b"[" * 9999, "no JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(SamplerError, match=message):
            read_table(path)
    with pytest.raises(SamplerError, match="cannot be read: No such file"):
        read_table(tmp_path / "none.json")
    with pytest.raises(SamplerError, match="table is 3"):
        read_table(3)
    monkeypatch.setattr("latentrt.runtime.sampling.table_file._MOST_BYTES", 5)
    path.write_text(json.dumps(GOOD))
    with pytest.raises(SamplerError, match="expected at most 5"):
        read_table(path)


def test_a_table_of_another_model(pipe: Pipeline) -> None:
    manifest = pipe.package.manifest
    with pytest.raises(SamplerError, match="is for models that predict 'v_prediction'; expected 'epsilon'"):
        make_request(manifest, "", table=parse_table(GOOD | {"prediction_type": "v_prediction"}, "a"))
    with pytest.raises(SamplerError, match="timesteps from 0 to 5000; expected 0 to 999"):
        make_request(manifest, "", table=parse_table(GOOD | {"t": [5000, 500, 0]}, "a"))
    scheduler = {**SD, "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}
    told = {**scheduler, "timestep_type": "continuous"}
    euler = replace(manifest.defaults, sampler="euler")
    table = make_table(resolve("euler", told), 3)
    assert table.t.min() < 0
    assert (
        make_request(replace(manifest, scheduler=told, defaults=euler), "", table=table).schedule() is table
    )


@pytest.mark.parametrize(
    "other", [{"sampler": "euler"}, {"num_inference_steps": 3}, {"timesteps": [900, 1]}, {"eta": 0.5}]
)
def test_a_table_is_all_that_is_said_of_steps(pipe: Pipeline, other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="table with "):
        pipe.request_of({"prompt": "", "table": parse_table(GOOD, "a"), **other})
