"""Autoencoders from elsewhere: in place of the checkpoint's, and tiny ones for previews."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.engines.errors import CheckpointError
from latentrt.export.nets.build import NETS
from tests.recipes import RECIPES, make_checkpoint, make_tiny_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(RECIPES["lcm-tiny"], tmp_path_factory.mktemp("lcm") / "lcm", dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vae(tmp_path_factory.mktemp("tiny") / "taesd", dtype=torch.float32)


def test_another_autoencoder_takes_the_place_of_the_checkpoints(
    checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    other = make_checkpoint(RECIPES["lcm-tiny"], tmp_path / "other", dtype=torch.float32, seed=5) / "vae"
    opened = Checkpoint.open(checkpoint, vae=other)
    assert opened.vae.folder == other
    assert opened.family == "lcm"
    latent = torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        image, mean = NETS["vae_decoder"].build(opened, torch.float32).module(latent)
        reference = AutoencoderKL.from_pretrained(other)
        pixels = reference.decode(latent / reference.config.scaling_factor).sample
    assert torch.allclose(mean, pixels.mean(dim=(1, 2, 3)), atol=1e-6)
    assert image.shape == (1, 10, 12, 3)


@pytest.mark.parametrize("form", ["folder", "file", "decoder"])
def test_a_tiny_autoencoder_for_previews(checkpoint: Path, tiny: Path, tmp_path: Path, form: str) -> None:
    """As diffusers writes it, and as TAESD is published: a decoder alone, whose first layer is the clamp."""
    path = tiny if form == "folder" else tiny / WEIGHTS
    if form == "decoder":
        stored = {name.removeprefix("decoder.layers."): t for name, t in load_file(path).items()}
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("encoder.")}
        path = tmp_path / "taesd_decoder.safetensors"
        moved = {f"{int(name.split('.')[0]) + 1}.{name.partition('.')[2]}": t for name, t in stored.items()}
        save_file(moved, path)
    opened = Checkpoint.open(checkpoint, tiny_vae=path)
    latent = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        image, mean = NETS["preview_decoder"].build(opened, torch.float32).module(latent)
        wanted = AutoencoderTiny.from_pretrained(tiny).decode(latent).sample
    assert torch.allclose(mean, wanted.mean(dim=(1, 2, 3)), atol=1e-6)
    assert image.shape == (2, 6, 10, 3)


def test_a_tiny_autoencoder_in_place_of_the_checkpoints(checkpoint: Path, tiny: Path) -> None:
    opened = Checkpoint.open(checkpoint, vae=tiny / WEIGHTS)
    assert [item.name for item in NETS["vae_encoder"].build(opened, torch.float32).spec.outputs] == ["mean"]


def test_a_decoder_alone_cannot_take_that_place(checkpoint: Path, tiny: Path, tmp_path: Path) -> None:
    tensors = {name: t for name, t in load_file(tiny / WEIGHTS).items() if name.startswith("decoder.")}
    save_file(tensors, tmp_path / "decoder.safetensors")
    with pytest.raises(CheckpointError, match=r"has a decoder and no encoder.*--tiny-vae"):
        Checkpoint.open(checkpoint, vae=tmp_path / "decoder.safetensors")


def test_a_full_autoencoder_is_not_tiny(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a full autoencoder; expected a tiny one"):
        Checkpoint.open(checkpoint, tiny_vae=checkpoint / "vae")


def test_other_kinds_of_autoencoders(checkpoint: Path, tmp_path: Path) -> None:
    folder = make_tiny_vae(tmp_path / "vq")
    (folder / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(CheckpointError, match="holds a VQModel"):
        Checkpoint.open(checkpoint, vae=folder)


def test_latents_of_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint(RECIPES["tiny2"], tmp_path / "other") / "vae"
    with pytest.raises(CheckpointError, match=r"4 channels, 4 pixels a cell; expected 4 channels and 2"):
        Checkpoint.open(checkpoint, vae=other)
    tiny = make_tiny_vae(tmp_path / "taesd")
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    with pytest.raises(CheckpointError, match=r"latents of 16 channels, 2 pixels a cell"):
        Checkpoint.open(checkpoint, tiny_vae=tiny)


def test_a_pickled_autoencoder(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "taesd_decoder.pth"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="is a pickle"):
        Checkpoint.open(checkpoint, tiny_vae=path)
