import json
from pathlib import Path
from types import SimpleNamespace as Config

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch import nn

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.engines.errors import CheckpointError
from latentrt.export.nets.build import NETS
from latentrt.export.nets.vae import Scaling, VaeDecoder, VaeEncoder


def rename(path: Path, *pairs: tuple[str, str]) -> None:
    tensors = load_file(path)
    for old, new in pairs:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    save_file({name: value.clone() for name, value in tensors.items()}, path)


def test_missing_and_unknown_tensors(copy: Path) -> None:
    rename(copy / "unet" / "diffusion_pytorch_model.safetensors", ("conv_out", "conv_new"))
    with pytest.raises(
        CheckpointError, match=r"missing: \['conv_out.bias'.*unknown: \['conv_new.bias'.*; 4 in all"
    ):
        NETS["unet"].build(Checkpoint.open(copy), torch.float32)


def test_other_shapes(copy: Path) -> None:
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 9}))
    with pytest.raises(CheckpointError, match=r"conv_in.weight \(48, 4, 3, 3\)"):
        NETS["unet"].build(Checkpoint.open(copy), torch.float32)


def test_tensors_of_older_libraries_are_not_missed(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    buffers = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(1)}
    save_file({**load_file(path), **buffers}, path)
    net = NETS["text_encoder"].build(Checkpoint.open(copy), torch.float32)
    names = [stored for stored, _ in net.tensors.values()]
    assert all(name.startswith("text_model.") for name in names)
    assert not [name for name in names if "position_ids" in name]


def test_the_text_encoder_equals_transformers(checkpoint: Path) -> None:
    from transformers import CLIPTextModel

    reference = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    ids = torch.randint(0, 300, (3, 77), dtype=torch.int32)
    net = NETS["text_encoder"].build(Checkpoint.open(checkpoint), torch.float32)
    assert not [value for value in net.module.state_dict().values() if value.is_meta]
    with torch.no_grad():
        found = reference(ids, output_hidden_states=True)
        assert torch.equal(net.module(ids, torch.tensor([0])), found.last_hidden_state)
        wanted = reference.final_layer_norm(found.hidden_states[-2])  # as diffusers' encode_prompt
        assert torch.equal(net.module(ids, torch.tensor([1])), wanted)


def test_old_names_of_the_vaes_attention(copy: Path) -> None:
    wanted = NETS["vae_decoder"].build(Checkpoint.open(copy), torch.float32)
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    pairs = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
    rename(path, *((f"attentions.0.{new}.", f"attentions.0.{old}.") for new, old in pairs))
    found = NETS["vae_decoder"].build(Checkpoint.open(copy), torch.float32)
    assert found.tensors == wanted.tensors
    latent = torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        assert torch.equal(found.module(latent)[0], wanted.module(latent)[0])


class Fake(nn.Module):
    """A VAE that decodes to what it is given, and encodes so too, with a deviation of one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def encode(self, pixels: torch.Tensor, return_dict: bool) -> tuple[DiagonalGaussianDistribution]:
        assert not return_dict
        return (DiagonalGaussianDistribution(torch.cat([pixels, torch.zeros_like(pixels)], dim=1)),)

    def decode(self, latent: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert not return_dict
        return (latent,)


def test_pictures_are_rounded_as_diffusers_does() -> None:
    pixels = torch.linspace(-1.3, 1.3, 3 * 64 * 50).reshape(1, 3, 64, 50)
    image, mean = VaeDecoder(Fake(), Scaling(Config(scaling_factor=2.0)))(pixels * 2)
    wanted = VaeImageProcessor().postprocess(pixels, output_type="pil")[0]
    assert np.array_equal(image[0].numpy(), np.asarray(wanted))
    assert torch.allclose(mean, pixels.mean(dim=(1, 2, 3)), atol=1e-6)


def test_scale_and_shift_are_undone() -> None:
    scaling = Scaling(Config(scaling_factor=0.5, shift_factor=0.25))
    _, mean = VaeDecoder(Fake(), scaling)(torch.full((2, 3, 4, 4), 0.1))
    assert torch.allclose(mean, torch.full((2,), 0.1 / 0.5 + 0.25))


def test_means_and_deviations_by_channel() -> None:
    """As StableDiffusionXLPipeline decodes: latents * std / scaling_factor + mean."""
    config = Config(scaling_factor=0.5, latents_mean=[1.0, 2.0, 3.0], latents_std=[4.0, 5.0, 6.0])
    latent = torch.randn(1, 3, 2, 2)
    raw = Scaling(config).raw(latent)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    assert torch.allclose(raw, latent * std / 0.5 + mean)
    assert torch.allclose(Scaling(config).scaled(raw), latent, atol=1e-6)


def test_pictures_are_read_and_masked_as_diffusers_does() -> None:
    image = torch.randint(0, 256, (2, 8, 16, 3), dtype=torch.uint8)
    mask = torch.randint(0, 256, (2, 8, 16, 1), dtype=torch.uint8)
    scaling = Scaling(Config(scaling_factor=0.5, shift_factor=0.25))
    mean, std = VaeEncoder(Fake(), scaling, posterior=True)(image, mask)
    pixels = VaeImageProcessor().preprocess(image.numpy().astype(np.float32) / 255)
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    painted = processor.preprocess(mask.permute(0, 3, 1, 2).float() / 255)
    # the masked picture of StableDiffusionInpaintPipeline
    wanted = (pixels * (painted < 0.5) - 0.25) * 0.5
    assert torch.allclose(mean, wanted, atol=1e-6)
    assert torch.equal(std, torch.full_like(std, 0.5))


def test_the_exporter_is_listed_and_nothing_else_is_there() -> None:
    import latentrt.export

    assert "export_package" in dir(latentrt.export)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = latentrt.export.nothing
