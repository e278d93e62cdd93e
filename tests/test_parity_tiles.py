"""Pictures drawn in tiles against diffusers' pipelines, whose nets are called tile by tile here."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentrt import Control
from tests.parity_pair import BAR, Pair, drawn, exported, ours, photo, psnr
from tests.steered_pair import SEEN, Steered

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
SMALL = photo(48, 56, 3)
LARGE = SMALL.resize((112, 96), Image.Resampling.LANCZOS)
SIDE, OVERLAP = 64, 16
# Two tiles down and two across: their starts in pixels, and what they share.
DOWN, ACROSS = ((0, 32), 32), ((0, 48), 16)
TILES: dict[str, Any] = {"draw_tile": SIDE, "draw_overlap": OVERLAP, "tile": 128}  # one tile for the VAE
FAST: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "prompt": "a ring"}
Cut = Callable[
    [torch.Tensor, int], torch.Tensor
]  # (values, pixels of one along each axis) -> those of a tile


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    found = Steered(exported(tmp_path_factory, "tiny2"), tmp_path_factory.mktemp("tiles"))
    yield found
    found.ours.close()


def tiles(scale: int) -> Iterator[tuple[Cut, slice, slice, torch.Tensor]]:
    """Each tile's cut, rows and columns of the latent, and weights: a straight line over what two share."""

    def weights(second: int, shared: int) -> torch.Tensor:
        side, shared = SIDE // scale, shared // scale
        rising = torch.cat([torch.arange(shared) / shared, torch.ones(side - shared)])
        falling = torch.cat([torch.ones(side - shared), 1 - torch.arange(shared) / shared])
        return rising if second else falling

    for i, top in enumerate(DOWN[0]):
        for j, left in enumerate(ACROSS[0]):

            def cut(values: torch.Tensor, pixels: int, top: int = top, left: int = left) -> torch.Tensor:
                rows = slice(top // pixels, (top + SIDE) // pixels)
                return values[..., rows, left // pixels : (left + SIDE) // pixels]

            rows = slice(top // scale, (top + SIDE) // scale)
            columns = slice(left // scale, (left + SIDE) // scale)
            yield cut, rows, columns, weights(i, DOWN[1])[:, None] * weights(j, ACROSS[1])


def call_in_tiles(patch: pytest.MonkeyPatch, pipe: Any, scale: int) -> None:
    """Have a diffusers pipeline call its UNet, and its ControlNet with it, tile by tile."""
    unet, control = pipe.unet.forward, getattr(pipe, "controlnet", None)
    control_forward = control.forward if control is not None else None
    asked: dict[str, Any] = {}

    def remember(latent: torch.Tensor, t: Any, **options: Any) -> Any:
        asked.update(options)
        return [], None

    def forward(latent: torch.Tensor, t: Any, **options: Any) -> Any:
        whole = torch.zeros_like(latent)
        for cut, rows, columns, weights in tiles(scale):
            if control_forward is not None:
                hint = cut(asked["controlnet_cond"], 1)
                down, middle = control_forward(cut(latent, scale), t, **{**asked, "controlnet_cond": hint})
                options["down_block_additional_residuals"] = down
                options["mid_block_additional_residual"] = middle
            whole[..., rows, columns] += unet(cut(latent, scale), t, **options)[0] * weights
        return (whole,)

    patch.setattr(pipe.unet, "forward", forward)
    if control is not None:
        patch.setattr(control, "forward", remember)


@pytest.mark.parametrize("seeds", [[7], [7, 8]])
def test_an_enlarged_picture(pair: Steered, seeds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pair.reference("StableDiffusionImg2ImgPipeline")
    given = {**FAST, "prompt": ["a ring", "large green star"][: len(seeds)], "strength": 0.6}
    plain = drawn(pipe, seeds, image=LARGE, **given)
    call_in_tiles(monkeypatch, pipe, pair.ours.package.manifest.latent_scale)
    wanted = drawn(pipe, seeds, image=LARGE, **given)
    found = ours(pair.ours, seeds, image=SMALL, upscale=2, **given, **TILES)
    assert psnr(wanted, found) >= BAR
    assert psnr(plain, found) < BAR  # a negative control: in one piece it is another picture


def test_with_a_tile_controlnet(pair: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pair.steered("StableDiffusionControlNetImg2ImgPipeline")
    given = {**FAST, "strength": 0.6}
    control = Control(model=pair.names[0], image=SMALL, preparation="tile", strength=0.8)
    call_in_tiles(monkeypatch, pipe, pair.ours.package.manifest.latent_scale)
    wanted = drawn(pipe, [7], image=LARGE, control_image=LARGE, controlnet_conditioning_scale=0.8, **given)
    found = ours(pair.ours, [7], image=SMALL, upscale=2, controls=[control], **given, **TILES)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, ours(pair.ours, [7], image=SMALL, upscale=2, **given, **TILES)) < SEEN


def test_a_tile_controlnet_of_one_tile(pair: Steered) -> None:
    """Nothing is patched here: a picture of one tile is diffusers' own."""
    given = {**FAST, "strength": 0.6}
    wanted = drawn(
        pair.steered("StableDiffusionControlNetImg2ImgPipeline"),
        [7],
        image=LARGE,
        control_image=LARGE,
        controlnet_conditioning_scale=1.0,
        **given,
    )
    control = Control(model=pair.names[0], image=SMALL, preparation="tile")
    found = ours(pair.ours, [7], image=SMALL, upscale=2, draw_tile=112, controls=[control], **given)
    assert psnr(wanted, found) >= BAR


def test_a_picture_from_noise_is_diffusers_panorama(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its equal weights are ours where tiles do not overlap."""
    pipe, scale = pair.reference("StableDiffusionPanoramaPipeline"), pair.ours.package.manifest.latent_scale
    cells = 64 // scale
    views = [(y, y + cells, x, x + cells) for y in (0, cells) for x in (0, cells, 2 * cells)]
    monkeypatch.setattr(pipe, "get_views", lambda *sizes, **options: views)
    given = {**FAST, "height": 128, "width": 192}
    wanted = drawn(pipe, [3], **given)
    found = ours(pair.ours, [3], draw_tile=64, draw_overlap=0, tile=192, sampler="ddim", **given)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, ours(pair.ours, [3], tile=192, sampler="ddim", **given)) < BAR
    assert not np.array_equal(found, ours(pair.ours, [3], draw_tile=64, tile=192, sampler="ddim", **given))
