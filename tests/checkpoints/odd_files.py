"""Files that people really have, made small: each with where it was reported and what is right for it.

`ODD_FILES` is for whoever opens files: `make` writes one into an empty folder, `answer` says what must come
of it. The tensors are random, and `Opens.tensors` has those that each part must be found to have.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.export.ldm_files import (
    CLIP_AT,
    TINY,
    Recipe,
    Tensors,
    build,
    one_file,
    tensors_of,
    text_to_open_clip,
    under,
    unet,
    vae,
    write_header_only,
)

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"
HALF = torch.float16
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,  # nothing in a file says another
    "projection_dim": 24,
    "hidden_act": "gelu",
}


# The smallest that one file can hold: one level, and a transformer in the middle alone.
SMALLEST = replace(
    TINY["sd1"],
    unet=unet((32,), "-", layers_per_block=1, cross_attention_dim=64, attention_head_dim=8),
    vae=vae(32),
)


def _with_unet(family: str, **changed: Any) -> Recipe:
    return replace(TINY[family], unet={**TINY[family].unet, **changed})


# The depths that ComfyUI's table of architectures has for SSD-1B and Segmind-Vega: nothing in the middle.
DISTILLED: Mapping[str, dict[str, Any]] = {
    "ssd-1b": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "vega": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
}
_UNCLIP = _with_unet(
    "sd2",
    class_embed_type="projection",
    projection_class_embeddings_input_dim=2 * VISION["projection_dim"],
)
VISIONS = {"unclip": VISION, "unclip-l": {**VISION, "hidden_act": "quick_gelu"}}
RECIPES: Mapping[str, Recipe] = {
    **TINY,
    "smallest": SMALLEST,
    **{f"{name}-inpainting": _with_unet(name, in_channels=9) for name in ("sd1", "sd2", "sdxl")},
    **{name: _with_unet("sdxl", **options) for name, options in DISTILLED.items()},
    "lcm": _with_unet("sd1", time_cond_proj_dim=16),
    "lcm-xl": _with_unet("sdxl", time_cond_proj_dim=16),
    **dict.fromkeys(VISIONS, _UNCLIP),
}
# The family whose layout a recipe's file has.
LAYOUTS = {
    "smallest": "sd1",
    **{f"{name}-inpainting": name for name in ("sd1", "sd2", "sdxl")},
    "ssd-1b": "sdxl",
    "vega": "sdxl",
    "lcm": "sd1",
    "lcm-xl": "sdxl",
    **dict.fromkeys(VISIONS, "sd2"),
}
WORDS = 100  # that the text encoders know; prompts need CLIP's 49,408


def recipe_of(name: str, words: int = WORDS) -> Recipe:
    """A recipe whose text encoders know so many words."""
    recipe = RECIPES[name]
    encoders = {part: getattr(recipe, part) for part in ("text_encoder", "text_encoder_2")}
    return replace(
        recipe, **{part: {**config, "vocab_size": words} for part, config in encoders.items() if config}
    )


@cache
def modules(name: str, words: int = WORDS) -> dict[str, Any]:
    """A recipe's modules, of random weights in half precision, by the names of their folders."""
    found = build(recipe_of(name, words))
    if name in VISIONS:
        found["image_encoder"] = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISIONS[name]))
    return {part: module.to(HALF) for part, module in found.items()}


def source(name: str, words: int = WORDS) -> dict[str, Tensors]:
    """What each part must be found to have, by diffusers' and transformers' names."""
    found = {part: tensors_of(part, module) for part, module in modules(name, words).items()}
    if name == "unclip":
        width = VISION["projection_dim"]
        found["image_normalizer"] = {"mean": torch.zeros(1, width), "std": torch.ones(1, width)}
    return found


def stored(name: str, words: int = WORDS) -> Tensors:
    """The tensors of the recipe's one-file checkpoint."""
    layout = LAYOUTS.get(name, name)
    made = modules(name, words)
    found = one_file({part: module for part, module in made.items() if part != "image_encoder"}, layout)
    if layout in CLIP_AT:
        found[f"{CLIP_AT[layout]}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if name == "unclip":
        found = {
            key.replace("class_embedding.linear_1.", "label_emb.0.0.").replace(
                "class_embedding.linear_2.", "label_emb.0.2."
            ): tensor
            for key, tensor in found.items()
        }
        found |= under("embedder.model.visual.", _open_clip_vision(source(name, words)["image_encoder"]))
        # `FrozenOpenCLIPImageEmbedder` keeps the other half of CLIP, but for its transformer.
        found |= {
            "embedder.model.logit_scale": torch.ones(()),
            "embedder.model.text_projection": torch.ones(4, 4),
        }
        found |= {
            "noise_augmentor.betas": torch.ones(1000),
            "noise_augmentor.alphas_cumprod": torch.ones(1000),
        }
    if name.startswith("lcm"):  # diffusers' scripts leave this name; latent-diffusion would call it so
        found[f"{UNET}time_embed.cond_proj.weight"] = found.pop(f"{UNET}time_embedding.cond_proj.weight")
    return found


def _open_clip_vision(tensors: Tensors) -> Tensors:
    ends = {
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
    }
    renamed: Tensors = {}
    layers: Tensors = {}
    for name, tensor in tensors.items():
        if ".layers." in name:
            layers[name.replace("vision_model.", "text_model.")] = tensor
        elif name == "visual_projection.weight":
            renamed["proj"] = tensor.T.contiguous()
        else:
            new = name.replace("vision_model.pre_layrnorm", "ln_pre").replace(
                "vision_model.post_layernorm", "ln_post"
            )
            renamed[ends.get(name, new)] = tensor
    return renamed | text_to_open_clip(layers)


OTHER_VAE = vae(32, 32, 32, 32)


@cache
def other_vae() -> Tensors:
    """An autoencoder of eight pixels a cell, by diffusers' names."""
    torch.manual_seed(1)
    return tensors_of("vae", AutoencoderKL(**OTHER_VAE).half())


def averages(tensors: Tensors) -> Tensors:
    """Averaged weights of a UNet, by the names of latent-diffusion's LitEma."""
    return {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor
        for name, tensor in tensors.items()
        if name.startswith(UNET)
    } | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}


