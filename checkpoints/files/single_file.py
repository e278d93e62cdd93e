"""One-file checkpoints (`.safetensors`): recognised by names and shapes, and taken apart into components.

The result is what a diffusers folder of the same model would give: configs, and tensors by diffusers' names
that stay where they are in the file. The keys that tell families apart are those of diffusers'
`single_file_utils.py`.

No tensor says

- whether 2.x predicts the noise or v. The marker tensor `v_pred` and the metadata of trainers are believed.
  Without them v is assumed, except for inpainting, as in diffusers (whose configs are the 768-pixel 2.1's).
  2.x by generative-models' names is 2.1 Turbo, the one that was published so: it predicts the noise;
- the noise schedule. All families were trained with the same betas; the marker `ztsnr` rescales them.
  Markers of EDM's convention (CosXL, Playground 2.5) are refused: no sampler here starts at their sigmas;
- attention's precision in 2.x. 2.1 needs float32 scores and 2.0 is not harmed, so `upcast_attention` is on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, UsageError, command
from ...engines.safetensors_format import read_header
from ...engines.spec import TEXT_ENCODERS
from .component import Component, TensorHeader, read_headers, refuse_quantised
from .families import UNET, refuse_other_kinds, refuse_pickle
from .ldm_names import clip_tensors, open_clip_tensors, unet_tensors, vae_tensors

Tensors = Mapping[str, TensorHeader]
Naming = Callable[[Tensors], dict[str, TensorHeader]]

VAE = "first_stage_model."
_TEXT = "cond_stage_model."
_UNET_START = "input_blocks.0.0.weight"
PREDICTION_TYPES = ("epsilon", "v_prediction")
_SD_SCALING = 0.18215
_FIX = "Use the complete checkpoint; other tools also write files without text encoders or autoencoder."
# Under these keys tools note what the UNet predicts: Stability's ModelSpec (sd-scripts, OneTrainer), ComfyUI,
# others.
_NOTED = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type", "ss_v_parameterization")
_NOTED_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps", "false"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred", "vpred", "true"), "v_prediction"),
}
_MODELSPEC_2 = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
_CLIP_HEAD = 64  # channels of an attention head in ViT-L, ViT-H and ViT-bigG
_WHOLE = "Use a complete checkpoint of Stable Diffusion 1.x, 2.x or XL."
_ATTENTION_BLOCK = re.compile(r"(.+\.attentions\.\d{1,3})\.transformer_blocks\.(\d{1,3})\.")
_MIDDLE = "mid_block.attentions.0"
# What is equal in every published scheduler_config.json of 1.x, 2.x and XL. A key more would overrule the own
# default of a sampler that a request names: only XL's configs have a `timestep_spacing`.
_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A checkpoint in one file.

    Attributes:
        family: "sd1", "sd2", "sdxl" or "sdxl-refiner".
        components: "unet", "vae" (it may be missing where another takes its place), and the family's text
            encoders: "text_encoder", "text_encoder_2".
        scaling_factor: of the family's autoencoders.
        scheduler: what a folder would have as `scheduler_config.json`.
        tokenizers: a tokenizer's folder -> the token that fills short prompts. CLIP's vocabulary is implied.
        notes: for the user: what was assumed, and which weights are not used.
    """

    family: str
    components: Mapping[str, Component]
    scaling_factor: float
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Encoder:
    """Where a text encoder lies in a family's file, and what its tensors do not say."""

    prefix: str
    naming: Naming
    hidden_act: str
    pad_token: str
    projects: bool = False


@dataclass(frozen=True, kw_only=True)
class _Family:
    encoders: Mapping[str, _Encoder]
    scheduler: Mapping[str, Any]
    head_size: int | None = 64
    ids: int = 6
    sample_size: int = 64
    scaling_factor: float = _SD_SCALING
    unet: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _penultimate(stored: Tensors) -> dict[str, TensorHeader]:
    """Drop ViT-H's last layer: 2.x takes the context before it, so diffusers' config has 23 layers of 24."""
    last = "text_model.encoder.layers.23."
    return {
        name: tensor
        for name, tensor in open_clip_tensors(stored).items()
        if not name.startswith((last, "text_projection."))
    }


