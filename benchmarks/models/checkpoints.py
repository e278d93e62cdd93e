"""Random-weight checkpoints in diffusers' layout.

    python -m latentrt.benchmarks.models.checkpoints sd15 /somewhere/sd15        # 2.1 GB, fp16
    python -m latentrt.benchmarks.models.checkpoints sd21 /somewhere/sd21        # 2.6 GB, fp16

Weights have the scale of torch's default initialisation, so activations stay finite.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ...engines.safetensors_format import write_file
from .recipes import RECIPES, Recipe

SAFETENSORS = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}


def _init(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """As torch initialises: uniform within 1/sqrt(fan-in); norms near the identity; embeddings as CLIP's."""
    if name in ("mean", "std"):  # of unCLIP's embeddings
        return torch.rand(shape, generator=generator) + (0.5 if name == "std" else -0.5)
    if "embedding.weight" in name and "time_embedding" not in name:
        return torch.randn(shape, generator=generator) * 0.02
    if len(shape) == 1 and "norm" in name:
        base = 1.0 if name.endswith("weight") else 0.0
        return base + torch.randn(shape, generator=generator) * 0.05
    bound = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


Part = tuple[str, str, nn.Module, dict[str, Any]]


def parts_of(recipe: Recipe) -> list[Part]:
    """Folder, stem of the weights file, module (without memory) and config of each part with weights."""
    encoders: dict[str, tuple[Any, Any]] = {
        "text_encoder": (CLIPTextModel, recipe.text),
        "text_encoder_2": (CLIPTextModelWithProjection, recipe.text_2),
    }
    with torch.device("meta"):
        nets = {"unet": UNet2DConditionModel(**recipe.unet), "vae": AutoencoderKL(**recipe.vae)}
        return [
            *(
                (name, "model", kind(CLIPTextConfig(**config)), dict(config))
                for name, (kind, config) in encoders.items()
                if config
            ),
            *((name, "diffusion_pytorch_model", net, config_of(net)) for name, net in nets.items()),
        ]


def config_of(net: Any) -> dict[str, Any]:
    """What diffusers writes as a module's config.json."""
    return {"_class_name": type(net).__name__, **dict(net.config)}


def make_checkpoint(
    recipe: Recipe,
    root: Path,
    *,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    old_names: bool = True,
    parts: Iterable[Part] | None = None,
) -> Path:
    """Write the folder, which must not exist yet.

    With `old_names` the text encoder's tensors are called as transformers before 5 named them. `parts` are
    `parts_of(recipe)` by default.
    """
    root.mkdir(parents=True)
    absent = ["text_encoder", "tokenizer", "feature_extractor", "image_encoder"]
    absent += [] if recipe.text_2 else ["safety_checker"]
    index: dict[str, Any] = {
        "_class_name": recipe.pipeline,
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", recipe.scheduler["_class_name"]],
        **{part: [None, None] for part in absent},
        **recipe.index,
    }
    for number, (name, stem, net, config) in enumerate(parts or parts_of(recipe)):
        library = "transformers" if stem == "model" else "diffusers"
        index[name] = [library, type(net).__name__]
        prefix = "text_model." if name == "text_encoder" and old_names else ""
        shapes = {prefix + key: value.shape for key, value in net.state_dict().items()}
        write_part(root / name, stem, config, shapes, dtype, seed * 10 + number)
    write_json(root / "scheduler" / "scheduler_config.json", recipe.scheduler)
    for name, config in (("tokenizer", recipe.text), ("tokenizer_2", recipe.text_2)):
        if config:
            index[name] = ["transformers", "CLIPTokenizer"]
            _tokenizer(root / name, config["vocab_size"], "!" if name == "tokenizer_2" else "<|endoftext|>")
    write_json(root / "model_index.json", index)
    return root


def write_part(
    folder: Path,
    stem: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Write the folder of one part: its config, and random tensors one by one, never all in memory."""
    generator = torch.Generator().manual_seed(seed)

    def content(name: str) -> bytes:
        tensor = _init(name, tuple(shapes[name]), generator).to(dtype)
        return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    entries = {name: (SAFETENSORS[dtype], shape) for name, shape in shapes.items()}
    write_file(folder / f"{stem}.safetensors", entries, content)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a config into a folder that may not be there yet."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(data)))


def _tokenizer(folder: Path, size: int, pad: str) -> None:
    """Byte-level vocabulary in CLIP's form, of CLIP's size; merges are made up but valid."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in visible] + [chr(256 + code) for code in range(256 - len(visible))]
    vocabulary = (letters + [letter + "</w>" for letter in letters])[: size - 2]
    pairs = list(islice(product(letters, repeat=2), size - 2 - len(vocabulary)))
    vocabulary += [*map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs)]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 77}))


def main() -> None:
    """Write one recipe's checkpoint into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    make_checkpoint(RECIPES[options.recipe], options.folder)


if __name__ == "__main__":
    main()