SCHEDULE = {
    name: torch.ones(1000)
    for name in (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_recip_alphas_cumprod",
        "posterior_variance",
    )
}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@dataclass(frozen=True, kw_only=True)
class Opens:
    """It opens as this family.

    Each of `notes` is a regular expression that some note matches. `tensors` are those of each part.
    """

    family: str
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, Tensors]
    predicts: str = "epsilon"
    predicts_by: str | None = None
    channels: int = 4
    options: Mapping[str, Any] | None = None  # of Checkpoint.open; "vae" is beside the file


@dataclass(frozen=True, kw_only=True)
class Refused:
    """It is refused with these words (a regular expression), and reported as this kind, for this family."""

    words: str
    kind: str
    family: str | None = None


@dataclass(frozen=True, kw_only=True)
class OddFile:
    """A file: where it was reported, what writes it into an empty folder, and what is right for it."""

    reported: str
    make: Callable[[Path], Path]
    answer: Opens | Refused


ODD_FILES: dict[str, OddFile] = {}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    kept = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(kept, path, dict(metadata) if metadata else None)
    return path


def _opens(
    id: str,
    reported: str,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    *,
    recipe: str = "sd1",
    family: str = "",
    notes: tuple[str, ...] = (),
    tensors: Callable[[dict[str, Tensors]], Mapping[str, Tensors]] = lambda found: found,
    name: str = "model.safetensors",
    metadata: Mapping[str, str] | None = None,
    **answer: Any,
) -> None:
    """A file that opens: the recipe's tensors, changed."""

    def make(folder: Path) -> Path:
        return write(folder / name, change(stored(recipe)), metadata)

    layout = LAYOUTS.get(recipe, recipe)
    ODD_FILES[id] = OddFile(
        reported=reported,
        make=make,
        answer=Opens(
            family=family or layout,
            notes=notes,
            tensors=_Later(lambda: tensors(source(recipe))),
            **answer,
        ),
    )


class _Later(Mapping[str, Tensors]):
    """Tensors that are made when somebody looks at them."""

    def __init__(self, make: Callable[[], Mapping[str, Tensors]]) -> None:
        self._make = cache(make)

    def __getitem__(self, part: str) -> Tensors:
        return self._make()[part]

    def __iter__(self) -> Any:
        return iter(self._make())

    def __len__(self) -> int:
        return len(self._make())


def _refused(
    id: str, reported: str, make: Callable[[Path], Path], words: str, kind: str, family: str | None = None
) -> None:
    ODD_FILES[id] = OddFile(
        reported=reported, make=make, answer=Refused(words=words, kind=kind, family=family)
    )


def _cast(
    dtype: torch.dtype, only: Callable[[str, torch.Tensor], bool] = lambda name, tensor: True
) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: tensor.to(dtype) if tensor.is_floating_point() and only(name, tensor) else tensor
        for name, tensor in tensors.items()
    }


def _cast_parts(
    dtype: torch.dtype, only: Callable[[str, torch.Tensor], bool] = lambda name, tensor: True
) -> Any:
    return lambda parts: {part: _cast(dtype, only)(tensors) for part, tensors in parts.items()}


def _renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def _plus(more: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | more(tensors)


def _without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def _nine_channels(tensors: Tensors) -> Tensors:
    return tensors | {CONV_IN: _wide(tensors[CONV_IN])}


def _wide(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight, weight, weight[:, :1]], dim=1)


def _nine(parts: dict[str, Tensors]) -> dict[str, Tensors]:
    return {**parts, "unet": parts["unet"] | {"conv_in.weight": _wide(parts["unet"]["conv_in.weight"])}}


