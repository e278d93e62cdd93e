"""Pictures in two passes: the latent between them as torch enlarges it, and drawn again from their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentrt.engines.errors import UsageError
from latentrt.runtime.loop.sharing import Ended, SharedSteps
from latentrt.runtime.pictures.write import read_metadata
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.redraw import redraw
from latentrt.runtime.second_pass import check_second, draw_larger, enlarge_latent

FIRST: dict[str, Any] = {
    "prompt": "a red circle on a blue background",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "seed": 5,
    "sampler": "euler_a",
}
SECOND: dict[str, Any] = {"height": 96, "width": 80, "strength": 0.6, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open("demo", threads=1) as opened:
        yield opened


def drawn(pipe: Pipeline) -> Any:
    shared: SharedSteps[Any, Any] = SharedSteps()
    shared.add("one", draw_larger(pipe, FIRST, SECOND))
    steps = 0
    while True:
        for event in shared.turn():
            if isinstance(event, Ended):
                assert steps == len(pipe.request_of(FIRST).schedule()) + len(
                    check_second(pipe, FIRST, SECOND).schedule()
                )
                return event.value
            steps += 1


@pytest.mark.parametrize("size", [(12, 12), (16, 24), (13, 9), (8, 8), (6, 11), (1, 1)])
def test_latents_are_enlarged_as_torch_does(size: tuple[int, int]) -> None:
    latent = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(latent), size=size, mode="bilinear")
    found = enlarge_latent(latent, *size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_file_alone_draws_the_same(pipe: Pipeline, tmp_path: Path, suffix: str) -> None:
    one = drawn(pipe)
    assert np.asarray(one.images[0]).shape == (96, 80, 3)
    assert one.record()["began_as"] == {"width": 64, "height": 64, "num_inference_steps": 3}
    one.save(tmp_path / f"picture{suffix}")
    again = redraw(pipe, tmp_path / f"picture{suffix}")
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(one.images[0]))
    assert again.record() == one.record()
    assert again.infotext() == one.infotext()
    other = redraw(pipe, tmp_path / f"picture{suffix}", seed=6)
    assert not np.array_equal(np.asarray(other.images[0]), np.asarray(one.images[0]))


@pytest.mark.parametrize("began", [7, [], {"width": 64}, {"width": 1, "height": 1, "steps": 1}])
def test_a_record_that_nobody_wrote(pipe: Pipeline, began: Any) -> None:
    record = {**drawn(pipe).record(), "began_as": began}
    with pytest.raises(UsageError, match="the record's began_as is"):
        redraw(pipe, record)


def test_what_is_wrong_is_refused_before_it_is_drawn(pipe: Pipeline) -> None:
    for changes in ({"height": 97}, {"strength": 2.0}, {"sampler": "fast"}, {"num_inference_steps": 0}):
        with pytest.raises(UsageError):
            check_second(pipe, FIRST, {**SECOND, **changes})


def test_other_programs_read_what_they_would_write(pipe: Pipeline, tmp_path: Path) -> None:
    one = drawn(pipe)
    one.save(tmp_path / "picture.png")
    text = read_metadata(tmp_path / "picture.png").parameters or ""
    for part in (
        "Size: 64x64",
        "Steps: 3",
        "Denoising strength: 0.6",
        "Hires resize: 80x96",
        "Hires steps: 5",
    ):
        assert part in text
    with Image.open(tmp_path / "picture.png") as opened:
        assert opened.size == (80, 96)
