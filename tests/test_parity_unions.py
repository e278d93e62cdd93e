"""Pictures steered by a Union ControlNet against diffusers' pipelines, on random weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentrt import Control, UsageError
from latentrt.export.architectures import Architecture
from tests.parity_pair import BAR, Pair, blob, drawn, exported, ours, photo, psnr
from tests.steered_pair import steerable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
SIZE = {"height": 64, "width": 96}
# diffusers' Union pipelines fail in guess mode with guidance: half of the rows get the types of all.
UNGUIDED = {"guidance_scale": 1.0}
FAST: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, **SIZE}
PROMPT = "a red circle"
TYPES = {"union": 6, "promax": 8}
CANNY, DEPTH, REPAINT = 3, 1, 7


def union(unet: Any, scale: int, types: int) -> Any:
    """A Union of the UNet's weights; its own layers are random, and so much so that each can be seen."""
    torch.manual_seed(types)
    config = {
        name: value
        for name, value in diffusers.ControlNetModel.from_unet(unet).config.items()
        if not name.startswith("_") and name != "mid_block_type"
    }
    width = config["block_out_channels"][0]
    more = {
        "conditioning_embedding_out_channels": (8, 12, 16, 20)[: scale.bit_length()],
        "num_control_type": types,
        "num_trans_channel": width,
        "num_proj_channel": width,
        "num_trans_layer": types // 4,
    }
    net: Any = diffusers.ControlNetUnionModel(**{**config, **more})
    net.load_state_dict(unet.state_dict(), strict=False)
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(0, 0.2)
        net.controlnet_cond_embedding.conv_out.weight.mul_(50)
    return net.eval()


class United(Pair):
    """An SDXL model with a Union of 6 types and one of 8, here and in diffusers."""

    def __init__(self, folder: Path, made: Path) -> None:
        super().__init__(folder)
        unet, plain = self._unet(), self.ours
        scale = plain.package.manifest.latent_scale
        self.nets = {name: union(unet, scale, types) for name, types in TYPES.items()}
        architectures: dict[str, Architecture] = {}
        for name, net in self.nets.items():
            net.save_pretrained(made / name)
            config = {"_class_name": "ControlNetUnionModel", **net.config}
            architectures[name] = Architecture(parts={"controlnet": config})
        self.ours = steerable(plain, architectures, made)
        for name in TYPES:
            assert self.ours.load_control(made / name) == name

    def united(self, name: str, task: str = "") -> Any:
        """diffusers' pipeline with one of the Unions."""
        kind = f"StableDiffusionXLControlNetUnion{task}Pipeline"
        pipe = getattr(diffusers, kind).from_pretrained(
            self.checkpoint, dtype=torch.float32, unet=self._unet(), controlnet=self.nets[name]
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[United]:
    found = United(exported(tmp_path_factory, "xl-tiny"), tmp_path_factory.mktemp("unions"))
    yield found
    found.ours.close()


def hint(seed: int = 0) -> Image.Image:
    return photo(64, 96, seed)


def draw(pair: United, *controls: Control, **more: Any) -> np.ndarray[Any, Any]:
    return ours(pair.ours, [3], prompt=PROMPT, controls=list(controls), **{**FAST, **more})


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_one_picture(pair: United, name: str, guess: bool) -> None:
    """Its strength counts at the outputs."""
    given = {**FAST, **(UNGUIDED if guess else {})}
    wanted = drawn(
        pair.united(name),
        [3],
        prompt=PROMPT,
        control_image=[hint()],
        control_mode=[CANNY],
        controlnet_conditioning_scale=0.7,
        guess_mode=guess,
        **given,
    )
    control = Control(
        model=name,
        image=hint(),
        control_type="canny",
        strength=0.7,
        mode="guess" if guess else "balanced",
    )
    found = draw(pair, control, **given)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, draw(pair, **given)) < 40
    assert psnr(wanted, draw(pair, replace(control, control_type="depth"), **given)) < BAR
    assert psnr(wanted, draw(pair, replace(control, image=hint(1)), **given)) < 50


