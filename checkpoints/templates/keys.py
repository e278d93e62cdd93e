"""What decides a net's graph: a key, made of a checkpoint's configs and compared with those of templates.

A key has each field that the part's class takes, but for those that change nothing in a graph or that the
names and shapes of tensors tell as well; a field the class does not take is one that its library ignores.
Tensors are compared as a whole, by a digest: they tell apart what the key does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

from ...engines import spec
from ..files.component import Component
from ..files.net_reads import net_facts
from ..files.open import TINY, is_tiny
from ..files.source import Source

Key = Mapping[str, Any]
# A class of parts -> its fields, and what stands for those that a config leaves out.
Defaults = Mapping[str, Mapping[str, Any]]

# A net -> the net whose graphs it has.
_SAME_NET = {"preview_decoder": "vae_decoder"}

# The parts of controls -> the class where a config does not name it.
_OF_CONTROLS = {"controlnet": "ControlNetModel", "t2i-adapter": "T2IAdapter", "ip-adapter": "ImageProjection"}
_TRAINING = "acts in training alone"
_CLIP = {
    "attention_dropout": _TRAINING,
    "initializer_range": _TRAINING,
    "initializer_factor": _TRAINING,
}
_CLIP_TEXT = {**_CLIP, "bos_token_id": "is the tokenizer's", "pad_token_id": "is the tokenizer's"}
_CONTROLNET = {
    "upcast_attention": "is a pass over the graph (`precision.islands`)",
    "controlnet_conditioning_channel_order": "is done to the picture before",
    "global_pool_conditions": "is done to the outputs behind",
    "addition_embed_type_num_heads": "is read by an addition_embed_type that no template has",
}
# A class -> its fields that change nothing in a graph -> why.
INERT: Mapping[str, Mapping[str, str]] = {
    "UNet2DConditionModel": {
        "sample_size": "is the size of training; graphs take every size",
        "dropout": _TRAINING,
        "upcast_attention": "is a pass over the graph (`precision.islands`)",
        "mid_block_only_cross_attention": "is read by a middle block that no template has",
        "addition_embed_type_num_heads": "is read by an addition_embed_type that no template has",
    },
    "AutoencoderKL": {
        "sample_size": "is the size of training; graphs take every size",
        "force_upcast": "is of diffusers' pipelines; in graphs it is for islands",
    },
    "AutoencoderTiny": {
        "force_upcast": "is of diffusers' pipelines; in graphs it is for islands",
        "latent_magnitude": "is for showing latents as pictures",
        "latent_shift": "is for showing latents as pictures",
    },
    "CLIPTextModel": {
        **_CLIP_TEXT,
        "projection_dim": "is of a projection that the class does not have",
        "eos_token_id": "is of the pooled embedding, which is not read",
    },
    "CLIPTextModelWithProjection": _CLIP_TEXT,
    "CLIPVisionModelWithProjection": _CLIP,
    "StableUnCLIPImageNormalizer": {},
    "ControlNetModel": _CONTROLNET,
    "ControlNetUnionModel": {
        **_CONTROLNET,
        "num_trans_head": "is of attention to one token, whose weight is 1 in every head",
    },
    "T2IAdapter": {},
    "ImageProjection": {},
    "IPAdapterFullImageProjection": {},
    "IPAdapterPlusImageProjection": {},
}
# Fields with several spellings of one thing, which the names and shapes of tensors tell. Where there is no
# attention, any number stands.
_TOLD_BY_TENSORS: Mapping[str, tuple[str, ...]] = {
    "UNet2DConditionModel": (
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
        "projection_class_embeddings_input_dim",
    ),
    "ControlNetModel": ("transformer_layers_per_block", "projection_class_embeddings_input_dim"),
    "ControlNetUnionModel": (
        "transformer_layers_per_block",
        "projection_class_embeddings_input_dim",
        "num_trans_channel",
        "num_trans_layer",
        "num_proj_channel",
    ),
}
# Fields of which one value stands for one in each block.
_PER_BLOCK = ("attention_head_dim", "num_attention_heads", "layers_per_block", "only_cross_attention")
# What null means in fields that are no flags, where it means something else than that there is nothing.
_NULL: Mapping[str, object] = {"shift_factor": 0, "attention_type": "default"}


def net_key(source: Source, component: str, defaults: Defaults) -> dict[str, Any]:
    """The key of a component (a row of `export.nets.build.NETS`) of a checkpoint.

    Raises:
        CheckpointError: a fact beside the config is not as nets take it (`net_facts`).
    """
    part = source.parts[spec.NETS[component].part]
    kind = part_class(component, part)
    left_out = (*INERT[kind], *_TOLD_BY_TENSORS.get(kind, ()))
    fields = {
        name: _plain(name, part.config.get(name, default), default)
        for name, default in defaults[kind].items()
        if name not in left_out
    }
    return {
        "net": _SAME_NET.get(component, component),
        "class": kind,
        **net_facts(source, component),
        **fields,
    }


def part_class(component: str, part: Component) -> str:
    """The class of a part, as `export/nets/` makes it."""
    if component == "text_encoder":
        return "CLIPTextModel"
    if component == "text_encoder_2":
        return "CLIPTextModelWithProjection"
    if component in ("image_encoder", "image_features"):
        return "CLIPVisionModelWithProjection"
    if component == "image_noiser":
        return "StableUnCLIPImageNormalizer"
    if component == "unet":
        return "UNet2DConditionModel"
    if part.name in _OF_CONTROLS:
        return str(part.config.get("_class_name", _OF_CONTROLS[part.name]))
    return TINY if is_tiny(part) else "AutoencoderKL"


def differences(key: Key, other: Key) -> list[tuple[str, Any, Any]]:
    """The fields in which two keys differ, with both values; None stands for a field that is missing."""
    names = dict.fromkeys(chain(key, other))
    return [(name, key.get(name), other.get(name)) for name in names if key.get(name) != other.get(name)]


def tensors_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The hash of tensors' names and shapes, in any order."""
    listed = json.dumps([[name, list(shapes[name])] for name in sorted(shapes)], separators=(",", ":"))
    return hashlib.sha256(listed.encode()).hexdigest()


def _plain(name: str, value: Any, default: Any) -> Any:
    """A value as keys have it: lists for tuples, one value for equal ones, false for a flag that is null.

    Numbers need nothing: 1 equals 1.0 in Python, and in a JSON file that was read.
    """
    if isinstance(value, list | tuple):
        items = [_plain(name, item, None) for item in cast(list[Any], value)]
        return items[0] if name in _PER_BLOCK and items and all(item == items[0] for item in items) else items
    if value is None:
        return False if isinstance(default, bool) else _NULL.get(name)
    return value
