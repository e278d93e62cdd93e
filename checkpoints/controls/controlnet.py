"""ControlNets: the names of their tensors, and their configs.

Their files have the names of diffusers or of the code that trained the first of them (lllyasviel's `cldm`),
with `control_model.` in front where a whole checkpoint lay beside them. Names and options are those of
diffusers 0.42: `ControlNetModel`, `ControlNetUnionModel`, and `loaders/single_file_utils.py`.

No tensor says how many channels an attention head has, whether the residuals are pooled or which order the
colours have: as in the published configs, 1.x has eight heads at every width and the others 64 channels a
head, pictures are RGB, and only "shuffle" pools.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError
from ..files.component import Component, TensorHeader
from ..files.configs import check_config
from ..files.ldm_names import Tensors, unet_tensors
from ..files.leftovers import unused_tensors
from .control_file import CONTROL_TYPES, CONTROLNET, ControlFile
from .controlnet_shapes import UNION, controlnet_shapes
from .stored import Stored, once

PREFIX = "control_model."
_PUBLISHED = "Take the published file."
# Tensors that say how the others are meant.
_MARKERS = {"difference": "difference", "lora_controlnet": "lora"}
_HEAD = 64  # channels of an attention head in 2.x and XL
_ID = 256  # numbers that each size id becomes in XL
_IDS = 6
_CONTEXTS = {768: "sd1", 1024: "sd2"}
_XL_CONTEXT = 2048

# The defaults of ControlNetModel, for configs that leave out what was added later.
_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 4,
    "conditioning_channels": 3,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "projection_class_embeddings_input_dim": None,
    "controlnet_conditioning_channel_order": "rgb",
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "global_pool_conditions": False,
    "addition_embed_type_num_heads": 64,
}
_PLAIN_DEFAULTS = {**_DEFAULTS, "mid_block_type": "UNetMidBlock2DCrossAttn"}
_UNION_DEFAULTS = {
    **_DEFAULTS,
    "conditioning_embedding_out_channels": [48, 96, 192, 384],
    "num_control_type": 6,
    "num_trans_channel": 320,
    "num_trans_head": 8,
    "num_trans_layer": 1,
    "num_proj_channel": 320,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ControlNetModel": _PLAIN_DEFAULTS,
    "ControlNetUnionModel": _UNION_DEFAULTS,
}
# Options of the class that no ControlNet of these families uses -> the values that are read.
_READ: Mapping[str, tuple[Any, ...]] = {
    "only_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
}


def read_controlnet(path: Path, tensors: Tensors, config: Mapping[str, Any] | None) -> ControlFile:
    """A ControlNet of these tensors.

    Args:
        path: the file or folder.
        tensors: by the file's names.
        config: the folder's; None derives one from names and shapes.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a shape that the others contradict; the config
            has values that no ControlNet has.
    """
    needs_base = next((need for marker, need in _MARKERS.items() if marker in tensors), "")
    own = {name: header for name, header in tensors.items() if name not in _MARKERS}
    notes: tuple[str, ...] = ()
    if any(name.startswith(PREFIX) for name in own):
        notes = unused_tensors(name for name in own if not name.startswith(PREFIX))
        own = {name.removeprefix(PREFIX): own[name] for name in own if name.startswith(PREFIX)}
    if not any(name.startswith("down_blocks.") for name in own):
        own = once(path, _renamed(own))
    union = UNION in own
    stored = Stored(path=path, what=_what(needs_base, union), tensors=own)
    whole = _paired(stored) if needs_base == "lora" else stored
    found = _derived(whole) if config is None else _completed(path, config, whole)
    whole.check(
        controlnet_shapes(found),
        lambda name: needs_base == "lora" and is_unets(name),
    )
    if config is None and _is_shuffle(path):
        found["global_pool_conditions"] = True
        notes = (*notes, "it is called shuffle, so its residuals are averaged over the picture")
    if found["addition_embed_type"] is not None and found["addition_time_embed_dim"] is None:
        notes = (*notes, "it does not say how wide its size ids are: as its checkpoint's")
    return ControlFile(
        root=path,
        kind=CONTROLNET,
        family=_family(found),
        what=stored.what,
        part=Component(name=CONTROLNET, folder=path, config=found, tensors=own),
        needs_base=needs_base,
        channel_order=str(found["controlnet_conditioning_channel_order"]),
        global_pool=bool(found["global_pool_conditions"]),
        control_types=CONTROL_TYPES[: found.get("num_control_type", 0)],
        notes=notes,
    )


def is_unets(name: str) -> bool:
    """Whether a ControlNet has a tensor because the UNet that it copies has it."""
    return re.match(r"(conv_in|time_embedding|add_embedding|down_blocks|mid_block)\.", name) is not None


def _what(needs_base: str, union: bool) -> str:
    if needs_base == "lora":
        return "a control-LoRA"
    return f"a ControlNet{' (Union)' * union}{' (difference)' * (needs_base == 'difference')}"


def _is_shuffle(path: Path) -> bool:
    """Whether a file is called after the one published ControlNet that pools: ComfyUI decides it so, too."""
    return re.search(r"(?<![a-z])shuffle(?![a-z])", path.stem.lower()) is not None


def _family(config: Mapping[str, Any]) -> str:
    """What a ControlNet is made for; where the width of its context is nobody's, by its projections."""
    if config["addition_embed_type"] is not None:
        return "sdxl"
    by_structure = "sd2" if config["use_linear_projection"] else "sd1"
    return _CONTEXTS.get(config["cross_attention_dim"], by_structure)