@pytest.mark.parametrize("guess", [False, True])
def test_two_pictures(pair: United, guess: bool) -> None:
    """Their strengths count before the net, and one may end before the other."""
    given = {**FAST, **(UNGUIDED if guess else {})}
    wanted = drawn(
        pair.united("promax"),
        [3],
        prompt=PROMPT,
        control_image=[hint(), hint(1)],
        control_mode=[CANNY, DEPTH],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_end=[1.0, 0.5],
        guess_mode=guess,
        **given,
    )
    mode = "guess" if guess else "balanced"
    edges = Control(model="promax", image=hint(), control_type="canny", strength=0.7, mode=mode)
    depth = Control(model="promax", image=hint(1), control_type="depth", strength=0.4, mode=mode, end=0.5)
    found = draw(pair, edges, depth, **given)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, draw(pair, edges, **given)) < BAR
    assert np.array_equal(draw(pair, depth, edges, **given), found)


@pytest.mark.parametrize("count", [1, 2])
def test_from_a_picture(pair: United, count: int) -> None:
    given = {**FAST, "num_inference_steps": 6, "strength": 0.6}
    started, types = photo(64, 96, 7), ["canny", "segment"][:count]
    wanted = drawn(
        pair.united("union", "Img2Img"),
        [3],
        prompt=PROMPT,
        image=started,
        control_image=[hint(n) for n in range(count)],
        control_mode=[CANNY, 5][:count],
        controlnet_conditioning_scale=[0.9, 0.6][:count],
        **given,
    )
    controls = [
        Control(model="union", image=hint(n), control_type=kind, strength=strength)
        for n, (kind, strength) in enumerate(zip(types, (0.9, 0.6), strict=False))
    ]
    assert psnr(wanted, draw(pair, *controls, image=started, **given)) >= BAR


def test_repainting(pair: United) -> None:
    """ProMax' hint is the picture, black where it is to be painted; the preparation says the type."""
    mask = blob(64, 96)
    black = Image.composite(Image.new("RGB", (96, 64)), hint(), mask.point(lambda shade: 255 * (shade > 127)))
    wanted = drawn(
        pair.united("promax"), [3], prompt=PROMPT, control_image=[black], control_mode=[REPAINT], **FAST
    )
    control = Control(model="promax", image=hint(), preparation="repaint", mask_image=mask)
    assert psnr(wanted, draw(pair, control)) >= BAR


def test_pictures_of_a_batch_are_what_they_are_alone(pair: United) -> None:
    """diffusers lets the rows of a batch attend to each other, so that they would not be."""
    prompts, hints = ["a red circle", "large green star"], [hint(), hint(1)]
    control = Control(model="union", image=hints, control_type="canny")
    both = ours(pair.ours, [3, 4], prompt=prompts, controls=[control], **FAST)
    for number, alone in enumerate(hints):
        wanted = drawn(
            pair.united("union"),
            [3 + number],
            prompt=prompts[number],
            control_image=[alone],
            control_mode=[CANNY],
            **FAST,
        )
        assert psnr(wanted, both[number : number + 1]) >= BAR


def test_no_strength_is_no_control_to_the_byte(pair: United) -> None:
    one = Control(model="union", image=hint(), control_type="canny", strength=0.0)
    assert np.array_equal(draw(pair, one, replace(one, control_type="depth")), draw(pair))


def test_what_is_read_and_drawn_is_in_the_record(pair: United) -> None:
    control = Control(model="promax", image=hint(), preparation="canny")
    result = pair.ours(PROMPT, seed=3, controls=[control], **FAST)
    (steered,) = result.record()["steered_by"]
    assert steered["control_type"] == "canny"


def test_wrong_types_are_refused_before_anything_is_drawn(pair: United) -> None:
    plain = Control(model="union", image=hint())
    for wrong in (plain, replace(plain, control_type="repaint"), replace(plain, preparation="invert")):
        with pytest.raises(UsageError, match=r"'union' reads several kinds of pictures.*openpose, depth, "):
            draw(pair, wrong)
    edges = replace(plain, control_type="canny")
    with pytest.raises(UsageError, match="'union' is to draw in the modes balanced and guess at once"):
        draw(pair, edges, replace(plain, preparation="canny", mode="guess"))
