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
- attention's precision in 2.x. 2.1 needs float32 scores and 2.0 is not harmed, so `upcast_attention` is on;
- how Stable unCLIP's image embeddings are spread. The larger model, of ViT-H, was trained without
  normalising them: its mean is 0 and its deviation 1. The smaller's are in its folder alone, so its file is
  refused unless somebody put them in (`noise_augmentor.data_mean`, `data_std`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, UsageError, command
from ...engines.safetensors_format import read_header
from ...engines.spec import TEXT_ENCODERS
from .component import Component, TensorHeader, read_headers
from .derived_configs import (
    CLIP_PROCESSOR,
    GUIDANCE,
    is_vae,
    text_config,
    unet_config,
    vae_config,
    vision_config,
)
from .file_kinds import kind_of_tensors, refuse_other_formats, refuse_other_kinds
from .ldm_names import (
    TEXT,
    UNET,
    averaged_name,
    class_unet_tensors,
    clip_tensors,
    open_clip_tensors,
    open_clip_vision_tensors,
    unet_tensors,
    usual_names,
    vae_tensors,
)
from .leftovers import HARMLESS, unread_metadata, unused_tensors
from .quantised import refuse_markers, refuse_types

Tensors = Mapping[str, TensorHeader]
Naming = Callable[[Tensors], dict[str, TensorHeader]]

VAE = "first_stage_model."
VISION = "embedder.model.visual."
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
_ARCHITECTURE = "modelspec.architecture"
_MODELSPEC_2 = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
# Nothing says what the UNet predicts, and the family has models of both kinds.
ASSUMED = "assumption"
# Tensors that say how a UNet was trained: it predicts v; its schedule ends without signal.
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
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
# A UNet with a guidance embedding is a latent consistency model's, whatever its family.
_LCM_SCHEDULER = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
# Stable unCLIP, as published in both models' folders: noise on embeddings, the colours of CLIP's pictures.
_UNCLIP_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "image_noising_scheduler": {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
    },
    "feature_extractor": CLIP_PROCESSOR,
}
# Zeros and ones, as many as the widest image embedding has: what ViT-H's embeddings are normalised with.
_UNIT_NORMALIZER = Path(__file__).parent / "unit_normalizer.safetensors"
_UNIT_WIDTH = 1024
_SMALL_WIDTH = 768  # of the smaller model's image embeddings, ViT-L's
_SMALL_UNCLIP = "stabilityai/stable-diffusion-2-1-unclip-small"
_NORMALIZER = {"mean": "noise_augmentor.data_mean", "std": "noise_augmentor.data_std"}


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A checkpoint in one file.

    Attributes:
        family: "sd1", "sd2", "sdxl", "sdxl-refiner" or "unclip".
        components: "unet", "vae" (it may be missing where another takes its place), and the family's text
            encoders: "text_encoder", "text_encoder_2"; unCLIP's "image_encoder" and "image_normalizer".
        scaling_factor: of the family's autoencoders.
        configs: what a folder would have as JSON, by the folders' names: "scheduler", and unCLIP's others.
        tokenizers: a tokenizer's folder -> the token that fills short prompts. CLIP's vocabulary is implied.
        predicts_by: what says which type the UNet predicts: "the tensor v_pred", ….
        notes: for the user: what was assumed, and which tensors and metadata are not used.
    """

    family: str
    components: Mapping[str, Component]
    scaling_factor: float
    configs: Mapping[str, Mapping[str, Any]]
    tokenizers: Mapping[str, str]
    predicts_by: str
    notes: tuple[str, ...]

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """What a folder would have as `scheduler_config.json`."""
        return self.configs["scheduler"]


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
    unet_naming: Naming = unet_tensors
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    sees: bool = False  # it has an image encoder

    @property
    def places(self) -> dict[str, tuple[str, Naming]]:
        """Each part's prefix in the file, and what its tensors are called in diffusers."""
        seen = {"image_encoder": (VISION, open_clip_vision_tensors)} if self.sees else {}
        return {
            **{name: (encoder.prefix, encoder.naming) for name, encoder in self.encoders.items()},
            **seen,
            "unet": (UNET, self.unet_naming),
            "vae": (VAE, vae_tensors),
        }


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
_SD2 = _Family(
    encoders={"text_encoder": _open_clip("cond_stage_model", _penultimate, projects=False)},
    scheduler={"_class_name": "DDIMScheduler"},
    unet={"upcast_attention": True},
)
_FAMILIES: Mapping[str, _Family] = {
    "sd1": _Family(
        encoders={"text_encoder": _clip("cond_stage_model")},
        scheduler={"_class_name": "PNDMScheduler"},
        head_size=None,
    ),
    "sd2": _SD2,
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
    "unclip": replace(
        _SD2,
        scheduler={"_class_name": "PNDMScheduler"},
        unet_naming=class_unet_tensors,
        configs=_UNCLIP_CONFIGS,
        sees=True,
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
        CheckpointError: a damaged file, a pickle, quantised weights, another family or kind (named), or a
            part that is missing.
        UsageError: an unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    refuse_other_formats(path)
    stored, metadata = read_headers(path), read_header(path).metadata
    tensors = usual_names(stored)
    refuse_other_kinds(path, tensors, metadata)
    refuse_markers(path, tensors)
    refuse_types(path, _under(tensors, UNET))  # before a shape is found odd; other parts are checked later
    name = family_of(tensors)
    family = _FAMILIES[name]
    parts = _parts(path, tensors, family, without_vae=without_vae)
    if without_vae and not is_vae(parts.get("vae", {})):
        parts.pop("vae", None)
    predicts, predicts_by = _prediction(path, name, stored, metadata, prediction_type)
    try:
        configs = _configs(parts, family, v_768=family.unet == _SD2.unet and predicts == "v_prediction")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.found}", expected=error.expected, fix=error.fix) from error
    components = {
        part: Component(name=part, folder=path, config=configs[part], tensors=found)
        for part, found in parts.items()
    }
    scheduler = {**_SCHEDULE, **family.scheduler, "prediction_type": predicts}
    if GUIDANCE in parts["unet"]:
        scheduler |= _LCM_SCHEDULER
    if _ZERO_SNR in tensors:
        scheduler["rescale_betas_zero_snr"] = True
    return SingleFile(
        family=name,
        components=components,
        scaling_factor=family.scaling_factor,
        configs={"scheduler": scheduler, **family.configs},
        tokenizers={TEXT_ENCODERS[part]: encoder.pad_token for part, encoder in family.encoders.items()},
        predicts_by=predicts_by,
        notes=_notes(stored, parts, metadata, predicts_by, predicts),
    )


def open_vae_file(path: Path, *, scaling_factor: float = _SD_SCALING) -> Component:
    """Read the autoencoder from the header of its own file or of a whole checkpoint.

    Args:
        path: a `.safetensors` file by latent-diffusion's or diffusers' names.
        scaling_factor: 0.18215 in 1.x and 2.x, 0.13025 in XL. No tensor says it.

    Raises:
        CheckpointError: a damaged file, a pickle, or no autoencoder of this family.
    """
    refuse_other_formats(path)
    stored = usual_names(read_headers(path))
    tensors = _under(stored, next((prefix for prefix in (VAE, "vae.") if any_under(stored, prefix)), ""))
    if not any_under(tensors, "encoder.down_blocks."):
        tensors = vae_tensors(tensors)
    try:
        config = vae_config(tensors)
    except CheckpointError as error:
        kind = kind_of_tensors(stored)
        named = "" if kind.name == "vae" else f" but {kind.what}"
        raise CheckpointError(
            f"{path} is no autoencoder{named} ({error.found})",
            expected="the AutoencoderKL of a Stable Diffusion checkpoint",
            fix="Check which file it is; a tiny autoencoder goes with --tiny-vae instead.",
        ) from error
    config["scaling_factor"] = scaling_factor
    return Component(name="vae", folder=path, config=config, tensors=tensors)


def _under(tensors: Tensors, prefix: str) -> dict[str, TensorHeader]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def any_under(tensors: Tensors, prefix: str) -> bool:
    """Whether a tensor's name begins so."""
    return any(name.startswith(prefix) for name in tensors)


def family_of(tensors: Tensors) -> str:
    """The family of a file with a UNet: by added conditions, text encoders, else by the UNet alone."""
    if any_under(tensors, VISION):
        return "unclip"
    if f"{UNET}label_emb.0.0.weight" in tensors:
        if any_under(tensors, TEXT):
            return "unclip"  # without the image encoder that it needs
        refines = any_under(tensors, "conditioner.embedders.0.model.")
        if not any_under(tensors, "conditioner."):
            refines = any_under(tensors, f"{UNET}input_blocks.9.")  # four levels instead of three
        return "sdxl-refiner" if refines else "sdxl"
    if any_under(tensors, TEXT):
        return "sd2" if any_under(tensors, f"{TEXT}model.") else "sd1"
    context = tensors.get(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    return "sd2" if context is not None and context.shape[-1:] == (1024,) else "sd1"


def parts_of(tensors: Tensors) -> dict[str, tuple[str, dict[str, TensorHeader]]]:
    """The prefix and the tensors of each part that a file of this family should have; a part may be missing.

    Nothing is refused: this is for saying what is there.
    """
    places = _FAMILIES[family_of(tensors)].places.items()
    return {name: (prefix, naming(_under(tensors, prefix))) for name, (prefix, naming) in places}


def _parts(
    path: Path, tensors: Tensors, family: _Family, *, without_vae: bool
) -> dict[str, dict[str, TensorHeader]]:
    """Each part's tensors by diffusers' names. Raises CheckpointError for missing parts, unknown tensors."""
    places = family.places
    lacking = {name: place for name, (place, _) in places.items() if not any_under(tensors, place)}
    if without_vae and lacking.pop("vae", None):
        del places["vae"]
    if lacking:
        words = ", ".join(f"{name} ({place}*)" for name, place in lacking.items())
        another = command("latentrt", "generate", "PROMPT", "-m", path, "--vae", "VAE")
        raise CheckpointError(
            f"{path} has no {words}",
            expected=f"{', '.join(places)} in one file",
            fix=f"Name an autoencoder: {another}" if list(lacking) == ["vae"] else _FIX,
        )
    parts = {name: naming(_under(tensors, prefix)) for name, (prefix, naming) in places.items()}
    known = {tensor.name for tensor in parts["unet"].values()}
    surplus = [tensor.name for name, tensor in tensors.items() if name.startswith(UNET)]
    if surplus := [name for name in surplus if name not in known and not HARMLESS.search(name)]:
        raise CheckpointError(
            f"{path} has {len(surplus)} tensors that no Stable Diffusion UNet has ({surplus[0][:200]})",
            expected="a UNet without additions",
            fix="Use a diffusers folder of this model, if its family is supported.",
        )
    if family.sees:
        parts["image_normalizer"] = _normalizer(path, tensors, parts["image_encoder"])
    return parts


def _normalizer(path: Path, tensors: Tensors, encoder: Tensors) -> dict[str, TensorHeader]:
    """Mean and deviation of image embeddings, (1, C) each: the file's, or ViT-H's, which are 0 and 1."""
    stored = {name: tensors[theirs] for name, theirs in _NORMALIZER.items() if theirs in tensors}
    if len(stored) == len(_NORMALIZER):
        return stored
    width = encoder["visual_projection.weight"].shape[0] if "visual_projection.weight" in encoder else 0
    if width == _SMALL_WIDTH or not 0 < width <= _UNIT_WIDTH:
        raise CheckpointError(
            f"{path} has no statistics of its image embeddings ({', '.join(_NORMALIZER.values())})",
            expected="those of the model's image_normalizer",
            fix=f"Use its folder: {command('hf', 'download', _SMALL_UNCLIP, '--local-dir', 'FOLDER')}",
        )
    return {
        name: replace(header, rows=(0, width), shape=(1, width))
        for name, header in read_headers(_UNIT_NORMALIZER).items()
    }


def _configs(parts: Mapping[str, Tensors], family: _Family, *, v_768: bool) -> dict[str, dict[str, Any]]:
    """The parts' configs. `v_768`: the model is like 2.1, which predicts v and was trained at 768 pixels."""
    configs = {
        name: text_config(parts[name], hidden_act=encoder.hidden_act, projects=encoder.projects)
        for name, encoder in family.encoders.items()
    }
    pooled = configs.get("text_encoder_2", {}).get("projection_dim", 0)
    size = 96 if v_768 else family.sample_size
    unet = unet_config(parts["unet"], head_size=family.head_size, ids=family.ids, pooled=pooled)
    configs["unet"] = {**unet, **family.unet, "sample_size": size}
    if "image_encoder" in parts:
        vision = vision_config(parts["image_encoder"], hidden_act="gelu")
        small = vision["projection_dim"] == _SMALL_WIDTH  # OpenAI's ViT-L
        configs["image_encoder"] = {**vision, "hidden_act": "quick_gelu" if small else "gelu"}
        configs["image_normalizer"] = {
            "_class_name": "StableUnCLIPImageNormalizer",
            "embedding_dim": vision["projection_dim"],
        }
    if "vae" in parts:
        sizes = {"sample_size": 8 * size, "scaling_factor": family.scaling_factor}
        configs["vae"] = {**vae_config(parts["vae"]), **sizes}
    return configs


def _prediction(
    path: Path, family: str, stored: Tensors, metadata: Mapping[str, str], given: str | None
) -> tuple[str, str]:
    """What the UNet predicts, and what says so."""
    if given is not None:
        return given, "the caller"
    if said := _stated_prediction(path, usual_names(stored), metadata):
        return said
    if family not in ("sd2", "unclip"):
        return "epsilon", "the default of its family"
    inpaints = usual_names(stored)[f"{UNET}input_blocks.0.0.weight"].shape[1] == 9
    turbo = any("conditioner.embedders." in tensor for tensor in stored)
    return ("epsilon" if inpaints or turbo else "v_prediction"), ASSUMED


def _stated_prediction(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """What a file says that its UNet predicts, and where.

    Raises:
        CheckpointError: it says what no sampler is for.
    """
    if _V_PREDICTION in tensors:
        return "v_prediction", f"the tensor {_V_PREDICTION}"
    for key in _NOTED:
        if noted := metadata.get(key, "").strip().lower():
            if noted not in _NOTED_PREDICTIONS:
                raise CheckpointError(
                    f"{path} says {noted[:80]!r} under {key}, where a file says what its UNet predicts",
                    expected=" or ".join(PREDICTION_TYPES),
                    fix="Pass --prediction-type if you know better.",
                )
            return _NOTED_PREDICTIONS[noted], f"the metadata {key}"
    said = _MODELSPEC_2.get(metadata.get(_ARCHITECTURE, "").lower())
    return (said, f"the metadata {_ARCHITECTURE}") if said else None


def _notes(
    stored: Tensors,
    parts: Mapping[str, Tensors],
    metadata: Mapping[str, str],
    predicts_by: str,
    predicts: str,
) -> tuple[str, ...]:
    """What a user should know: what was assumed, what is used in place of what, what is not used."""
    notes: list[str] = []
    if any(averaged_name(tensor.name) for tensor in parts["unet"].values()):
        notes.append("averaged weights (model_ema.*) are the UNet: the file has no others")
    if predicts_by == ASSUMED:
        notes.append(f"it does not say what its UNet predicts: {predicts} is assumed")
    used = {tensor.name for part in parts.values() for tensor in part.values()}
    unused = [name for name in stored if name not in used and name not in (_V_PREDICTION, _ZERO_SNR)]
    read = (*_NOTED, _ARCHITECTURE)
    return (*notes, *unused_tensors(unused), *unread_metadata(metadata, read))