# Precision.
_opens("pruned fp16, no position ids", "the usual civitai file", _without("position_ids"))
_opens("bf16", "diffusers#8320", _cast(torch.bfloat16), tensors=_cast_parts(torch.bfloat16))
_opens("fp32", "v1-5-pruned.safetensors", _cast(torch.float32), tensors=_cast_parts(torch.float32))
_opens("fp64", "merges of old checkpoint mergers", _cast(torch.float64), tensors=_cast_parts(torch.float64))
_opens(
    "fp8 e4m3, norms in fp16",
    "ComfyUI's fp8_e4m3fn files",
    _cast(torch.float8_e4m3fn, lambda name, tensor: tensor.ndim > 1),
    tensors=_cast_parts(torch.float8_e4m3fn, lambda name, tensor: tensor.ndim > 1),
)
_opens(
    "fp8 e5m2, all of it",
    "ComfyUI's fp8_e5m2 files",
    _cast(torch.float8_e5m2),
    tensors=_cast_parts(torch.float8_e5m2),
)
_opens(
    "a type for each part",
    "A1111#12379: half UNet, full autoencoder",
    lambda t: _cast(torch.float32, lambda name, _: name.startswith(VAE))(
        _cast(torch.bfloat16, lambda name, _: name.startswith(TEXT))(t)
    ),
    tensors=lambda parts: {
        "unet": parts["unet"],
        "vae": {n: t.float() for n, t in parts["vae"].items()},
        "text_encoder": {n: t.bfloat16() for n, t in parts["text_encoder"].items()},
    },
)
# CLIP's buffers.
_POSITIONS = "positions of tokens: 1 .cond_stage_model.transformer.text_model.embeddings.position_ids"
_opens("position ids as int64", "the usual file of 1.x", notes=(_POSITIONS,))
_opens(
    "position ids as float",
    "A1111's discussion 4511: merges damage them",
    _plus(lambda t: {f"{CLIP_AT['sd1']}text_model.embeddings.position_ids": torch.arange(77.0)[None] - 0.01}),
    notes=(_POSITIONS,),
)
_opens(
    "position ids as fp16",
    "transformers#24332",
    _plus(lambda t: {f"{CLIP_AT['sd1']}text_model.embeddings.position_ids": torch.arange(77)[None].half()}),
    notes=(_POSITIONS,),
)
_opens(
    "a text encoder without text_model.",
    "A1111's early files",
    _renamed(lambda n: n.replace("transformer.text_model.", "transformer.")),
)
_opens(
    "the other half of CLIP beside the text encoder",
    "a whole CLIPModel saved by a trainer",
    _plus(
        lambda t: {
            f"{CLIP_AT['sd1']}vision_model.pre_layrnorm.weight": torch.ones(4),
            f"{CLIP_AT['sd1']}visual_projection.weight": torch.ones(4, 4),
            f"{CLIP_AT['sd1']}text_projection.weight": torch.ones(4, 4),
        }
    ),
    notes=("another half of CLIP: 3",),
)
_opens(
    "logit_scale of ViT-H",
    "512-base-ema.safetensors",
    recipe="sd2",
    notes=("CLIP's scale of likeness: 1 .cond_stage_model.model.logit_scale",),
    predicts="v_prediction",
)
_opens(
    "logit_scale of ViT-bigG",
    "sd_xl_base_1.0.safetensors",
    recipe="sdxl",
    notes=("scale of likeness: 1 .conditioner.embedders.1.model.logit_scale",),
)
# Averages.
_opens(
    "as trained, averages beside",
    "v1-5-pruned.safetensors (7.7 GB)",
    _plus(lambda t: averages(t) | SCHEDULE),
    notes=("averaged weights: 496 .model_ema.decay", "the noise schedule: 5 .alphas_cumprod"),
)
_opens(
    "averages in place of the model",
    "diffusers' extract_ema; ldm's EMA checkpoints",
    lambda t: {n: x for n, x in t.items() if not n.startswith(UNET)} | averages(t),
    notes=(r"averaged weights \(model_ema.\*\) are the UNet", "averaged weights: 2 .model_ema.decay"),
)
_opens(
    "averages in place of XL's model",
    "the same",
    lambda t: {n: x for n, x in t.items() if not n.startswith(UNET)} | averages(t),
    recipe="sdxl",
    notes=("are the UNet",),
)
# Prefixes.
_opens(
    "without model.",
    "OneTrainer's and InvokeAI's dumps",
    _renamed(lambda n: n.replace(UNET, "diffusion_model.")),
)
_opens("under module.", "DistributedDataParallel", _renamed(lambda n: f"module.{n}"))
_opens("under state_dict.", "lightning's checkpoint, flattened", _renamed(lambda n: f"state_dict.{n}"))
_opens("under model.", "nested once more by a trainer", _renamed(lambda n: f"model.{n}"))
_opens(
    "torch.compile in the middle",
    "pytorch#101107: _orig_mod",
    _renamed(lambda n: n.replace(UNET, f"{UNET}_orig_mod.")),
)
_opens("torch.compile around it", "pytorch#101107", _renamed(lambda n: f"_orig_mod.{n}"))
_opens(
    "FSDP in the middle",
    "pytorch's FSDP state dicts",
    _renamed(lambda n: n.replace("input_blocks.1.", "input_blocks.1._fsdp_wrapped_module.")),
)
_opens("XL under module.", "DistributedDataParallel", _renamed(lambda n: f"module.{n}"), recipe="sdxl")
_opens(
    "a wrapped copy beside the model",
    "a trainer that saved both",
    _plus(lambda t: {f"module.{CONV_IN}": t[CONV_IN] + 1}),
    notes=("of no known use: 1 .module.model.diffusion_model",),
)
# Junk of trainers and merges.
_opens(
    "the noise schedule and a merge's recipe",
    "A1111's checkpoint merger",
    _plus(lambda t: SCHEDULE),
    notes=("the noise schedule: 5", "metadata that is not used: sd_merge_models, sd_merge_recipe"),
    metadata={"format": "pt", "sd_merge_recipe": "{}", "sd_merge_models": "{}"},
)
_opens(
    "denoiser.sigmas",
    "generative-models' XL files; ComfyUI#1126",
    _plus(lambda t: {"denoiser.sigmas": torch.ones(1000)}),
    recipe="sdxl",
    notes=("the noise schedule: 1 .denoiser.sigmas",),
)
_opens(
    "num_batches_tracked in the UNet",
    "a merge that averaged a batch norm",
    _plus(lambda t: {f"{UNET}input_blocks.1.0.num_batches_tracked": torch.tensor(3)}),
    notes=("the training's state: 1",),
)
_opens(
    "the optimizer's state",
    "a trainer's resumable file",
    _plus(
        lambda t: {
            "optimizer.state.0.exp_avg": torch.ones(4),
            "global_step": torch.tensor(7),
            "lr_schedulers.0.last_epoch": torch.tensor(1),
        }
    ),
    notes=("the training's state: 3",),
)
_opens(
    "the autoencoder's critic",
    "autoencoders trained with ldm",
    _plus(
        lambda t: {
            f"{VAE}loss.logvar": torch.ones(()),
            f"{VAE}loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
        }
    ),
    notes=("the autoencoder's critic: 2",),
)
_opens(
    "a safety checker",
    "a pipeline dumped whole",
    _plus(lambda t: {"safety_checker.concept_embeds": torch.ones(17, 8)}),
    notes=("a safety checker: 1",),
)
_opens(
    "a LoRA that a merge left",
    "supermerger's leftovers",
    _plus(lambda t: {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(4, 4)}),
    notes=("a LoRA's: 1",),
)
_opens(
    "embeddings in the file",
    "A1111's bundled embeddings",
    _plus(lambda t: {"bundle_emb.easy.string_to_param.*": torch.ones(2, 64)}),
    notes=("embeddings: 1",),
)
_opens(
    "tensors that nobody knows",
    "any tool",
    _plus(lambda t: {"first_stage_model.extra.weight": torch.ones(4), "foo": torch.ones(4)}),
    notes=("of no known use: 2 .first_stage_model.extra.weight, foo",),
)
# What the UNet predicts.
_opens(
    "2.x that says nothing",
    "768-v-ema.safetensors",
    recipe="sd2",
    predicts="v_prediction",
    predicts_by="assumption",
    notes=("v_prediction is assumed",),
)
_opens(
    "2.x with ModelSpec's architecture",
    "Stability's ModelSpec",
    recipe="sd2",
    metadata={"modelspec.architecture": "stable-diffusion-v2-512"},
    predicts_by="the metadata modelspec.architecture",
)
_opens(
    "2.x by generative-models' names",
    "sd_turbo.safetensors; A1111's pull 14170",
    _renamed(lambda n: n.replace(TEXT, "conditioner.embedders.0.")),
    recipe="sd2",
    predicts_by="assumption",
    notes=("epsilon is assumed",),
)
_opens(
    "2.x by diffusers' script",
    "23 layers, no projection",
    _without("resblocks.23.", "model.text_projection"),
    recipe="sd2",
    predicts="v_prediction",
)
_opens(
    "XL with the tensor v_pred",
    "NoobAI XL V-Pred",
    _plus(lambda t: {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}),
    recipe="sdxl",
    predicts="v_prediction",
    predicts_by="the tensor v_pred",
)
_opens(
    "XL with ComfyUI's key",
    "ComfyUI's ModelSave",
    recipe="sdxl",
    metadata={"modelspec.predict_key": "v"},
    predicts="v_prediction",
    predicts_by="the metadata modelspec.predict_key",
)
# Families.
_opens("inpainting 1.x", "sd-v1-5-inpainting", _nine_channels, tensors=_nine, channels=9)
_opens(
    "inpainting 2.x",
    "512-inpainting-ema",
    _nine_channels,
    recipe="sd2",
    tensors=_nine,
    channels=9,
    predicts_by="assumption",
    notes=("epsilon is assumed",),
)
_opens(
    "inpainting XL",
    "diffusers#6279: XL merges of 9 channels",
    _nine_channels,
    recipe="sdxl",
    tensors=_nine,
    channels=9,
)
_opens("the refiner", "sd_xl_refiner_1.0.safetensors", recipe="sdxl-refiner")
_opens(
    "XL's projection by transformers' name",
    "diffusers' convert_diffusers_to_original_sdxl.py",
    lambda t: {
        f"{n}.weight" if n.endswith("text_projection") else n: x.T.contiguous()
        if n.endswith("text_projection")
        else x
        for n, x in t.items()
    },
    recipe="sdxl",
)
_opens("SSD-1B", "A1111's convert_sdxl_to_ssd", recipe="ssd-1b")
_opens("Segmind-Vega", "segmind-vega.safetensors", recipe="vega")
_opens("LCM by latent-diffusion's name", "diffusers#11033", recipe="lcm", family="lcm")
_opens(
    "LCM by diffusers' name",
    "diffusers' script leaves it",
    _renamed(lambda n: n.replace("time_embed.cond_proj", "time_embedding.cond_proj")),
    recipe="lcm",
    family="lcm",
)
_opens("LCM of XL", "lcm-sdxl merged into its base", recipe="lcm-xl", family="lcm")
_opens(
    "unCLIP h",
    "sd21-unclip-h.ckpt, converted",
    recipe="unclip",
    family="unclip",
    predicts="v_prediction",
    predicts_by="assumption",
    notes=("the image encoder's text half: 1", "the noise schedule: 2 .noise_augmentor"),
)
_opens(
    "unCLIP with its statistics",
    "sd21-unclip-l with Karlo's ViT-L-14_stats",
    _plus(
        lambda t: {
            "noise_augmentor.data_mean": torch.full((1, 24), 0.5),
            "noise_augmentor.data_std": torch.full((1, 24), 2.0),
        }
    ),
    recipe="unclip",
    family="unclip",
    predicts="v_prediction",
    tensors=lambda parts: {
        **parts,
        "image_normalizer": {"mean": torch.full((1, 24), 0.5), "std": torch.full((1, 24), 2.0)},
    },
)
# Names of files.
_opens("uppercase ending", "Windows", name="MODEL.SAFETENSORS")
_opens("safetensors called .ckpt", "ComfyUI#5729", name="model.ckpt")
_opens("safetensors called .pt", "ComfyUI#5729", name="model.PT")
_opens("spaces and letters of other scripts", "every forum", name="мой (v1) 模型 ☃.safetensors")
_opens("a name that looks like an option", "shells", name="--model.safetensors")


