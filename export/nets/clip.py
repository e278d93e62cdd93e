"""CLIP's nets: the text encoders, and unCLIP's image encoder and the noise on its embedding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.files.component import Component
from ...checkpoints.files.net_reads import TEXT_PREFIX, normalisation, package_text_name, unread_layers
from ...checkpoints.files.source import Source
from ...engines import spec
from ...engines.spec import Array
from .torch_net import Net, fill_buffers, load, make_net, spelled


def tokenize(folder: Path, texts: Sequence[str], length: int) -> Array:
    """`texts` as transformers' CLIPTokenizer reads them: (texts, length) int64, padded or cut to `length`."""
    from transformers import CLIPTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about files that only other tokenizers need
        tokenizer: Any = cast(Any, CLIPTokenizer).from_pretrained(str(folder))
    found = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    return found.input_ids


class ClipText(nn.Module):
    """`CLIPTextModel` or `CLIPTextModelWithProjection` from transformers, up to a chosen layer.

    The context of SD 1.x and 2.x is the last layer's output after the final norm; that of SDXL is the output
    of the layer before, without it. `clip_skip` goes back from there, as in diffusers' `encode_prompt`.
    """

    def __init__(self, net: nn.Module, layers: int, *, normalised: bool) -> None:
        super().__init__()
        self.net = net
        self.layers = layers
        self.normalised = normalised

    def forward(self, input_ids: torch.Tensor, clip_skip: torch.Tensor) -> Any:
        """(P, T) int32, (1,) int32 -> (P, T, width), and (P, pooled) where there is a projection.

        `clip_skip` is 0 ... layers - 1.
        """
        found = cast(Any, self.net)(input_ids, output_hidden_states=True)
        states = (
            found.hidden_states[-self.layers :] if self.normalised else found.hidden_states[: self.layers]
        )
        layer = self.layers - 1 - clip_skip.long()
        context = torch.stack(tuple(states)).index_select(0, layer).squeeze(0)
        if self.normalised:
            return _transformer(self.net).final_layer_norm(context)
        return (context, found.text_embeds) if "text_embeds" in found else context


def _transformer(net: nn.Module) -> Any:
    """The module with the layers: `net` itself, or within it (transformers before 5)."""
    return getattr(net, "text_model", net)


def text_encoder(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """OpenAI's ViT-L, OpenCLIP's ViT-H (SD 2.x), or its ViT-bigG (SDXL's second, with a pooled embedding)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projected = part.name == "text_encoder_2"
    normalised = not checkpoint.skips_last_layer
    config = CLIPTextConfig(**clip_settings(part))
    layers = config.num_hidden_layers
    unread = unread_layers(checkpoint, part)
    config.num_hidden_layers = layers - bool(unread)
    with torch.device("meta"):
        net: Any = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    fill_buffers(net)
    if unread:
        _transformer(net).final_layer_norm = nn.Identity()
    # Releases of transformers differ in the prefix, here and in the checkpoint. The package stores the names
    # of published checkpoints.
    bare = {name: name.removeprefix(TEXT_PREFIX) for name in net.state_dict()}
    names = {
        name: next((found for found in (TEXT_PREFIX + rest, rest) if found in part.tensors), name)
        for name, rest in bare.items()
    }
    ignored = (*unread, *(TEXT_PREFIX + name for name in unread))
    tensors = {
        name: (package_text_name(name), stored)
        for name, (_, stored) in load(part, net, dtype, names, ignored=ignored).items()
    }
    contract = spec.text_encoder(
        tokens=config.max_position_embeddings,
        width=config.hidden_size,
        pooled=config.projection_dim if projected else None,
        float_dtype=spelled(dtype),
    )
    return make_net(ClipText(net, layers, normalised=normalised), contract, tensors, dtype)


def clip_settings(part: Component) -> dict[str, Any]:
    """The config, with sdpa, which becomes the ONNX operator Attention; the eager form would not."""
    return {**part.config, "attn_implementation": "sdpa"}


class ImageEncoder(nn.Module):
    """`CLIPVisionModelWithProjection` behind its processor's rescaling and normalisation."""

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.mean = mean
        self.std = std

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, size, size, 3) uint8 -> (N, width)."""
        shades = image.float() / 255
        pixels = (shades - torch.tensor(self.mean)) / torch.tensor(self.std)
        dtype = next(self.net.parameters()).dtype
        return cast(Any, self.net)(pixels.permute(0, 3, 1, 2).to(dtype)).image_embeds


def image_encoder(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """unCLIP's image encoder (CLIP ViT-L or ViT-H)."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**clip_settings(part))
    with torch.device("meta"):
        net: Any = CLIPVisionModelWithProjection(config)
    fill_buffers(net)
    mean, std = normalisation(checkpoint.configs["feature_extractor"])
    contract = spec.image_encoder(
        size=cast(int, config.image_size), width=config.projection_dim, float_dtype=spelled(dtype)
    )
    return make_net(ImageEncoder(net, mean, std), contract, load(part, net, dtype), dtype)


class ImageNoiser(nn.Module):
    """`StableUnCLIPImg2ImgPipeline.noise_image_embeddings` of diffusers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        image_embeds: torch.Tensor,
        noise: torch.Tensor,
        noise_level: torch.Tensor,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        """(N, width), (N, width) float32, and (1,) float32 thrice -> (N, 2 * width) float32."""
        from diffusers.models.embeddings import get_timestep_embedding

        net = cast(Any, self.net)
        mean, std = net.mean.float(), net.std.float()
        noisy = alpha * ((image_embeds.float() - mean) / std) + sigma * noise
        level = get_timestep_embedding(
            noise_level, image_embeds.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return torch.cat([noisy * std + mean, level.expand(noisy.shape[0], -1)], dim=1)


class _Normalizer(nn.Module):
    """The two parameters of diffusers' `StableUnCLIPImageNormalizer`, whose own `to` would replace them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1, width))
        self.std = nn.Parameter(torch.ones(1, width))


def image_noiser(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """The net that puts noise on a picture's embedding and appends its level: unCLIP's class labels."""
    width = int(part.config.get("embedding_dim", 768))
    with torch.device("meta"):
        net = _Normalizer(width)
    contract = spec.image_noiser(width=width, float_dtype=spelled(dtype))
    return make_net(ImageNoiser(net), contract, load(part, net, dtype), dtype)
