"""Pictures steered by T2I-Adapters against diffusers' pipelines, on random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentrt import CheckpointError, Control, UsageError
from latentrt.export.architectures import Architecture
from tests.parity_pair import BAR, Pair, drawn, exported, ours, photo, psnr
from tests.steered_pair import steerable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
SIZE = {"height": 64, "width": 96}
FAST: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, **SIZE}
SEEN = 40.0  # dB: a picture that is as far from another is another one


def adapter(config: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    net: Any = diffusers.T2IAdapter(**config)
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(0, 2.0 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1)
    return net.eval()


class Steered(Pair):
    """A model with T2I-Adapters, here and in diffusers."""

    def __init__(self, folder: Path, made: Path) -> None:
        super().__init__(folder)
        config, scale = self._unet().config, self.ours.package.manifest.latent_scale
        channels = list(config.block_out_channels)
        self.xl = "xl" in str(self.checkpoint)
        if self.xl:
            # the levels of the published UNet: 1, 1, 2, 2
            configs = [{"channels": [*channels, channels[-1]], "adapter_type": "full_adapter_xl"}]
        else:
            configs = [
                {"channels": channels, "adapter_type": "full_adapter"},
                {"channels": channels[:-1], "adapter_type": "light_adapter", "in_channels": 1},
            ]
        factor = scale * (2 if self.xl else 1)
        self.nets = [
            adapter({"in_channels": 3, "num_res_blocks": 2, "downscale_factor": factor, **one}, seed)
            for seed, one in enumerate(configs)
        ]
        self.made = made
        for number, net in enumerate(self.nets):
            net.save_pretrained(made / f"t2i{number}")
        named = {
            f"t2i{number}": Architecture(parts={"t2i-adapter": {**net.config, "_class_name": "T2IAdapter"}})
            for number, net in enumerate(self.nets)
        }
        self.ours = steerable(self.ours, named, made)
        self.names = [self.ours.load_control(made / f"t2i{number}") for number in range(len(self.nets))]

    def steered(self, nets: Any) -> Any:
        """diffusers' pipeline with these adapters."""
        unsafe = {"safety_checker": None, "requires_safety_checker": False}
        kind = f"StableDiffusion{'XL' if self.xl else ''}AdapterPipeline"
        pipe: Any = getattr(diffusers, kind).from_pretrained(
            self.checkpoint,
            dtype=torch.float32,
            unet=self._unet(),
            adapter=nets,
            **({} if self.xl else unsafe),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(
    scope="module", params=["tiny2", pytest.param("xl-levels-tiny", marks=pytest.mark.slow)], name="pair"
)
def steered_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Steered]:
    found = Steered(exported(tmp_path_factory, request.param), tmp_path_factory.mktemp("t2i"))
    yield found
    found.ours.close()


def hint(seed: int = 0) -> Image.Image:
    return photo(SIZE["height"], SIZE["width"], seed)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_text_to_image(pair: Steered, strength: float) -> None:
    wanted = drawn(
        pair.steered(pair.nets[0]),
        [3],
        prompt="a red circle",
        image=hint(),
        adapter_conditioning_scale=strength,
        **FAST,
    )
    control = Control(model=pair.names[0], image=hint(), strength=strength)
    found = ours(pair.ours, [3], prompt="a red circle", controls=[control], **FAST)
    assert psnr(wanted, found) >= BAR
    plain = ours(pair.ours, [3], prompt="a red circle", **FAST)
    assert psnr(wanted, plain) < SEEN
    off = Control(model=pair.names[0], image=hint(), strength=0.0)
    assert np.array_equal(ours(pair.ours, [3], prompt="a red circle", controls=[off], **FAST), plain)


def test_a_part_of_the_steps(pair: Steered) -> None:
    """XL's pipeline has `adapter_conditioning_factor`; that of 1.x always draws all of the steps with it."""
    if not pair.xl:
        control = Control(model=pair.names[0], image=hint(), end=0.5)
        found = ours(pair.ours, [3], prompt="a ring", controls=[control], **FAST)
        for end in (0.0, 1.0):
            other = [Control(model=pair.names[0], image=hint(), end=end)] if end else []
            assert not np.array_equal(ours(pair.ours, [3], prompt="a ring", controls=other, **FAST), found)
        return
    wanted = drawn(
        pair.steered(pair.nets[0]),
        [3],
        prompt="a ring",
        image=hint(),
        adapter_conditioning_factor=0.6,
        **FAST,
    )
    control = Control(model=pair.names[0], image=hint(), end=0.6)
    assert psnr(wanted, ours(pair.ours, [3], prompt="a ring", controls=[control], **FAST)) >= BAR


def test_a_light_one_of_one_channel_and_two_at_once(pair: Steered) -> None:
    if pair.xl:
        pytest.skip("diffusers' MultiAdapter wants all of one kind")
    gray = hint().convert("L")
    wanted = drawn(pair.steered(pair.nets[1]), [4], prompt="a star", image=gray, **FAST)
    control = Control(model=pair.names[1], image=gray)
    assert psnr(wanted, ours(pair.ours, [4], prompt="a star", controls=[control], **FAST)) >= BAR
    both = [Control(model=pair.names[0], image=hint(), strength=0.7), control]
    found = ours(pair.ours, [4], prompt="a star", controls=both, **FAST)
    multi: Any = diffusers.MultiAdapter([pair.nets[0], Gray(pair.nets[1])])
    wanted = drawn(
        pair.steered(multi),
        [4],
        prompt="a star",
        image=[hint(), gray.convert("RGB")],
        adapter_conditioning_scale=[0.7, 1.0],
        **FAST,
    )
    assert psnr(wanted, found) >= BAR


class Gray(torch.nn.Module):
    """An adapter of one channel that is given three: MultiAdapter stacks its pictures."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.total_downscale_factor, self.downscale_factor = net.total_downscale_factor, net.downscale_factor

    def forward(self, picture: torch.Tensor) -> Any:
        return self.net(picture[:, :1])


def test_what_is_refused(pair: Steered) -> None:
    control = Control(model=pair.names[0], image=hint(), mode="guess")
    with pytest.raises(UsageError, match="control_mode is 'guess' for the T2I-Adapter"):
        ours(pair.ours, [1], prompt="a", controls=[control], **FAST)
    if pair.xl:
        control = Control(model=pair.names[0], image=hint())
        with pytest.raises(UsageError, match="does not take 72x96 pixels; expected a height and a width"):
            ours(pair.ours, [1], prompt="a", controls=[control], **{**FAST, "height": 72})


def test_another_family_is_refused(pair: Steered, tmp_path: Path) -> None:
    if pair.xl:
        pytest.skip("shown with 1.x")
    config = {**pair.nets[0].config, "channels": [8, 16]}
    adapter(config, 0).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="fits no graph that is shipped: channels is"):
        pair.ours.load_control(tmp_path / "other")