def _moved(into: Callable[[Path, Path], Path]) -> Callable[[Path], Path]:
    """A file of 1.x, put elsewhere: `into` gets the folder and the file."""

    def make(folder: Path) -> Path:
        return into(folder, write(folder / "model.safetensors", stored("sd1")))

    return make


def _opens_so(id: str, reported: str, make: Callable[[Path], Path], **answer: Any) -> None:
    answer = {"family": "sd1", "tensors": _Later(lambda: source("sd1"))} | answer
    if "folder" in id:  # where transformers' own names are kept
        answer["tensors"] = _Later(
            lambda: {part: module.state_dict() for part, module in modules("sd1").items()}
        )
    ODD_FILES[id] = OddFile(reported=reported, make=make, answer=Opens(**answer))


def _into_cache(folder: Path, file: Path) -> Path:
    """Hugging Face's cache: a link by name to a blob by hash."""
    root = folder / "models--me--dream"
    link = root / "snapshots" / ("a" * 40) / "dream.safetensors"
    (root / "blobs").mkdir(parents=True)
    link.parent.mkdir(parents=True)
    blob = file.rename(root / "blobs" / ("b" * 64))
    link.symlink_to(Path("..", "..", "blobs", blob.name))
    return link


def _null_metadata(folder: Path, file: Path) -> Path:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = {"__metadata__": None, **json.loads(content[8 : 8 + length])}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return file


