"""Random-weight checkpoints in diffusers' layout: tiny ones of odd shapes for tests, and full-size ones.

    python -m latentrt.benchmarks.checkpoints sd15 /somewhere/sd15        # 2.1 GB, fp16
    python -m latentrt.benchmarks.checkpoints sd21 /somewhere/sd21        # 2.6 GB, fp16

Weights have the scale of torch's default initialisation, so activations stay finite.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
SAFETENSORS = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The configs of one checkpoint."""

    unet: Mapping[str, Any]
    text: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: SCHEDULER)


def _unet(channels: tuple[int, ...], **more: Any) -> dict[str, Any]:
    count = len(channels)
    return {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": channels,
        "down_block_types": ("CrossAttnDownBlock2D",) * (count - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (count - 1),
        **more,
    }


def _vae(channels: tuple[int, ...], **more: Any) -> dict[str, Any]:
    count = len(channels)
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "latent_channels": 4,
        **more,
    }


def _text(width: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "projection_dim": width,
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModel"],
        **more,
    }


_SD_VAE = _vae((128, 256, 512, 512), layers_per_block=2, sample_size=512, scaling_factor=0.18215)
_TINY_TEXT = {"vocab_size": 700, "bos_token_id": 698, "eos_token_id": 699}

RECIPES: Mapping[str, Recipe] = {
    "sd15": Recipe(
        unet=_unet((320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, sample_size=64),
        text=_text(768, 12, 12, hidden_act="quick_gelu"),
        vae=_SD_VAE,
    ),
    "sd21": Recipe(
        unet=_unet(
            (320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            sample_size=96,
            use_linear_projection=True,
            upcast_attention=True,
        ),
        text=_text(1024, 16, 23, hidden_act="gelu", projection_dim=512),
        vae={**_SD_VAE, "sample_size": 768},
        scheduler={**SCHEDULER, "prediction_type": "v_prediction"},
    ),
    # Like 1.x: convolutional projections, one head count for all blocks, three heads of 16 to 32.
    "tiny1": Recipe(
        unet=_unet(
            (48, 96),
            cross_attention_dim=80,
            attention_head_dim=3,
            sample_size=8,
            layers_per_block=1,
            norm_num_groups=6,
        ),
        text=_text(80, 5, 2, hidden_act="quick_gelu", **_TINY_TEXT),
        vae=_vae((16, 32), layers_per_block=1, norm_num_groups=4, sample_size=16),
    ),
    # Like 2.x: linear projections, heads by block, upcast attention, v-prediction; three levels.
    "tiny2": Recipe(
        unet=_unet(
            (32, 48, 48),
            cross_attention_dim=64,
            attention_head_dim=[2, 3, 1],
            sample_size=[12, 8],
            layers_per_block=1,
            norm_num_groups=8,
            use_linear_projection=True,
            upcast_attention=True,
        ),
        text=_text(64, 4, 1, hidden_act="gelu", **_TINY_TEXT),
        vae=_vae((16, 16, 32), layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=0.5),
        scheduler={**SCHEDULER, "prediction_type": "v_prediction"},
    ),
}


def _init(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """As torch initialises: uniform within 1/sqrt(fan-in); norms near the identity; embeddings as CLIP's."""
    if "embedding.weight" in name and "time_embedding" not in name:
        return torch.randn(shape, generator=generator) * 0.02
    if len(shape) == 1 and "norm" in name:
        base = 1.0 if name.endswith("weight") else 0.0
        return base + torch.randn(shape, generator=generator) * 0.05
    bound = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _save(path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, seed: int) -> None:
    """Write a safetensors file tensor by tensor: a full-size UNet never is in memory."""
    size = torch.finfo(dtype).bits // 8
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + shape.numel() * size
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = _init(name, tuple(shape), generator).to(dtype)
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def _parts(recipe: Recipe) -> Iterator[tuple[str, str, nn.Module, dict[str, Any]]]:
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**recipe.text))
        unet = UNet2DConditionModel(**recipe.unet)
        vae = AutoencoderKL(**recipe.vae)
    yield "text_encoder", "model", text, dict(recipe.text)
    for name, net in (("unet", unet), ("vae", vae)):
        config = {"_class_name": type(net).__name__, **dict(net.config)}
        yield name, "diffusion_pytorch_model", net, config


def make_checkpoint(
    recipe: Recipe, root: Path, *, dtype: torch.dtype = torch.float16, seed: int = 0, old_names: bool = True
) -> Path:
    """Write the folder. `old_names`: the text encoder's tensors as transformers before 5 named them."""
    root.mkdir(parents=True)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", recipe.scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    for number, (name, stem, net, config) in enumerate(_parts(recipe)):
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        prefix = "text_model." if name == "text_encoder" and old_names else ""
        shapes = {prefix + key: value.shape for key, value in net.state_dict().items()}
        _save(folder / f"{stem}.safetensors", shapes, dtype, seed * 10 + number)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(recipe.scheduler)))
    _tokenizer(root / "tokenizer", recipe.text["vocab_size"])
    return root


def _tokenizer(folder: Path, size: int) -> None:
    """Byte-level vocabulary in CLIP's form, of CLIP's size; merges are made up but valid."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in visible] + [chr(256 + code) for code in range(256 - len(visible))]
    vocabulary = (letters + [letter + "</w>" for letter in letters])[: size - 2]
    merges: list[str] = []
    for first in letters:
        for second in letters:
            if len(vocabulary) == size - 2:
                break
            merges.append(f"{first} {second}")
            vocabulary.append(first + second)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 77}))


def main() -> None:
    """Write one recipe's checkpoint into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="store float32 weights")
    options = parser.parse_args()
    dtype = torch.float32 if options.fp32 else torch.float16
    make_checkpoint(RECIPES[options.recipe], options.folder, dtype=dtype, seed=options.seed)


if __name__ == "__main__":
    main()
