"""The image encoder of an IP-Adapter: no file of an adapter has it, and it is found beside the file.

As they were published (h94/IP-Adapter), `models/` has the adapters of 1.x and `models/image_encoder/` ViT-H;
`sdxl_models/` and `sdxl_models/image_encoder/`, ViT-bigG, are for XL, whose "vit-h" adapters read the former.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError
from ..files.component import TRANSFORMERS, Component, read_component, read_headers, read_json
from ..files.configs import check_config
from ..files.derived_configs import CLIP_PROCESSOR, vision_config
from .control_file import VISION, ControlFile

_OPENAIS = 1024  # the width of OpenAI's ViT-L, which has an activation of its own
_FOLDER = "image_encoder"
_PROCESSOR = "preprocessor_config.json"


def with_image_encoder(adapter: ControlFile, path: Path | None, *, prefer_fp16: bool = False) -> ControlFile:
    """An IP-Adapter with the encoder that it reads pictures through.

    Args:
        adapter: whose projection says how wide the encoder's features are.
        path: the encoder's folder in transformers' layout, or its `.safetensors` file; None is where
            published adapters have it.
        prefer_fp16: take a folder's `.fp16.safetensors` where both are there.

    Raises:
        CheckpointError: it is missing or damaged, or its features have another width.
    """
    wanted = _width(adapter)
    places = _places(adapter.root) if path is None else [path]
    seen: list[str] = []
    for place in places:
        if place.exists():
            encoder, processor = _read(place, prefer_fp16=prefer_fp16)
            width = _feature_width(encoder, adapter.image_features)
            if width == wanted:
                return replace(adapter, encoder=encoder, processor=processor)
            seen.append(f"{place} has {width} numbers")
    raise CheckpointError(
        f"{adapter.root} needs an image encoder: {'; '.join(seen) or f'there is none at {places[0]}'}",
        expected=f"a CLIPVisionModelWithProjection whose {adapter.image_features} have {wanted} numbers",
        fix="Put its folder beside the file, called image_encoder, or pass it: --image-encoder FOLDER",
    )


def _places(root: Path) -> list[Path]:
    """Where published adapters have their encoder, the nearest first."""
    beside = root.parent
    return [beside / _FOLDER, beside.parent / _FOLDER, beside.parent / "models" / _FOLDER]


def _width(adapter: ControlFile) -> int:
    config = adapter.part.config
    return int(config.get("embed_dims") or config["image_embed_dim"])


def _feature_width(encoder: Component, features: str) -> int:
    fields = {"image_embeds": ("projection_dim", 512), "hidden_states": ("hidden_size", 768)}
    name, default = fields[features]  # CLIPVisionConfig's
    return int(encoder.config.get(name, default))


def _read(place: Path, *, prefer_fp16: bool) -> tuple[Component, Mapping[str, Any]]:
    """The encoder, and how pictures are made ready for it."""
    if place.is_file():
        tensors = read_headers(place)
        config = vision_config(tensors, hidden_act="gelu")
        if config["hidden_size"] == _OPENAIS:
            config["hidden_act"] = "quick_gelu"
        return Component(name=VISION, folder=place, config=config, tensors=tensors), _usual(config)
    part = read_component(place, VISION, TRANSFORMERS, prefer_fp16=prefer_fp16)
    check_config(part.config, place / "config.json", "image_encoder")
    own: Mapping[str, Any] = {}
    if (place / _PROCESSOR).is_file():
        own = read_json(place / _PROCESSOR)
        check_config(own, place / _PROCESSOR, "feature_extractor")
    return part, {**_usual(part.config), **own}


def _usual(config: Mapping[str, Any]) -> dict[str, Any]:
    """What CLIP's processor does for an encoder that sees pictures of this size, as diffusers makes it."""
    side = int(config.get("image_size", 224))
    return {**CLIP_PROCESSOR, "size": side, "crop_size": side}