def _folder(folder: Path, *, variant: str = "", shards: bool = False) -> Path:
    """A diffusers folder of 1.x."""
    from latentrt.checkpoints.files.tokenizers import write_clip_tokenizer

    root = folder / "pipeline"
    index = {"_class_name": "StableDiffusionPipeline"}
    for part, module in modules("sd1").items():
        sizes = {"max_shard_size": "60KB"} if shards else {}
        module.save_pretrained(root / part, **({"variant": variant} if variant else {}), **sizes)
        index[part] = ["diffusers", type(module).__name__]
    write_clip_tokenizer(root / "tokenizer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "PNDMScheduler"}))
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def _linked_folder(folder: Path) -> Path:
    """A folder in Hugging Face's cache, every file a link, opened as the repository."""
    plain, root = _folder(folder), folder / "models--me--dream"
    commit = "c" * 40
    for number, file in enumerate(sorted(path for path in plain.rglob("*") if path.is_file())):
        link = root / "snapshots" / commit / file.relative_to(plain)
        blob = root / "blobs" / f"{number:064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, blob)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return root


_opens_so("a link into a hub cache", "huggingface_hub's cache", _moved(_into_cache))
_opens_so("__metadata__ is null", "the safetensors library opens it", _moved(_null_metadata))
_opens_so("a folder of shards", "diffusers' max_shard_size", lambda folder: _folder(folder, shards=True))
_opens_so("a folder of .fp16. alone", "diffusers#2755", lambda folder: _folder(folder, variant="fp16"))
_opens_so(
    "a folder of .bf16. alone",
    "diffusers' variants",
    lambda folder: _folder(folder, variant="bf16"),
    notes=("unet: .*bf16.* is taken",),
)
_opens_so("a folder of links in a hub cache", "huggingface_hub's cache", _linked_folder)
_opens(
    "no autoencoder, and one is named",
    "A1111's noVAE files",
    _without(VAE),
    tensors=lambda parts: {**parts, "vae": other_vae()},
    options={"vae": True},
)


# What is refused.
def _changed(
    change: Callable[[Tensors], Tensors], recipe: str = "sd1", metadata: Mapping[str, str] | None = None
) -> Callable[[Path], Path]:
    return lambda folder: write(folder / "model.safetensors", change(stored(recipe)), metadata)


def _bytes(content: bytes, name: str = "model.safetensors") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _broken(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = write(folder / "model.safetensors", stored("sd1"))
        file.write_bytes(change(file.read_bytes()))
        return file

    return make


def _twice(content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    first, _, rest = content[8 : 8 + length].decode().partition(":{")
    entry, _, rest = rest.partition("},")
    text = f"{first}:{{{entry}}},{first[1:]}:{{{entry}}},{rest}".encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _longer(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content[8:]


_refused(
    "no autoencoder",
    "A1111's noVAE files",
    _changed(_without(VAE)),
    r"has no vae .*Name an autoencoder: latentrt generate .*--vae VAE",
    "checkpoint",
    "sd1",
)
_refused(
    "no text encoder",
    "trainers that save UNet and autoencoder",
    _changed(_without(TEXT)),
    r"has no text_encoder \(cond_stage_model",
    "checkpoint",
    "sd1",
)
_refused(
    "one of XL's text encoders",
    "OneTrainer's dumps",
    _changed(_without("embedders.1."), "sdxl"),
    r"has no text_encoder_2",
    "checkpoint",
    "sdxl",
)
_refused(
    "a UNet alone",
    "ComfyUI's diffusion_models",
    _changed(lambda t: {n: x for n, x in t.items() if n.startswith(UNET)}),
    "has no text_encoder .*, vae",
    "unet",
    "sd1",
)
_refused(
    "a tensor of the UNet is gone",
    "pruned too much",
    _changed(_without("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight")),
    "attn1.to_q.weight' is missing",
    "checkpoint",
    "sd1",
)
_refused(
    "half a download",
    "every forum",
    _broken(lambda content: content[: len(content) // 2]),
    "bytes of tensors; expected",
    "damaged",
)
_refused(
    "not even the header",
    "every forum",
    _broken(lambda content: content[:100]),
    "inside its header",
    "damaged",
)
_refused("a header longer than the file", "fuzzers", _broken(_longer), "inside its header", "damaged")
_refused(
    "trailing bytes",
    "ComfyUI#15602",
    _broken(lambda content: content + b"\0" * 8),
    "bytes of tensors; expected",
    "damaged",
)
_refused("a name twice", "safetensors' specification", _broken(_twice), "a name twice", "damaged")
_refused("zero bytes", "a download that never began", _bytes(b""), "is empty", "empty")
_refused(
    "a log-in page",
    "civitai without a token",
    _bytes(b"<!DOCTYPE html><html></html>"),
    "is an HTML page",
    "page",
)
_refused(
    "a refusal in JSON",
    "the hub's API",
    _bytes(b'{"error":"Access to model is restricted"}'),
    "is a JSON text",
    "json",
)
_refused(
    "a refusal in words",
    "the hub's 404",
    _bytes(b"Entry not found\n"),
    "is a text, such as a server's refusal",
    "text",
)
_refused(
    "a git-lfs pointer",
    "git clone without lfs",
    _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "is a git-lfs pointer",
    "damaged",
)
_refused(
    "GGUF",
    "stable-diffusion.cpp",
    _bytes(b"GGUF\3\0\0\0" + bytes(64), "model.gguf"),
    "is a GGUF file",
    "gguf",
)
_refused(
    "an HDF5 file", "Keras", _bytes(b"\x89HDF\r\n\x1a\n" + bytes(64), "unet.h5"), "is an HDF5 file", "hdf5"
)
_refused(
    "a preview's picture",
    "civitai's previews",
    _bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)),
    "is a picture",
    "picture",
)


def _pickle(folder: Path, name: str, **options: Any) -> Path:
    torch.save({"state_dict": {"x": torch.ones(2)}}, folder / name, **options)
    return folder / name


def _zip(folder: Path) -> Path:
    import zipfile

    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("model/readme.txt", "unpack me")
    return folder / "model.safetensors"


_refused(
    "a pickle",
    "v1-5-pruned.ckpt",
    lambda folder: _pickle(folder, "model.ckpt"),
    "is a pickle.*latentrt convert",
    "pickle",
)
_refused(
    "an old pickle",
    "torch before 1.6",
    lambda folder: _pickle(folder, "model.pt", _use_new_zipfile_serialization=False),
    "is a pickle",
    "pickle",
)
_refused(
    "a pickle called safetensors",
    "renamed by hand",
    lambda folder: _pickle(folder, "model.safetensors"),
    "is a pickle",
    "pickle",
)
_refused("a zip archive", "civitai's bundles", _zip, "is a zip archive", "archive")

# Quantised weights.
_Q = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
_refused(
    "ComfyUI's scaled fp8",
    "diffusion-pipe#381",
    _changed(
        _plus(
            lambda t: {
                f"{_Q}.weight": t[f"{_Q}.weight"].to(torch.float8_e4m3fn),
                f"{_Q}.scale_weight": torch.ones(()),
                f"{UNET}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
            }
        )
    ),
    "holds weights in scaled fp8",
    "checkpoint",
    "sd1",
)
_refused(
    "diffusers' scaled fp8",
    "stable-diffusion.cpp#1898",
    _changed(_plus(lambda t: {f"{_Q}.weight_scale": torch.ones(())})),
    "holds weights in scaled fp8",
    "checkpoint",
    "sd1",
)
_refused(
    "a lone mark of scaled fp8",
    "ComfyUI's pull 11603",
    _changed(_plus(lambda t: {"scaled_fp8": torch.zeros(0)})),
    "holds weights in scaled fp8",
    "checkpoint",
    "sd1",
)
_refused(
    "bitsandbytes' nf4",
    "Forge's nf4 files",
    _changed(
        _plus(
            lambda t: {
                f"{_Q}.weight": torch.zeros(64, 1, dtype=torch.uint8),
                f"{_Q}.weight.absmax": torch.ones(4),
                f"{_Q}.weight.quant_map": torch.ones(16),
                f"{_Q}.weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8),
            }
        )
    ),
    r"holds weights in 4 bits \(bitsandbytes\)",
    "checkpoint",
    "sd1",
)
_refused(
    "bitsandbytes' int8",
    "transformers' load_in_8bit",
    _changed(
        _plus(lambda t: {f"{_Q}.weight": torch.zeros(64, 64, dtype=torch.int8), f"{_Q}.SCB": torch.ones(64)})
    ),
    "holds weights in 8-bit integers",
    "checkpoint",
    "sd1",
)
_refused(
    "GPTQ",
    "AutoGPTQ",
    _changed(
        _plus(
            lambda t: {
                f"{_Q}.qweight": torch.zeros(4, 4, dtype=torch.int32),
                f"{_Q}.g_idx": torch.zeros(4, dtype=torch.int32),
            }
        )
    ),
    "holds weights in packed integers",
    "checkpoint",
    "sd1",
)
_refused(
    "Quanto",
    "optimum-quanto",
    _changed(
        _plus(
            lambda t: {
                f"{_Q}.weight._data": torch.zeros(4, 4, dtype=torch.int8),
                f"{_Q}.weight._scale": torch.ones(4),
            }
        )
    ),
    "holds weights that Quanto quantised",
    "checkpoint",
    "sd1",
)
_refused(
    "integers without a word",
    "a merge gone wrong",
    _changed(_plus(lambda t: {f"{_Q}.weight": torch.zeros(64, 64, dtype=torch.int8)})),
    "stores the weight .*to_q.weight' as I8",
    "checkpoint",
    "sd1",
)
_refused(
    "a LoRA that was not fused",
    "PEFT's base_layer",
    _changed(_plus(lambda t: {f"{_Q}.lora_A.weight": torch.ones(4, 32)})),
    "tensors that no Stable Diffusion UNet has",
    "checkpoint",
    "sd1",
)
_refused(
    "unCLIP l without its statistics",
    "sd21-unclip-l.ckpt",
    _changed(_plus(lambda t: {"embedder.model.visual.proj": torch.ones(32, 768)}), "unclip"),
    "has no statistics of its image embeddings",
    "checkpoint",
    "unclip",
)
_refused(
    "CosXL",
    "ComfyUI's supported_models",
    _changed(_plus(lambda t: {"edm_vpred.sigma_max": torch.ones(())}), "sdxl"),
    "is CosXL",
    "other",
)
_refused(
    "Playground 2.5",
    "the same",
    _changed(_plus(lambda t: {"edm_mean": torch.ones(4)}), "sdxl"),
    "is Playground 2.5",
    "other",
)
_refused(
    "InstructPix2Pix",
    "instruct-pix2pix-00-22000",
    _changed(_plus(lambda t: {CONV_IN: torch.ones(32, 8, 3, 3)})),
    "is InstructPix2Pix",
    "other",
)
_refused(
    "a ControlNet with its checkpoint",
    "control_sd15_canny.pth",
    _changed(_plus(lambda t: {"control_model.zero_convs.0.0.weight": torch.ones(4, 4, 1, 1)})),
    "is a ControlNet",
    "controlnet",
)


def _names(
    id: str,
    reported: str,
    tensors: Tensors,
    words: str,
    kind: str,
    family: str | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """A file of these names and shapes; its bytes are a hole."""

    def make(folder: Path) -> Path:
        write_header_only(folder / "model.safetensors", tensors, metadata)
        return folder / "model.safetensors"

    _refused(id, reported, make, words, kind, family)


# Adapters, by the tables of their writers.
_K, _XK = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
)
_names(
    "a LoRA of 1.x",
    "sd-scripts",
    {f"{_K}.lora_down.weight": meta(4, 768), f"{_K}.lora_up.weight": meta(320, 4), f"{_K}.alpha": meta()},
    r"is a LoRA \(kohya's names\) for Stable Diffusion 1.x",
    "lora",
    "sd1",
)
_names(
    "a LoRA of 2.x",
    "sd-scripts",
    {f"{_K}.lora_down.weight": meta(4, 1024), f"{_K}.lora_up.weight": meta(320, 4)},
    "is a LoRA .* for Stable Diffusion 2.x",
    "lora",
    "sd2",
)
_names(
    "a LoRA of XL",
    "sd-scripts",
    {f"{_XK}.lora_down.weight": meta(4, 2048), f"{_XK}.lora_up.weight": meta(640, 4)},
    "is a LoRA .* for SDXL",
    "lora",
    "sdxl",
)
_names(
    "a LoRA of a text encoder",
    "sd-scripts",
    {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": meta(4, 768)},
    "is a LoRA .* for Stable Diffusion 1.x",
    "lora",
    "sd1",
)
_names(
    "a LoRA of XL's text encoder",
    "sd-scripts",
    {"lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": meta(4, 1280)},
    "is a LoRA .* for SDXL",
    "lora",
    "sdxl",
)
_names(
    "a LoRA by its metadata",
    "sd-scripts",
    {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": meta(4, 1280)},
    "is a LoRA .* for SDXL",
    "lora",
    "sdxl",
    {"ss_base_model_version": "sdxl_base_v1-0"},
)
_names(
    "a LoRA by PEFT",
    "diffusers' save_lora_weights",
    {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": meta(4, 768),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": meta(320, 4),
    },
    r"is a LoRA \(PEFT's names\) for Stable Diffusion 1.x",
    "lora",
    "sd1",
)
_names(
    "a LoRA by early diffusers",
    "pytorch_lora_weights.bin",
    {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": meta(
            4, 768
        )
    },
    "is a LoRA",
    "lora",
    "sd1",
)
_names(
    "DoRA",
    "LyCORIS",
    {f"{_K}.lora_down.weight": meta(4, 768), f"{_K}.dora_scale": meta(1, 768)},
    "is a LoRA",
    "lora",
    "sd1",
)
_names(
    "LoHa",
    "LyCORIS",
    {
        f"{_K}.hada_w1_a": meta(320, 4),
        f"{_K}.hada_w1_b": meta(4, 768),
        f"{_K}.hada_w2_a": meta(320, 4),
        f"{_K}.hada_w2_b": meta(4, 768),
    },
    r"is a LoRA \(LoHa\) for Stable Diffusion 1.x",
    "lora",
    "sd1",
)
_names(
    "LoKr",
    "LyCORIS",
    {f"{_XK}.lokr_w1": meta(8, 16), f"{_XK}.lokr_w2": meta(80, 128)},
    r"is a LoRA \(LoKr\) for SDXL",
    "lora",
    "sdxl",
)
_names(
    "OFT",
    "sd-scripts",
    {f"{_K.replace('lora', 'oft')}.oft_blocks": meta(4, 80, 80)},
    r"is a LoRA \(OFT\)",
    "lora",
)
_names("IA3", "LyCORIS", {f"{_K}.weight": meta(320), f"{_K}.on_input": meta()}, r"is a LoRA \(IA3\)", "lora")
_names(
    "a LoRA of Flux",
    "sd-scripts",
    {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": meta(4, 3072)},
    "is a LoRA .* for Flux",
    "lora",
    "flux",
)
_names(
    "a LoRA of Flux by PEFT",
    "diffusers",
    {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": meta(4, 3072)},
    "is a LoRA .* for Flux",
    "lora",
    "flux",
)
_names(
    "an embedding of 1.x",
    "A1111",
    {"emb_params": meta(4, 768)},
    "is a textual inversion for Stable Diffusion 1.x",
    "embedding",
    "sd1",
)
_names(
    "an embedding of 2.x",
    "A1111",
    {"emb_params": meta(4, 1024)},
    "is a textual inversion for Stable Diffusion 2.x",
    "embedding",
    "sd2",
)
_names(
    "an embedding of XL",
    "ComfyUI",
    {"clip_l": meta(4, 768), "clip_g": meta(4, 1280)},
    "is a textual inversion for SDXL",
    "embedding",
    "sdxl",
)
_names(
    "an embedding by its token",
    "diffusers' learned_embeds",
    {"<cat-toy>": meta(768)},
    "is a textual inversion for Stable Diffusion 1.x",
    "embedding",
    "sd1",
)
# Controls.
_ATTN2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_names(
    "a ControlNet by diffusers",
    "control_v11p_sd15_canny",
    {"controlnet_cond_embedding.conv_in.weight": meta(16, 3, 3, 3), _ATTN2: meta(640, 768)},
    r"is a ControlNet \(diffusers' names\) for Stable Diffusion 1.x",
    "controlnet",
    "sd1",
)
_names(
    "a ControlNet of XL",
    "diffusers/controlnet-canny-sdxl-1.0",
    {"controlnet_cond_embedding.conv_in.weight": meta(16, 3, 3, 3), _ATTN2: meta(640, 2048)},
    "is a ControlNet .* for SDXL",
    "controlnet",
    "sdxl",
)
_names(
    "a ControlNet by its first names",
    "control_v11p_sd15_canny.pth",
    {
        "control_model.zero_convs.0.0.weight": meta(320, 320, 1, 1),
        "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": meta(320, 768),
    },
    r"is a ControlNet \(original names\) for Stable Diffusion 1.x",
    "controlnet",
    "sd1",
)
_names(
    "a ControlNet Union",
    "xinsir's controlnet-union-sdxl",
    {
        "task_embedding": meta(6, 320),
        "controlnet_cond_embedding.conv_in.weight": meta(48, 3, 3, 3),
        _ATTN2: meta(640, 2048),
    },
    r"is a ControlNet \(Union\) for SDXL",
    "controlnet",
    "sdxl",
)
_names(
    "a control-LoRA",
    "Stability's control-lora",
    {
        "lora_controlnet": meta(0),
        "input_blocks.1.0.in_layers.2.up": meta(4, 4),
        "input_hint_block.0.weight": meta(16, 3, 3, 3),
    },
    "is a control-LoRA",
    "controlnet",
)
_names(
    "LLLite",
    "sd-scripts",
    {
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight": meta(
            16, 3, 4, 4
        )
    },
    "is a ControlNet-LLLite",
    "unusable-control",
)
_names(
    "ControlNet-XS",
    "diffusers",
    {"down_blocks.0.base_to_ctrl.0.weight": meta(4, 4, 1, 1)},
    "is a ControlNet-XS",
    "unusable-control",
)
_names(
    "a T2I-Adapter",
    "TencentARC",
    {"conv_in.weight": meta(320, 192, 3, 3), "body.0.block1.weight": meta(320, 320, 3, 3)},
    "is a T2I-Adapter",
    "t2i-adapter",
)
_names(
    "a T2I-Adapter by diffusers",
    "diffusers",
    {
        "adapter.conv_in.weight": meta(320, 192, 3, 3),
        "adapter.body.0.resnets.0.block1.weight": meta(320, 320, 3, 3),
    },
    "is a T2I-Adapter",
    "t2i-adapter",
)
_names(
    "an IP-Adapter",
    "h94/IP-Adapter",
    {"image_proj.proj.weight": meta(3072, 1024), "ip_adapter.1.to_k_ip.weight": meta(320, 768)},
    "is an IP-Adapter for Stable Diffusion 1.x",
    "ip-adapter",
    "sd1",
)
# Parts, and other models.
_names(
    "an autoencoder alone",
    "vae-ft-mse-840000",
    {"encoder.conv_in.weight": meta(32, 3, 3, 3), "decoder.conv_in.weight": meta(32, 4, 3, 3)},
    "is an autoencoder alone.*--vae",
    "vae",
)
_names(
    "an autoencoder of lightning",
    "kl-f8-anime2",
    {"first_stage_model.encoder.conv_in.weight": meta(32, 3, 3, 3)},
    "is an autoencoder alone",
    "vae",
)
_names(
    "TAESD by diffusers",
    "madebyollin/taesd",
    {"decoder.layers.0.weight": meta(64, 4, 3, 3), "encoder.layers.0.weight": meta(64, 3, 3, 3)},
    "is a tiny autoencoder.*--tiny-vae",
    "tiny-vae",
)
_names(
    "TAESD's decoder",
    "taesd_decoder",
    {"1.weight": meta(64, 4, 3, 3), "1.bias": meta(64), "3.conv.0.weight": meta(64, 64, 3, 3)},
    "is a tiny autoencoder",
    "tiny-vae",
)
_names(
    "a UNet by diffusers",
    "diffusion_pytorch_model.safetensors",
    {
        "conv_in.weight": meta(320, 4, 3, 3),
        _ATTN2: meta(640, 2048),
        "down_blocks.0.resnets.0.conv1.weight": meta(320, 320, 3, 3),
    },
    "is a UNet alone for SDXL",
    "unet",
    "sdxl",
)
_names(
    "a UNet by its first names",
    "ComfyUI's unet folder",
    {
        "input_blocks.0.0.weight": meta(320, 4, 3, 3),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": meta(1280, 768),
    },
    "is a UNet alone for Stable Diffusion 1.x",
    "unet",
    "sd1",
)
_names(
    "a text encoder alone",
    "model.safetensors of text_encoder",
    {
        "text_model.embeddings.token_embedding.weight": meta(9, 768),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": meta(768, 768),
    },
    "is a text encoder alone",
    "text-encoder",
    "sd1",
)
_names(
    "an image encoder alone",
    "IP-Adapter's image_encoder",
    {"vision_model.pre_layrnorm.weight": meta(1280)},
    "is an image encoder alone",
    "image-encoder",
)
_names(
    "T5",
    "ComfyUI's clip folder",
    {"encoder.block.0.layer.0.SelfAttention.q.weight": meta(64, 64)},
    "is a T5 text encoder",
    "text-encoder",
)
_names("Flux", "flux1-dev", {"double_blocks.0.img_attn.norm.key_norm.scale": meta(128)}, "is Flux", "other")
_names(
    "Flux, a whole checkpoint",
    "Comfy-Org/flux1-dev",
    {f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale": meta(128)},
    "is Flux",
    "other",
)
_names(
    "Stable Diffusion 3",
    "sd3_medium_incl_clips",
    {f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias": meta(4)},
    "is Stable Diffusion 3",
    "other",
)
_names("Stable Cascade", "stage_c", {"clip_txt_mapper.weight": meta(4, 4)}, "is Stable Cascade", "other")
_names(
    "PixArt",
    "PixArt-XL-2-1024-MS",
    {"y_embedder.y_embedding": meta(120, 4096), "blocks.0.attn.qkv.weight": meta(4, 4)},
    "diffusion transformer",
    "other",
)
_names(
    "AnimateDiff",
    "mm_sd_v15",
    {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": meta(320)},
    "is AnimateDiff",
    "animatediff",
)
_names(
    "ESRGAN",
    "RealESRGAN_x4plus",
    {"model.0.weight": meta(64, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": meta(32, 64, 3, 3)},
    "is an upscaler",
    "upscaler",
)
_names(
    "one layer of something",
    "any file",
    {"fc1.weight": meta(4, 4), "fc2.weight": meta(4, 4)},
    r"is no kind that is known \(fc1.weight, fc2.weight …\)",
    "unknown",
)
_names("no tensors", "an empty state dict", {}, "it has no tensors", "unknown")


def _other_folder(config: dict[str, Any] | None, name: str = "config.json") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "thing").mkdir()
        if config is not None:
            (folder / "thing" / name).write_text(json.dumps(config))
        return folder / "thing"

    return make


def _folder_of_file(folder: Path) -> Path:
    (folder / "models").mkdir()
    write(folder / "models" / "Dream.SAFETENSORS", stored("sd1"))
    return folder / "models"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


_refused("a pipe", "a shell's <(…)", _pipe, "model_index.json is missing, and there is no", "damaged")
_refused(
    "a ControlNet's folder",
    "diffusers",
    _other_folder({"_class_name": "ControlNetModel"}),
    "is a ControlNet's folder",
    "controlnet",
)
_refused(
    "an autoencoder's folder",
    "sd-vae-ft-mse",
    _other_folder({"_class_name": "AutoencoderKL"}),
    "is an autoencoder's folder",
    "vae",
)
_refused(
    "a text encoder's folder",
    "transformers",
    _other_folder({"architectures": ["CLIPTextModel"]}),
    "is a text encoder's folder",
    "text-encoder",
)
_refused(
    "PEFT's folder",
    "peft's save_pretrained",
    _other_folder({"peft_type": "LORA"}, "adapter_config.json"),
    "is a PEFT adapter's folder",
    "lora",
)
_refused(
    "an empty folder",
    "a download that never began",
    _other_folder(None),
    "model_index.json is missing, and there is no",
    "damaged",
)
_refused(
    "a folder of one file",
    "hf download of a single-file repository",
    _folder_of_file,
    r"is a folder of files \(Dream.SAFETENSORS\), without model_index.json",
    "files",
)
_refused(
    "a folder of another family",
    "diffusers",
    _other_folder({"_class_name": "FluxPipeline"}, "model_index.json"),
    "holds Flux",
    "checkpoint",
)