# What `cldm` has besides the modules of a UNet -> their names in diffusers.
_OWN = {
    r"zero_convs\.(\d{1,3})\.0": r"controlnet_down_blocks.\1",
    r"middle_block_out\.0": "controlnet_mid_block",
}
_HINT = "input_hint_block."


def _renamed(stored: Tensors) -> Iterator[tuple[str, TensorHeader]]:
    """Tensors of `cldm` by ControlNetModel's names. Unknown ones keep theirs."""
    ends = {name: name.rpartition(".") for name in stored}
    modules = {module: stored[name] for name, (module, _, _) in ends.items()}
    as_weights = {f"{module}.weight": replace(header, name=module) for module, header in modules.items()}
    names = {header.name: new.removesuffix(".weight") for new, header in unet_tensors(as_weights).items()}
    names |= _hint_names(modules)
    for module in modules:
        for pattern, new in _OWN.items():
            if re.fullmatch(pattern, module):
                names[module] = re.sub(pattern, new, module)
    for name, (module, _, end) in ends.items():
        yield f"{names[module]}.{end}" if module in names else name, stored[name]


def _hint_names(modules: Mapping[str, object]) -> dict[str, str]:
    """The convolutions that read the picture: every second place of a torch Sequential is one."""
    found = [name.removeprefix(_HINT) for name in modules if name.startswith(_HINT)]
    places = sorted(int(place) for place in found if re.fullmatch(r"\d{1,3}", place))
    new = ["conv_in", *(f"blocks.{index}" for index in range(len(places) - 2)), "conv_out"]
    pairs = zip(places, new, strict=False)
    return {f"{_HINT}{place}": f"controlnet_cond_embedding.{name}" for place, name in pairs}


def _paired(stored: Stored) -> Stored:
    """A control-LoRA's tensors as if each pair were the weight that it changes.

    Raises:
        CheckpointError: one of a pair is missing, the two do not fit, or the weight is there as well.
    """
    whole = {name: header for name, header in stored.tensors.items() if not name.endswith((".up", ".down"))}
    for module in {name.rpartition(".")[0] for name in stored.tensors.keys() - whole.keys()}:
        pair = [stored.tensors.get(f"{module}.{end}") for end in ("up", "down")]
        shapes: list[tuple[int, ...]] = [header.shape if header else () for header in pair]
        up, down = shapes
        fits = len(up) == len(down) > 1 and up[1] == down[0] and set(up[2:]) <= {1}
        if pair[0] is None or not fits or f"{module}.weight" in stored.tensors:
            raise stored.refused(
                f"has {module!r}.up {up or '(none)'} and .down {down or '(none)'}",
                "two tensors of one rank, (out, rank) and (rank, in), in place of a weight",
            )
        whole[f"{module}.weight"] = replace(pair[0], shape=(up[0], *down[1:]))
    return replace(stored, tensors=whole)


def _derived(stored: Stored) -> dict[str, Any]:
    """The config that a ControlNet's names and shapes say.

    Raises:
        CheckpointError: a tensor that says it is missing.
    """
    levels = max(stored.count("down_blocks."), 1)
    widths = [stored.shape(f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels)]
    union = UNION in stored.tensors
    hint = [*stored.shape("controlnet_cond_embedding.conv_in.weight", 4)[:2]]
    blocks = range(1, stored.count("controlnet_cond_embedding.blocks."), 2)
    through = [stored.shape(f"controlnet_cond_embedding.blocks.{i}.weight", 4)[0] for i in blocks]
    middle = "UNetMidBlock2D" + "CrossAttn" * stored.has("mid_block.attentions.")
    return {
        "_class_name": "ControlNetUnionModel" if union else "ControlNetModel",
        **(_UNION_DEFAULTS if union else {**_PLAIN_DEFAULTS, "mid_block_type": middle}),
        "in_channels": stored.shape("conv_in.weight", 4)[1],
        "conditioning_channels": hint[1],
        "conditioning_embedding_out_channels": [hint[0], *through],
        "block_out_channels": widths,
        "layers_per_block": stored.count("down_blocks.0.resnets."),
        **_derived_attention(stored, widths),
        **_derived_additions(stored),
        **(_derived_union(stored) if union else {}),
    }


