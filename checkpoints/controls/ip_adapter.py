"""IP-Adapters: their names, what they read of a picture, and the layers of a UNet that they belong to.

A file has an image projection (`image_proj.`) and keys and values for each cross-attention
(`ip_adapter.N.to_k_ip.weight`, N odd; community files say `adapter_modules.`). Projections and their names in
diffusers are those of `loaders/unet.py`, `_convert_ip_adapter_image_proj_to_diffusers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...engines.spec import attention_level
from ..files.component import Component, TensorHeader
from ..files.ldm_names import Tensors
from .control_file import IP_ADAPTER, ControlFile
from .cross_attentions import cross_attentions
from .stored import Stored, layer, once

_PROJECTION, _LAYERS = "image_projection.", "layers."
_CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_HEAD = 64  # channels of a head in the resampler
_PLACES = 257  # hidden states of a picture in ViT-H and ViT-bigG: 16 x 16 patches, and the class
_FACE = 512  # numbers of a face's embedding (insightface)
# UNets by what `cross_attentions` reads of their configs.
_UNETS: Mapping[str, Mapping[str, Any]] = {
    "sd": {
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
    "sdxl": {
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
    },
}


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """How a picture becomes tokens.

    Attributes:
        mark: a tensor that only this kind has, by the file's name.
        what: the adapter, for people.
        features: as in `ControlFile.image_features`.
        names: patterns of the file's names -> diffusers' names.
        config: from the tensors, the arguments of diffusers' class, and its name.
        shapes: of all tensors, by the config.
        tokens: by the config.
    """

    mark: str
    what: str
    features: str
    names: Mapping[str, str]
    config: Callable[[Stored], dict[str, Any]]
    shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]
    tokens: Callable[[Mapping[str, Any]], int]


def _plain_config(stored: Stored) -> dict[str, Any]:
    rows, width = stored.shape(f"{_PROJECTION}image_embeds.weight", 2)
    context = stored.shape(f"{_PROJECTION}norm.weight", 1)[0]
    return {
        "_class_name": "ImageProjection",
        "image_embed_dim": width,
        "cross_attention_dim": context,
        "num_image_text_embeds": rows // context,
    }


def _plain_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    context = int(config["cross_attention_dim"])
    rows = context * int(config["num_image_text_embeds"])
    return layer("image_embeds", rows, int(config["image_embed_dim"])) | layer("norm", context)


def _full_config(stored: Stored) -> dict[str, Any]:
    return {
        "_class_name": "IPAdapterFullImageProjection",
        "image_embed_dim": stored.shape(f"{_PROJECTION}ff.net.0.proj.weight", 2)[1],
        "cross_attention_dim": stored.shape(f"{_PROJECTION}norm.weight", 1)[0],
    }


def _full_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    context, width = int(config["cross_attention_dim"]), int(config["image_embed_dim"])
    return {
        **layer("ff.net.0.proj", width, width),
        **layer("ff.net.2", context, width),
        **layer("norm", context),
    }


def _plus_config(stored: Stored) -> dict[str, Any]:
    _, queries, hidden = stored.shape(f"{_PROJECTION}latents", 3)
    inner = stored.shape(f"{_PROJECTION}layers.0.attn.to_q.weight", 2)[0]
    wide = stored.shape(f"{_PROJECTION}layers.0.ff.1.net.0.proj.weight", 2)[0]
    return {
        "_class_name": "IPAdapterPlusImageProjection",
        "embed_dims": stored.shape(f"{_PROJECTION}proj_in.weight", 2)[1],
        "output_dims": stored.shape(f"{_PROJECTION}proj_out.weight", 2)[0],
        "hidden_dims": hidden,
        "depth": stored.count(f"{_PROJECTION}layers."),
        "dim_head": _HEAD,
        "heads": inner // _HEAD,
        "num_queries": queries,
        "ffn_ratio": wide // hidden,
    }


def _plus_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, context = int(config["hidden_dims"]), int(config["output_dims"])
    inner, wide = _HEAD * int(config["heads"]), hidden * int(config["ffn_ratio"])
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, int(config["num_queries"]), hidden),
        **layer("proj_in", hidden, int(config["embed_dims"])),
        **layer("proj_out", context, hidden),
        **layer("norm_out", context),
    }
    for index in range(int(config["depth"])):
        place = f"layers.{index}"
        shapes |= (
            layer(f"{place}.ln0", hidden) | layer(f"{place}.ln1", hidden) | layer(f"{place}.ff.0", hidden)
        )
        shapes |= {f"{place}.attn.to_{name}.weight": (inner, hidden) for name in "qkv"}
        shapes |= {
            f"{place}.attn.to_out.0.weight": (hidden, inner),
            f"{place}.ff.1.net.0.proj.weight": (wide, hidden),
            f"{place}.ff.1.net.2.weight": (hidden, wide),
        }
    return shapes


_PROJECTIONS = (
    _Projection(
        mark="proj.weight",
        what="an IP-Adapter",
        features="image_embeds",
        names={r"proj\.": "image_embeds."},
        config=_plain_config,
        shapes=_plain_shapes,
        tokens=lambda config: int(config["num_image_text_embeds"]),
    ),
    _Projection(
        mark="proj.3.weight",
        what="an IP-Adapter (Full)",
        features="hidden_states",
        names={r"proj\.0\.": "ff.net.0.proj.", r"proj\.2\.": "ff.net.2.", r"proj\.3\.": "norm."},
        config=_full_config,
        shapes=_full_shapes,
        tokens=lambda config: _PLACES,
    ),
    _Projection(
        mark="latents",
        what="an IP-Adapter (Plus)",
        features="hidden_states",
        names={
            r"(layers\.\d{1,3}\.)0\.norm1\.": r"\1ln0.",
            r"(layers\.\d{1,3}\.)0\.norm2\.": r"\1ln1.",
            r"(layers\.\d{1,3}\.)0\.to_out\.": r"\1attn.to_out.0.",
            r"(layers\.\d{1,3}\.)0\.to_": r"\1attn.to_",
            r"(layers\.\d{1,3}\.)1\.0\.": r"\1ff.0.",
            r"(layers\.\d{1,3}\.)1\.1\.": r"\1ff.1.net.0.proj.",
            r"(layers\.\d{1,3}\.)1\.3\.": r"\1ff.1.net.2.",
        },
        config=_plus_config,
        shapes=_plus_shapes,
        tokens=lambda config: int(config["num_queries"]),
    ),
)


def read_ip_adapter(path: Path, tensors: Tensors, config: Mapping[str, Any] | None = None) -> ControlFile:
    """An IP-Adapter of these tensors. No folder has a config of one.

    Raises:
        CheckpointError: the projection is of no kind that is known; a tensor is missing, unknown, or of a
            shape that the others contradict.
    """
    del config
    usual = once(path, ((_usual(name), header) for name, header in tensors.items()))
    stored = Stored(path=path, what="an IP-Adapter", tensors=usual)
    kind = next((one for one in _PROJECTIONS if f"image_proj.{one.mark}" in usual), None)
    if kind is None:
        marks = ", ".join(f"image_proj.{one.mark}" for one in _PROJECTIONS)
        raise stored.refused("has no image projection that is known", f"one of {marks}")
    stored = Stored(path=path, what=kind.what, tensors=once(path, _renamed(usual, kind)))
    found = kind.config(stored)
    context = int(found.get("output_dims") or found["cross_attention_dim"])
    if found.get("embed_dims") == _FACE:
        raise stored.refused(
            f"reads embeddings of faces, {_FACE} numbers each (InstantID)", "features of an image encoder"
        )
    count = stored.count(_LAYERS)
    widths = [stored.shape(f"{_LAYERS}{index}.to_k_ip.weight", 2)[0] for index in range(count)]
    names = [f"{_LAYERS}{index}.to_{letter}_ip.weight" for index in range(count or 1) for letter in "kv"]
    wanted = {f"{_PROJECTION}{name}": shape for name, shape in kind.shapes(found).items()}
    stored.check(wanted | {name: (widths[i // 2] if widths else 0, context) for i, name in enumerate(names)})
    by_unet = {len(layers := cross_attentions(unet)): (name, layers) for name, unet in _UNETS.items()}
    unet, layers = by_unet.get(count, ("", ()))
    _check_widths(stored, widths, unet, layers)
    return ControlFile(
        root=path,
        kind=IP_ADAPTER,
        family=_CONTEXTS.get(context, "sdxl" if unet == "sdxl" else "sd1"),
        what=kind.what,
        part=Component(
            name=IP_ADAPTER,
            folder=path,
            config={**found, "layer_widths": widths},
            tensors=stored.tensors,
        ),
        tokens=kind.tokens(found),
        image_features=kind.features,
        layers=layers,
    )


def _usual(name: str) -> str:
    """The name that the files of IP-Adapter's authors have."""
    return re.sub(r"^image_proj_model\.", "image_proj.", re.sub(r"^adapter_modules\.", "ip_adapter.", name))