def _clip(prefix: str) -> _Encoder:
    """The place of a ViT-L."""
    return _Encoder(f"{prefix}.transformer.", clip_tensors, "quick_gelu", "<|endoftext|>")


def _open_clip(prefix: str, naming: Naming, *, projects: bool) -> _Encoder:
    """The place of a ViT-H or ViT-bigG. OpenCLIP fills short prompts with id 0, the token "!"."""
    return _Encoder(f"{prefix}.model.", naming, "gelu", "!", projects)


_xl = partial(
    _Family,
    scheduler={
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    sample_size=128,
    scaling_factor=0.13025,
)
_FAMILIES: Mapping[str, _Family] = {
    "sd1": _Family(
        encoders={"text_encoder": _clip("cond_stage_model")},
        scheduler={"_class_name": "PNDMScheduler"},
        head_size=None,
    ),
    "sd2": _Family(
        encoders={"text_encoder": _open_clip("cond_stage_model", _penultimate, projects=False)},
        scheduler={"_class_name": "DDIMScheduler"},
        unet={"upcast_attention": True},
    ),
    "sdxl": _xl(
        encoders={
            "text_encoder": _clip("conditioner.embedders.0"),
            "text_encoder_2": _open_clip("conditioner.embedders.1", open_clip_tensors, projects=True),
        }
    ),
    "sdxl-refiner": _xl(
        encoders={"text_encoder_2": _open_clip("conditioner.embedders.0", open_clip_tensors, projects=True)},
        ids=5,
    ),
}


def check_prediction_type(value: str | None) -> None:
    """Raise UsageError unless `value` is None or one of PREDICTION_TYPES."""
    if value not in (None, *PREDICTION_TYPES):
        raise UsageError(
            f"prediction_type is {value!r}",
            expected=" or ".join(PREDICTION_TYPES),
            fix="Leave it out for what the checkpoint says.",
        )


def open_single_file(
    path: Path, *, prediction_type: str | None = None, without_vae: bool = False
) -> SingleFile:
    """Read the header of a one-file checkpoint.

    Args:
        path: a `.safetensors` file with UNet, text encoders and autoencoder.
        prediction_type: "epsilon" or "v_prediction"; None is what the file says, or its family's default.
        without_vae: another autoencoder will take the place of the file's, which may be missing or damaged.

    Raises:
        CheckpointError: a damaged file, a pickle, another family or kind (named), or a part that is missing.
        UsageError: an unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    refuse_pickle(path)
    stored = read_headers(path)
    tensors = _named_usually(stored)
    refuse_other_kinds(path, tensors)
    refuse_quantised(path, _under(tensors, UNET))  # its scales would be named as surplus
    name = _family(tensors)
    family = _FAMILIES[name]
    parts = _parts(path, tensors, family, without_vae=without_vae)
    if without_vae and not _is_vae(parts.get("vae", {})):
        parts.pop("vae", None)
    notes: list[str] = []
    if averages := sum(tensor.startswith("model_ema.") for tensor in tensors):
        notes.append(f"{averages} tensors model_ema.* (averaged weights) are not used")
    prediction_type = prediction_type or _stated_prediction(path, tensors, read_header(path).metadata)
    if prediction_type is None:
        inpaints = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1] == 9
        turbo = any("conditioner.embedders." in tensor for tensor in stored)
        v = name == "sd2" and not inpaints and not turbo
        prediction_type = "v_prediction" if v else "epsilon"
        if name == "sd2":
            notes.append(f"it does not say what its UNet predicts: {prediction_type} is assumed")
    try:
        configs = _configs(parts, family, v_768=(name, prediction_type) == ("sd2", "v_prediction"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.found}", expected=error.expected, fix=error.fix) from error
    components = {
        part: Component(name=part, folder=path, config=configs[part], tensors=found)
        for part, found in parts.items()
    }
    scheduler = {**_SCHEDULE, **family.scheduler, "prediction_type": prediction_type}
    if "ztsnr" in tensors:
        scheduler["rescale_betas_zero_snr"] = True
    tokenizers = {TEXT_ENCODERS[part]: encoder.pad_token for part, encoder in family.encoders.items()}
    return SingleFile(
        family=name,
        components=components,
        scaling_factor=family.scaling_factor,
        scheduler=scheduler,
        tokenizers=tokenizers,
        notes=tuple(notes),
    )


def open_vae_file(path: Path, *, scaling_factor: float = _SD_SCALING) -> Component:
    """Read the autoencoder from the header of its own file or of a whole checkpoint.

    Args:
        path: a `.safetensors` file by latent-diffusion's or diffusers' names.
        scaling_factor: 0.18215 in 1.x and 2.x, 0.13025 in XL. No tensor says it.

    Raises:
        CheckpointError: a damaged file, a pickle, or no autoencoder of this family.
    """
    refuse_pickle(path)
    stored = read_headers(path)
    tensors = _under(stored, next((prefix for prefix in (VAE, "vae.") if _any_under(stored, prefix)), ""))
    if not _any_under(tensors, "encoder.down_blocks."):
        tensors = vae_tensors(tensors)
    try:
        config = _vae_config(tensors)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is no autoencoder ({error.found})",
            expected="the AutoencoderKL of a Stable Diffusion checkpoint",
            fix="Check which file it is; a tiny autoencoder goes with --tiny-vae instead.",
        ) from error
    config["scaling_factor"] = scaling_factor
    return Component(name="vae", folder=path, config=config, tensors=tensors)


def _under(tensors: Tensors, prefix: str) -> dict[str, TensorHeader]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _any_under(tensors: Tensors, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _named_usually(stored: Tensors) -> dict[str, TensorHeader]:
    """The tensors by the names that latent-diffusion's checkpoints have, where a tool wrote others.

    The UNet may lie under `diffusion_model.` without `model.`, and everything under one more prefix. By
    generative-models' names the one text encoder of 1.x and 2.x is called as the first of XL.
    """
    end = f"diffusion_model.{_UNET_START}"
    unet = next((name.removesuffix(_UNET_START) for name in stored if f".{name}".endswith(f".{end}")), UNET)
    if unet != UNET and f"{UNET}{_UNET_START}" not in stored:
        outer = unet.removesuffix(UNET if unet.endswith(f".{UNET}") else UNET.removeprefix("model."))
        stored = {
            UNET + name.removeprefix(unet) if name.startswith(unet) else name.removeprefix(outer): tensor
            for name, tensor in stored.items()
        }
    if f"{UNET}label_emb.0.0.weight" in stored:
        return dict(stored)
    return {re.sub(r"^conditioner\.embedders\.0\.", _TEXT, name): tensor for name, tensor in stored.items()}


def _family(tensors: Tensors) -> str:
    """The family by its text encoders; without them, by sizes that only full models have."""
    if f"{UNET}label_emb.0.0.weight" in tensors:
        refines = _any_under(tensors, "conditioner.embedders.0.model.")
        if not _any_under(tensors, "conditioner."):
            refines = _any_under(tensors, f"{UNET}input_blocks.9.")  # four levels instead of three
        return "sdxl-refiner" if refines else "sdxl"
    if _any_under(tensors, "cond_stage_model."):
        return "sd2" if _any_under(tensors, "cond_stage_model.model.") else "sd1"
    context = tensors.get(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    return "sd2" if context is not None and context.shape[-1:] == (1024,) else "sd1"


def _parts(
    path: Path, tensors: Tensors, family: _Family, *, without_vae: bool
) -> dict[str, dict[str, TensorHeader]]:
    """Each part's tensors by diffusers' names. Raises CheckpointError for missing parts, unknown tensors."""
    places: dict[str, tuple[str, Naming]] = {
        **{name: (encoder.prefix, encoder.naming) for name, encoder in family.encoders.items()},
        "unet": (UNET, unet_tensors),
        "vae": (VAE, vae_tensors),
    }
    lacking = {name: place for name, (place, _) in places.items() if not _any_under(tensors, place)}
    if without_vae and lacking.pop("vae", None):
        del places["vae"]
    if lacking:
        words = ", ".join(f"{name} ({place}*)" for name, place in lacking.items())
        another = command("latentrt", "export", path, "-o", "PACKAGE", "--vae", "VAE")
        raise CheckpointError(
            f"{path} has no {words}",
            expected=f"{', '.join(places)} in one file",
            fix=f"Name an autoencoder: {another}" if list(lacking) == ["vae"] else _FIX,
        )
    parts = {name: naming(_under(tensors, prefix)) for name, (prefix, naming) in places.items()}
    known = {tensor.name for tensor in parts["unet"].values()}
    surplus = [tensor.name for name, tensor in tensors.items() if name.startswith(UNET)]
    if surplus := [name for name in surplus if name not in known]:
        raise CheckpointError(
            f"{path} has {len(surplus)} tensors that no Stable Diffusion UNet has ({surplus[0][:200]})",
            expected="a UNet without additions",
            fix="Use a diffusers folder of this model, if its family is supported.",
        )
    return parts


def _configs(parts: Mapping[str, Tensors], family: _Family, *, v_768: bool) -> dict[str, dict[str, Any]]:
    """The parts' configs. `v_768`: the model is like 2.1, which predicts v and was trained at 768 pixels."""
    configs = {name: _text_config(parts[name], encoder) for name, encoder in family.encoders.items()}
    pooled = configs.get("text_encoder_2", {}).get("projection_dim", 0)
    size = 96 if v_768 else family.sample_size
    unet = {**_unet_config(parts["unet"], family, pooled), **family.unet, "sample_size": size}
    configs["unet"] = unet
    if "vae" in parts:
        sizes = {"sample_size": 8 * size, "scaling_factor": family.scaling_factor}
        configs["vae"] = {**_vae_config(parts["vae"]), **sizes}
    return configs


def _stated_prediction(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> str | None:
    """What a file says that its UNet predicts. Raises CheckpointError for what no sampler is for."""
    if "v_pred" in tensors:
        return "v_prediction"
    for key in _NOTED:
        if noted := metadata.get(key, "").strip().lower():
            if noted not in _NOTED_PREDICTIONS:
                raise CheckpointError(
                    f"{path} says {noted[:80]!r} under {key}, where a file says what its UNet predicts",
                    expected=" or ".join(PREDICTION_TYPES),
                    fix="Pass --prediction-type if you know better.",
                )
            return _NOTED_PREDICTIONS[noted]
    return _MODELSPEC_2.get(metadata.get("modelspec.architecture", "").lower())


def _unet_config(tensors: Tensors, family: _Family, pooled: int) -> dict[str, Any]:
    """The config of UNet2DConditionModel. `pooled` is the width of the pooled text embedding, 0 for none.

    Raises:
        CheckpointError: a tensor is missing, or no config can describe how the blocks are arranged.
    """
    head_size, ids = family.head_size, family.ids
    levels = max(_count(tensors, "down_blocks."), 1)
    widths = [_shape(tensors, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]
    layers = _count(tensors, "down_blocks.0.resnets.")
    depths, middle = _depths(tensors, levels, layers)
    per_level = [*(depth or 1 for depth in depths[:-1]), middle]
    uniform = len({middle, *filter(None, depths)}) == 1
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": _shape(tensors, "conv_in.weight", 4)[1],
        "out_channels": _shape(tensors, "conv_out.weight", 4)[0],
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in depths],
        "up_block_types": [f"{'CrossAttn' if depth else ''}UpBlock2D" for depth in reversed(depths)],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "cross_attention_dim": _shape(tensors, f"{_MIDDLE}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "transformer_layers_per_block": middle if uniform else per_level,
        "attention_head_dim": 8 if head_size is None else [max(width // head_size, 1) for width in widths],
        "use_linear_projection": len(_shape(tensors, f"{_MIDDLE}.proj_in.weight")) == 2,
    }
    if "add_embedding.linear_1.weight" in tensors:
        added = _shape(tensors, "add_embedding.linear_1.weight", 2)[1]
        if added <= pooled or (added - pooled) % ids:
            raise CheckpointError(
                f"the UNet's added embedding takes {added} numbers",
                expected=f"the pooled text embedding's {pooled} and {ids} ids of equal width",
                fix=_WHOLE,
            )
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooled) // ids,
            "projection_class_embeddings_input_dim": added,
        }
    return config


def _depths(tensors: Tensors, levels: int, layers: int) -> tuple[list[int], int]:
    """The transformer blocks of an attention: in each level (0 without attention), and in the middle."""
    blocks = {match.groups() for match in map(_ATTENTION_BLOCK.match, tensors) if match}
    found = Counter(place for place, _ in blocks)
    depths = [found[f"down_blocks.{level}.attentions.0"] for level in range(levels)]
    middle = found[_MIDDLE]
    expected = Counter({_MIDDLE: middle})
    for level, depth in enumerate(depths):
        expected.update({f"down_blocks.{level}.attentions.{i}": depth for i in range(layers)})
        expected.update({f"up_blocks.{levels - 1 - level}.attentions.{i}": depth for i in range(layers + 1)})
    if found != expected or middle == 0 or depths[-1] not in (0, middle):
        raise CheckpointError(
            f"the UNet's transformer blocks are arranged otherwise ({levels} levels of {layers} layers,"
            f" depths {depths}, {middle} in the middle)",
            expected="one depth in each level and its counterpart above (SSD-1B and Vega have several)",
            fix=_WHOLE,
        )
    return depths, middle


def _vae_config(tensors: Tensors) -> dict[str, Any]:
    """The config of AutoencoderKL without its scaling factor, which no shape says."""
    levels = max(_count(tensors, "encoder.down_blocks."), 1)
    firsts = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)]
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(tensors, "decoder.conv_in.weight", 4)[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [_shape(tensors, first, 4)[0] for first in firsts],
        "layers_per_block": _count(tensors, "encoder.down_blocks.0.resnets."),
        "norm_num_groups": 32,
        "act_fn": "silu",
    }
    optional = ("quant_conv", "post_quant_conv")
    return config | {f"use_{name}": False for name in optional if f"{name}.weight" not in tensors}