def _derived_attention(stored: Stored, widths: Sequence[int]) -> dict[str, Any]:
    """Which levels attend, how deep, and to what.

    The smaller ControlNets of XL have transformers without blocks ("mid"), or none ("small").
    """
    places = [f"down_blocks.{level}.attentions.0" for level in range(len(widths))]
    attending = [place for place in (*places, "mid_block.attentions.0") if stored.has(f"{place}.")]
    depths = {place: stored.count(f"{place}.transformer_blocks.") for place in attending}
    context = next((place for place in attending if depths[place]), None)
    is_xl = stored.has("add_embedding.")
    entry = stored.tensors.get(f"{attending[0]}.proj_in.weight") if attending else None
    linear = is_xl if entry is None else len(entry.shape) == 2
    width = _XL_CONTEXT if is_xl else next(iter(_CONTEXTS))
    if context is not None:
        width = stored.shape(f"{context}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    each = [depths.get(place, 1) for place in places]
    each[-1] = depths.get("mid_block.attentions.0", each[-1])
    used = set(depths.values()) or {1}
    by_heads = not linear and not is_xl
    return {
        "down_block_types": [f"{'CrossAttn' * (place in depths)}DownBlock2D" for place in places],
        "transformer_layers_per_block": used.pop() if len(used) == 1 else each,
        "cross_attention_dim": width,
        "attention_head_dim": 8 if by_heads else [max(width // _HEAD, 1) for width in widths],
        "use_linear_projection": linear,
        "upcast_attention": linear and not is_xl,  # as in 2.x (`files.single_file`)
    }


def _derived_additions(stored: Stored) -> dict[str, Any]:
    """What joins the time embedding: of XL the pooled text embedding and six ids.

    How wide each id becomes is None where there is no room for the width that all published ones have. A
    Union's types become as wide, and say it.
    """
    found: dict[str, Any] = {}
    if stored.has("add_embedding."):
        added = stored.shape("add_embedding.linear_1.weight", 2)[1]
        found = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _ID if added > _IDS * _ID else None,
            "projection_class_embeddings_input_dim": added,
        }
    if UNION in stored.tensors:
        joined = stored.shape("control_add_embedding.linear_1.weight", 2)[1]
        found["addition_time_embed_dim"] = joined // stored.shape(UNION, 2)[0]
    return found


def _derived_union(stored: Stored) -> dict[str, Any]:
    types, width = stored.shape(UNION, 2)
    return {
        "num_control_type": types,
        "num_trans_channel": width,
        "num_trans_layer": stored.count("transformer_layes."),
        "num_proj_channel": stored.shape("spatial_ch_projs.weight", 2)[0],
    }


def _completed(path: Path, config: Mapping[str, Any], stored: Stored) -> dict[str, Any]:
    """A folder's config with the class' defaults for what it leaves out.

    The first Union was published under the class of a plain ControlNet, without the number of its types.

    Raises:
        CheckpointError: it has values of other types or ranges, or options that are not read.
    """
    file = path / "config.json"
    check_config(config, file, CONTROLNET)
    union = UNION in stored.tensors
    name = "ControlNetUnionModel" if union else "ControlNetModel"
    more = {"num_control_type": stored.shape(UNION, 2)[0]} if union else {}
    found: dict[str, Any] = {**DEFAULTS[name], **more, **config, "_class_name": name}
    for key, values in _READ.items():
        if key in found and found[key] not in values:
            raise CheckpointError(
                f"{file}: {key} is {found[key]!r:.80}",
                expected=" or ".join(map(repr, values)),
                fix="Use a ControlNet of Stable Diffusion 1.x, 2.x or XL.",
            )
    needed = ["addition_time_embed_dim"] * union
    if found["addition_embed_type"] is not None:
        needed = ["addition_time_embed_dim", "projection_class_embeddings_input_dim"]
    if lacking := [key for key in needed if found[key] is None]:
        raise CheckpointError(
            f"{file} has no {lacking[0]}", expected="a whole number, as its class needs", fix=_PUBLISHED
        )
    kinds: list[str] = found["down_block_types"]
    depths: int | list[int] = found["transformer_layers_per_block"]
    lengths = {len(kinds), len(kinds) if isinstance(depths, int) else len(depths)}
    if lengths != {len(found["block_out_channels"])}:
        raise CheckpointError(
            f"{file}: down_block_types and transformer_layers_per_block are of other lengths than"
            " block_out_channels",
            expected="one of each for every level",
            fix=_PUBLISHED,
        )
    return found