def _renamed(stored: Tensors, kind: _Projection) -> Iterator[tuple[str, TensorHeader]]:
    """The tensors by the names of `ControlFile.part`. Unknown ones keep theirs."""
    for name, header in stored.items():
        match = re.fullmatch(r"ip_adapter\.(\d{1,4})\.(to_[kv]_ip\.weight)", name)
        if match and int(match[1]) % 2:  # the even ones are self-attention, and have nothing
            yield f"{_LAYERS}{int(match[1]) // 2}.{match[2]}", header
        elif name.startswith("image_proj."):
            yield from _projected(name.removeprefix("image_proj."), header, kind).items()
        else:
            yield name, header


def _projected(name: str, header: TensorHeader, kind: _Projection) -> dict[str, TensorHeader]:
    """A tensor of the projection; the resampler's keys and values lie below each other, (2 C, hidden)."""
    for pattern, new in kind.names.items():
        if re.match(pattern, name):
            name = re.sub(f"^{pattern}", new, name)
            break
    if not name.endswith(".to_kv.weight") or not header.shape:
        return {f"{_PROJECTION}{name}": header}
    rows = header.shape[0] // 2
    return {
        f"{_PROJECTION}{name.replace('to_kv', f'to_{letter}')}": replace(
            header, rows=(i * rows, (i + 1) * rows), shape=(rows, *header.shape[1:])
        )
        for i, letter in enumerate("kv")
    }


def _check_widths(stored: Stored, widths: list[int], unet: str, layers: tuple[str, ...]) -> None:
    """Raise CheckpointError where layers of one level have several widths: the order is another's."""
    seen: dict[int, int] = {}
    for index, (name, width) in enumerate(zip(layers, widths, strict=False)):
        level = attention_level(name, len(_UNETS[unet]["down_block_types"]))
        if seen.setdefault(level, width) != width:
            raise stored.refused(
                f"has {width} rows in layer {index}, and others of its level ({name}) have {seen[level]}",
                "the order of diffusers' attention processors: down, up, middle",
            )
