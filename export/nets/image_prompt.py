"""IP-Adapter, in two nets: what it reads of a picture, and its keys and values for each cross-attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ...checkpoints.files.component import Component
from ...checkpoints.files.net_reads import reads_hidden_states, unread_vision
from ...checkpoints.files.source import Source
from ...engines import spec
from .clip import clip_settings
from .torch_net import Net, fill_buffers, load, make_net, spelled


class VisionEmbedding(nn.Module):
    """`CLIPVisionModelWithProjection` from transformers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, size, size), normalised -> (N, width)."""
        dtype = next(self.net.parameters()).dtype
        return cast(Any, self.net)(pixel_values.to(dtype)).image_embeds


class VisionPlaces(VisionEmbedding):
    """The same up to what enters its last layer: transformers' `hidden_states[-2]`."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, size, size), normalised -> (N, places, width)."""
        vision = cast(Any, self.net).vision_model
        dtype = next(self.net.parameters()).dtype
        found = vision.pre_layrnorm(vision.embeddings(pixel_values.to(dtype)))
        return vision.encoder(inputs_embeds=found).last_hidden_state


class ImagePrompt(nn.Module):
    """The image projection, and the projections to keys and values of each layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, …) -> (N, tokens, width) for the keys of each layer and its values."""
        net = cast(Any, self.net)
        tokens = net.image_projection(image_features)
        return tuple(
            projection(tokens) for layer in net.layers for projection in (layer.to_k_ip, layer.to_v_ip)
        )


class _Layer(nn.Module):
    """As `IPAdapterAttnProcessor2_0` has them."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context, width, bias=False)
        self.to_v_ip = nn.Linear(context, width, bias=False)


class _Adapter(nn.Module):
    """The names of `ControlFile.part`."""

    def __init__(self, projection: nn.Module, context: int, widths: list[int]) -> None:
        super().__init__()
        self.image_projection = projection
        self.layers = nn.ModuleList([_Layer(context, width) for width in widths])


def image_features(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """What an IP-Adapter reads of a picture: its embedding, or the hidden states before the last layer."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**clip_settings(part))
    with torch.device("meta"):
        net: Any = CLIPVisionModelWithProjection(config)
    fill_buffers(net)
    size, patch = cast(int, config.image_size), cast(int, config.patch_size)
    shape, kind = (config.projection_dim,), VisionEmbedding
    unread = unread_vision(checkpoint, part)
    if reads_hidden_states(checkpoint):
        shape, kind = ((size // patch) ** 2 + 1, config.hidden_size), VisionPlaces
        del net.visual_projection, net.vision_model.post_layernorm
        net.vision_model.encoder.layers = net.vision_model.encoder.layers[:-1]
    contract = spec.image_features(size=size, shape=shape, float_dtype=spelled(dtype))
    return make_net(kind(net), contract, load(part, net, dtype, ignored=unread), dtype)


def image_prompt(checkpoint: Source, part: Component, dtype: torch.dtype) -> Net:
    """Keys and values of a picture."""
    import diffusers.models.embeddings as embeddings

    config = dict(part.config)
    widths: list[int] = config.pop("layer_widths")
    kind = getattr(embeddings, config.pop("_class_name"))
    with torch.device("meta"):
        projection: nn.Module = kind(**config)
        net = _Adapter(projection, int(config.get("cross_attention_dim") or config["output_dims"]), widths)
    shape: tuple[spec.Dim, ...]
    tokens: spec.Dim
    if "num_image_text_embeds" in config:
        shape, tokens = (config["image_embed_dim"],), config["num_image_text_embeds"]
    elif "num_queries" in config:
        shape, tokens = ("I", config["embed_dims"]), config["num_queries"]
    else:
        shape, tokens = ("I", config["image_embed_dim"]), "I"
    contract = spec.image_prompt(shape=shape, tokens=tokens, widths=widths, float_dtype=spelled(dtype))
    return make_net(ImagePrompt(net), contract, load(part, net, dtype), dtype)
