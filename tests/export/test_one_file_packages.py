"""A one-file checkpoint and a folder of the same weights become the same package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentrt.export.export import export_package
from tests.export.ldm_files import one_file
from tests.recipes import RECIPES, make_checkpoint

KINDS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "family"), [("xl-tiny", "sdxl"), ("refiner-tiny", "sdxl-refiner")])
def test_packages_are_identical_tensor_for_tensor(tmp_path: Path, recipe: str, family: str) -> None:
    folder = make_checkpoint(RECIPES[recipe], tmp_path / "folder")
    modules = {
        part: kind.from_pretrained(folder / part, torch_dtype=torch.float16)
        for part, kind in KINDS.items()
        if (folder / part).is_dir()
    }
    stored = {name: t.contiguous() for name, t in one_file(modules, family).items() if not t.is_meta}
    save_file(stored, tmp_path / "file.safetensors")
    packages = [
        export_package(source, tmp_path / f"package{number}", dtype="fp32", verify=False)
        for number, source in enumerate((folder, tmp_path / "file.safetensors"))
    ]
    one, other = packages
    assert one.manifest.nets == other.manifest.nets
    assert one.manifest.latent_rgb == other.manifest.latent_rgb
    compared = 0
    for name in sorted({name for net in one.manifest.nets.values() for name in net.weights}):
        left, right = load_file(one.path(name)), load_file(other.path(name))
        assert left.keys() == right.keys()
        for tensor, values in left.items():
            np.testing.assert_array_equal(values, right[tensor], err_msg=f"{name}: {tensor}")
            compared += 1
    assert compared > 300
