"""The fitted colours of latent cells: exact where the encoder is linear, and close on the demo's."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from latentrt.checkpoints.files.component import Component
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.precision.calibration import colour_fields
from latentrt.engines.errors import NumericError
from latentrt.export.latent_rgb import fit_latent_rgb
from latentrt.export.nets.build import NETS
from latentrt.export.nets.torch_net import Net

DEMO = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"
MIX = np.array([[0.5, -0.2, 0.1, 0.3], [0.1, 0.7, -0.4, 0.2], [0.2, 0.1, 0.6, -0.5]])  # of colours


class Linear(nn.Module):
    """An encoder whose latent is a mixture of the cell's mean colours."""

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cells = nn.functional.avg_pool2d(image.permute(0, 3, 1, 2).double() / 255, 2)
        latent = torch.einsum("nchw,cd->ndhw", cells, torch.from_numpy(MIX))
        return latent, torch.zeros_like(latent)


class Broken(nn.Module):
    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.full((len(image), 4, 16, 16), torch.nan)


def with_encoder(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
    def make(source: Checkpoint, part: Component, dtype: torch.dtype) -> Any:
        return Net(module=module, spec=None, tensors={})  # type: ignore[arg-type]

    monkeypatch.setitem(cast(dict[str, Any], NETS), "vae_encoder", replace(NETS["vae_encoder"], make=make))


def test_a_linear_encoder_is_inverted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_encoder(monkeypatch, Linear())
    fit = np.array(fit_latent_rgb(Checkpoint.open(checkpoint)))
    assert fit.shape == (5, 3)
    np.testing.assert_allclose(MIX @ fit[:4], np.eye(3), atol=1e-4)
    np.testing.assert_allclose(fit[4], 0, atol=1e-4)


def test_latents_that_are_not_finite(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_encoder(monkeypatch, Broken())
    with pytest.raises(NumericError, match="latents are not finite"):
        fit_latent_rgb(Checkpoint.open(checkpoint))


def test_pictures_of_every_colour() -> None:
    pictures = colour_fields(3, 40, seed=5)
    assert (pictures.shape, pictures.dtype) == ((3, 40, 40, 3), np.uint8)
    assert (pictures.min(axis=(1, 2)) == 0).all()
    assert (pictures.max(axis=(1, 2)) == 255).all()
    assert np.abs(np.diff(pictures.astype(int), axis=1)).max() < 60
    np.testing.assert_array_equal(pictures, colour_fields(3, 40, seed=5))


def test_the_demos_colours_are_nearly_as_close_as_a_line_can_be() -> None:
    """On pictures that the fit has not seen, against the best linear map of those themselves."""
    source = Checkpoint.open(DEMO)
    fit = np.array(fit_latent_rgb(source))
    pictures = colour_fields(8, 64, seed=99)
    with torch.no_grad():
        net = NETS["vae_encoder"].build(source, torch.float32).module
        latent = net(torch.from_numpy(pictures), torch.zeros((8, 64, 64, 1), dtype=torch.uint8))[0].numpy()
    rows = np.hstack([np.moveaxis(latent, 1, 3).reshape(-1, 4), np.ones((8 * 64, 1))])
    cells = pictures.reshape(8, 8, 8, 8, 8, 3).mean(axis=(2, 4)).reshape(-1, 3) / 255
    best = np.linalg.lstsq(rows, cells, rcond=None)[0]
    ours, bound = (np.sqrt(((rows @ line - cells) ** 2).mean()) for line in (fit, best))
    assert ours < 1.25 * bound
    assert ours < 0.9 * cells.std()
