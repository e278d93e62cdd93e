"""One and two ControlNets x what is drawn x guess mode x guidance, in parts of the steps, against diffusers'.

`test_parity_controls.py` has each of these alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from latentrt import Control
from tests.parity_pair import BAR, blob, drawn, exported, ours, photo, psnr
from tests.steered_pair import SEEN, Steered

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
H, W = 64, 96
STRENGTHS, STARTS, ENDS = (0.8, 0.6), (0.0, 0.2), (0.7, 1.0)
inpainting_models = pytest.mark.parametrize(
    "painter",
    ["inpaint-tiny", pytest.param("inpaint-xl-tiny", marks=pytest.mark.slow)],
    indirect=True,
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is drawn: the middle of the name of diffusers' class, its word for hints, and what is given."""

    kind: str
    hints: str
    given: dict[str, Any]


_START: dict[str, Any] = {"image": photo(H, W, 7), "strength": 0.7, "num_inference_steps": 7}
TASKS = {
    "text": Task(kind="", hints="image", given={"num_inference_steps": 5}),
    "picture": Task(kind="Img2Img", hints="control_image", given=_START),
    "inpaint": Task(
        kind="Inpaint", hints="control_image", given={**_START, "mask_image": blob(H, W), "strength": 1.0}
    ),
}


@pytest.fixture(
    scope="module",
    params=["tiny2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny1", "xl-levels-tiny"))],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    yield from opened(request, tmp_path_factory)


@pytest.fixture(scope="module")
def painter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    """Its UNet reads nine channels: the latent, the mask and the masked picture."""
    yield from opened(request, tmp_path_factory)


def opened(request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> Iterator[Steered]:
    found = Steered(exported(factory, request.param), factory.mktemp("tasks"))
    yield found
    found.ours.close()


def controls(pair: Steered, count: int, mode: Any = "balanced") -> list[Control]:
    parts = zip(pair.names[:count], STRENGTHS, STARTS, ENDS, strict=False)
    return [
        Control(model=name, image=photo(H, W, number), strength=strength, start=start, end=end, mode=mode)
        for number, (name, strength, start, end) in enumerate(parts)
    ]


def by_diffusers(pair: Steered, task: Task, count: int, **more: Any) -> np.ndarray:
    xl = "XL" if "xl" in str(pair.checkpoint) else ""
    hints = [photo(H, W, number) for number in range(count)]
    of_nets: dict[str, Any] = {
        task.hints: hints,
        "controlnet_conditioning_scale": list(STRENGTHS[:count]),
        "control_guidance_start": list(STARTS[:count]),
        "control_guidance_end": list(ENDS[:count]),
    }
    if count == 1:
        of_nets = {name: values[0] for name, values in of_nets.items()}
    pipe = pair.steered(f"StableDiffusion{xl}ControlNet{task.kind}Pipeline", count)
    return drawn(pipe, [5], prompt="a ring", height=H, width=W, **task.given, **of_nets, **more)


def compare(pair: Steered, task: Task, count: int, guidance: float, guess: bool) -> None:
    """As diffusers, and without any one of the nets another picture."""
    shown = np.asarray(blob(H, W))[None, ..., None] >= 128 if "mask_image" in task.given else np.True_
    wanted = by_diffusers(pair, task, count, guidance_scale=guidance, guess_mode=guess) * shown
    shared = {"prompt": "a ring", "height": H, "width": W, "guidance_scale": guidance, **task.given}
    given = controls(pair, count, "guess" if guess else "balanced")
    found = ours(pair.ours, [5], controls=given, **shared) * shown
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, ours(pair.ours, [5], **shared) * shown) < SEEN
    for left_out in range(count if count > 1 else 0):
        others = given[:left_out] + given[left_out + 1 :]
        assert psnr(wanted, ours(pair.ours, [5], controls=others, **shared) * shown) < BAR


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_two_nets(pair: Steered, task: str, guess: bool) -> None:
    compare(pair, TASKS[task], 2, 5.0, guess)


@pytest.mark.parametrize("guess", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS)
def test_two_nets_without_guidance(pair: Steered, task: str, guess: bool) -> None:
    compare(pair, TASKS[task], 2, 1.0, guess)


@pytest.mark.parametrize("guidance", [5.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_one_net(pair: Steered, task: str, guess: bool, guidance: float) -> None:
    compare(pair, TASKS[task], 1, guidance, guess)


@inpainting_models
@pytest.mark.parametrize("count", [1, 2])
def test_an_inpainting_model_shows_a_controlnet_its_latent_alone(painter: Steered, count: int) -> None:
    """The first four of its nine channels."""
    compare(painter, TASKS["inpaint"], count, 5.0, guess=False)
