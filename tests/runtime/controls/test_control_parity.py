"""Pictures steered by ControlNets against diffusers' pipelines, on random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentrt import Control
from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.export.architectures import Architecture
from latentrt.export.templates import make_archive
from latentrt.runtime import Pipeline
from latentrt.runtime.controls.loaded import OpenedControl
from latentrt.runtime.loop.open import LoopOptions, open_control_loop
from tests.parity_pair import BAR, Pair, blob, drawn, exported, ours, photo, psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
MODELS = ["tiny2", "xl-tiny"]
SIZE = {"height": 64, "width": 96}
FAST: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, **SIZE}
SEEN = 40.0  # dB: a picture that is as far from another is another one


def controlnet(unet: Any, scale: int, seed: int) -> Any:
    """One of the UNet's weights, its own layers random: those of a new one are zeros at its outputs."""
    torch.manual_seed(seed)
    widths = (8, 12, 16, 20)[: scale.bit_length()]
    net: Any = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(0, 0.2)
    return net.eval()


class Steered(Pair):
    """A model with two ControlNets, here and in diffusers."""

    def __init__(self, folder: Path, made: Path) -> None:
        super().__init__(folder)
        unet = self._unet()
        self.nets = [controlnet(unet, self.ours.package.manifest.latent_scale, seed) for seed in (1, 2)]
        for number, net in enumerate(self.nets):
            net.save_pretrained(made / f"control{number}")
        config = {name: value for name, value in self.nets[0].config.items() if not name.startswith("_")}
        archive = made / "controls.zip"
        make_archive(archive, {"control": Architecture(parts={"controlnet": config})}, dtypes=["fp32"])
        plain = self.ours

        def opened(path: Path) -> OpenedControl:
            options = Options(dtype="fp32", reads=BACKENDS["onnxruntime"].reads, templates=archive)
            package = open_control(path, options, store=made / "cache")
            loop = open_control_loop(package, LoopOptions(backend="onnxruntime"))
            return OpenedControl(package=package, loop=loop)

        self.ours = Pipeline.over(plain.package, plain.loop, plain.backend, open_control=opened)
        self.names = [self.ours.load_control(made / f"control{number}") for number in (0, 1)]

    def steered(self, kind: str, count: int = 1) -> Any:
        """The diffusers pipeline of that class with the first of the ControlNets."""
        if (kind, count) not in self._references:
            unsafe = {"safety_checker": None, "requires_safety_checker": False}
            pipe = getattr(diffusers, kind).from_pretrained(
                self.checkpoint,
                dtype=torch.float32,
                unet=self._unet(),
                controlnet=self.nets[0] if count == 1 else self.nets[:count],
                **({} if "XL" in kind else unsafe),
            )
            pipe.set_progress_bar_config(disable=True)
            self._references[kind, count] = pipe
        return self._references[kind, count]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    found = Steered(exported(tmp_path_factory, request.param), tmp_path_factory.mktemp("controls"))
    yield found
    found.ours.close()


def kind(pair: Pair, task: str = "") -> str:
    xl = "XL" if "xl" in str(pair.checkpoint) else ""
    return f"StableDiffusion{xl}ControlNet{task}Pipeline"


def hint(seed: int = 0) -> Image.Image:
    return photo(64, 96, seed)


@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_text_to_image(pair: Steered, seeds: list[int]) -> None:
    prompts = ["a red circle", "large green star"][: len(seeds)]
    images = [hint(n) for n in range(len(seeds))]
    wanted = drawn(
        pair.steered(kind(pair)),
        seeds,
        prompt=prompts,
        image=images,
        controlnet_conditioning_scale=0.8,
        **FAST,
    )
    control = Control(model=pair.names[0], image=images, strength=0.8)
    found = ours(pair.ours, seeds, prompt=prompts, controls=[control], **FAST)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, ours(pair.ours, seeds, prompt=prompts, **FAST)) < SEEN


@pytest.mark.parametrize(
    ("start", "end", "guess"), [(0.0, 0.5, False), (0.25, 1.0, False), (0.0, 1.0, True), (0.3, 0.8, True)]
)
def test_parts_of_the_steps_and_guess_mode(pair: Steered, start: float, end: float, guess: bool) -> None:
    wanted = drawn(
        pair.steered(kind(pair)),
        [5],
        prompt="a ring",
        image=hint(),
        control_guidance_start=start,
        control_guidance_end=end,
        guess_mode=guess,
        **FAST,
    )
    control = Control(
        model=pair.names[0], image=hint(), start=start, end=end, mode="guess" if guess else "balanced"
    )
    assert psnr(wanted, ours(pair.ours, [5], prompt="a ring", controls=[control], **FAST)) >= BAR


def test_two_nets(pair: Steered) -> None:
    wanted = drawn(
        pair.steered(kind(pair), 2),
        [6],
        prompt="a ring",
        image=[hint(0), hint(1)],
        controlnet_conditioning_scale=[0.7, 0.4],
        **FAST,
    )
    controls = [
        Control(model=name, image=hint(number), strength=strength)
        for number, (name, strength) in enumerate(zip(pair.names, (0.7, 0.4), strict=True))
    ]
    found = ours(pair.ours, [6], prompt="a ring", controls=controls, **FAST)
    assert psnr(wanted, found) >= BAR
    swapped = ours(pair.ours, [6], prompt="a ring", controls=controls[::-1], **FAST)
    assert np.array_equal(swapped, found)


def test_from_a_picture(pair: Steered) -> None:
    given = {**FAST, "num_inference_steps": 6, "strength": 0.6}
    started = photo(64, 96, 7)
    wanted = drawn(
        pair.steered(kind(pair, "Img2Img")),
        [8],
        prompt="a ring",
        image=started,
        control_image=hint(),
        control_guidance_end=0.5,
        controlnet_conditioning_scale=1.0,
        **given,
    )
    control = Control(model=pair.names[0], image=hint(), end=0.5)
    found = ours(pair.ours, [8], prompt="a ring", image=started, controls=[control], **given)
    assert psnr(wanted, found) >= BAR


def test_inpainting(pair: Steered) -> None:
    given = {**FAST, "num_inference_steps": 6, "strength": 1.0}
    started, mask = photo(64, 96, 7), blob(64, 96)
    wanted = drawn(
        pair.steered(kind(pair, "Inpaint")),
        [8],
        prompt="a ring",
        image=started,
        mask_image=mask,
        control_image=hint(),
        controlnet_conditioning_scale=0.9,
        **given,
    )
    control = Control(model=pair.names[0], image=hint(), strength=0.9)
    found = ours(pair.ours, [8], prompt="a ring", image=started, mask_image=mask, controls=[control], **given)
    inside = np.asarray(mask)[None, ..., None] >= 128  # outside of which diffusers puts nothing back
    assert psnr(wanted * inside, found * inside) >= BAR


def test_strength_0_is_no_control_to_the_byte(pair: Steered) -> None:
    control = Control(model=pair.names[0], image=hint(), strength=0.0)
    plain = ours(pair.ours, [1], prompt="a ring", **FAST)
    assert np.array_equal(ours(pair.ours, [1], prompt="a ring", controls=[control], **FAST), plain)