def _is_vae(tensors: Tensors) -> bool:
    with suppress(CheckpointError):
        return bool(_vae_config(tensors))
    return False


def _text_config(tensors: Tensors, encoder: _Encoder) -> dict[str, Any]:
    """The config of CLIPTextModel, or of CLIPTextModelWithProjection."""
    words, width = _shape(tensors, "text_model.embeddings.token_embedding.weight", 2)
    first = "text_model.encoder.layers.0"
    query = _shape(tensors, f"{first}.self_attn.q_proj.weight", 2)
    if query != (width, width):
        raise CheckpointError(
            f"a text encoder of width {width} has query projections of the shape {query}",
            expected=f"{(width, width)}",
            fix=_WHOLE,
        )
    return {
        "architectures": [f"CLIPTextModel{'WithProjection' if encoder.projects else ''}"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, f"{first}.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _count(tensors, "text_model.encoder.layers."),
        "num_attention_heads": max(width // _CLIP_HEAD, 1),
        "max_position_embeddings": _shape(tensors, "text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": encoder.hidden_act,
        "layer_norm_eps": 1e-5,
        "projection_dim": _shape(tensors, "text_projection.weight", 2)[0] if encoder.projects else width,
        # As in the published configs. 2 means to transformers that the highest id of a prompt is its end.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _count(tensors: Tensors, prefix: str) -> int:
    """How many different numbers follow `prefix` in the names."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def _shape(tensors: Tensors, name: str, rank: int | None = None) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in tensors:
        raise CheckpointError(f"the tensor {name!r} is missing", expected="a complete checkpoint", fix=_WHOLE)
    shape = tensors[name].shape
    if rank is not None and len(shape) != rank:
        raise CheckpointError(
            f"the tensor {name!r} has the shape {shape}", expected=f"{rank} axes", fix=_WHOLE
        )
    return shape
