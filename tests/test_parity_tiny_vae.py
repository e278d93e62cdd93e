"""A tiny autoencoder in place of the VAE, against diffusers' pipeline with the same one, fp32."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from latentrt.export.export import export_package
from latentrt.runtime import Pipeline
from tests.parity_pair import BAR, PROMPTS, drawn, ours, psnr
from tests.recipes import RECIPES, make_checkpoint, make_tiny_vae

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def test_a_tiny_autoencoder_decodes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(RECIPES["turbo-tiny"], tmp_path / "checkpoint", dtype=torch.float32)
    tiny = make_tiny_vae(tmp_path / "tiny", dtype=torch.float32)
    export_package(checkpoint, tmp_path / "package", dtype="fp32", verify=False, vae=tiny)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(
        checkpoint,
        vae=diffusers.AutoencoderTiny.from_pretrained(tiny),
        safety_checker=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    parameters = {"prompt": PROMPTS[0], "num_inference_steps": 4, "guidance_scale": 0.0}
    with Pipeline.open(tmp_path / "package") as pipe:
        scale = pipe.package.manifest.latent_scale
        size = {"height": 20 * scale, "width": 28 * scale}
        wanted = drawn(reference, [3], **parameters, **size)
        assert psnr(wanted, np.asarray(ours(pipe, [3], **parameters, **size))) >= BAR
