import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file
from torch import nn

from latentrt.engines.errors import CheckpointError
from latentrt.export import nets
from latentrt.export.checkpoint import Checkpoint


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
        nets.unet(Checkpoint.open(copy), torch.float32)


def test_other_shapes(copy: Path) -> None:
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cross_attention_dim": 64}))
    with pytest.raises(CheckpointError, match=r"attn2.to_k.weight \(48, 80\)"):
        nets.unet(Checkpoint.open(copy), torch.float32)


def test_tensors_of_older_libraries_are_not_missed(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    buffers = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(1)}
    save_file({**load_file(path), **buffers}, path)
    net = nets.text_encoder(Checkpoint.open(copy), torch.float32)
    names = [stored for stored, _ in net.tensors.values()]
    assert all(name.startswith("text_model.") for name in names)
    assert not [name for name in names if "position_ids" in name]


def test_the_text_encoder_equals_transformers(checkpoint: Path) -> None:
    from transformers import CLIPTextModel

    reference = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    ids = torch.randint(0, 300, (3, 77), dtype=torch.int32)
    net = nets.text_encoder(Checkpoint.open(checkpoint), torch.float32)
    assert not [value for value in net.module.state_dict().values() if value.is_meta]
    with torch.no_grad():
        assert torch.equal(net.module(ids), reference(ids).last_hidden_state)


def test_old_names_of_the_vaes_attention(copy: Path) -> None:
    wanted = nets.vae_decoder(Checkpoint.open(copy), torch.float32)
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    pairs = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
    rename(path, *((f"attentions.0.{new}.", f"attentions.0.{old}.") for new, old in pairs))
    found = nets.vae_decoder(Checkpoint.open(copy), torch.float32)
    assert found.tensors == wanted.tensors
    latent = torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        assert torch.equal(found.module(latent)[0], wanted.module(latent)[0])


class Fake(nn.Module):
    """A VAE that decodes to what it is given."""

    def decode(self, latent: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert not return_dict
        return (latent,)


def test_pictures_are_rounded_as_diffusers_does() -> None:
    pixels = torch.linspace(-1.3, 1.3, 3 * 64 * 50).reshape(1, 3, 64, 50)
    image, mean = nets.VaeDecoder(Fake(), scale=2.0, shift=0.0)(pixels * 2)
    wanted = VaeImageProcessor().postprocess(pixels, output_type="pil")[0]
    assert np.array_equal(image[0].numpy(), np.asarray(wanted))
    assert torch.allclose(mean, pixels.mean(dim=(1, 2, 3)), atol=1e-6)


def test_scale_and_shift_are_undone() -> None:
    _, mean = nets.VaeDecoder(Fake(), scale=0.5, shift=0.25)(torch.full((2, 3, 4, 4), 0.1))
    assert torch.allclose(mean, torch.full((2,), 0.1 / 0.5 + 0.25))
