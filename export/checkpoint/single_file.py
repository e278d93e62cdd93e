"""One-file checkpoints (`.safetensors`): recognised by names and shapes, and taken apart into components.

The result is what a diffusers folder of the same model would give: configs, and tensors by diffusers' names
that stay where they are in the file. The keys that tell families apart are those of diffusers'
`single_file_utils.py`.

No tensor says

- whether 2.x predicts the noise or v. `modelspec.*` metadata and the marker tensor `v_pred` are believed.
  Without them v is assumed, except for inpainting, as in diffusers (whose configs are the 768-pixel 2.1's);
- the noise schedule. All families were trained with the same betas; the marker `ztsnr` rescales them;
- attention's precision in 2.x. 2.1 needs float32 scores and 2.0 is not harmed, so `upcast_attention` is on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engines.errors import CheckpointError, UsageError
from .component import Component
from .derived_configs import text_config, unet_config, vae_config
from .file_kinds import UNET, refuse_other_kinds, refuse_pickle
from .ldm_names import clip_tensors, open_clip_tensors, unet_tensors, vae_tensors
from .tensors import TensorHeader, read_headers, read_metadata

Tensors = Mapping[str, TensorHeader]
Naming = Callable[[Tensors], dict[str, TensorHeader]]

VAE = "first_stage_model."
PREDICTION_TYPES = ("epsilon", "v_prediction")
_SD_SCALING = 0.18215
_FIX = "Use the complete checkpoint; other tools also write files without text encoders or autoencoder."
_MODELSPEC_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_MODELSPEC_2 = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
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
    "timestep_spacing": "leading",
}


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A checkpoint in one file.

    Attributes:
        family: "sd1", "sd2", "sdxl" or "sdxl-refiner".
        components: "unet", "vae", and the family's text encoders: "text_encoder", "text_encoder_2".
        scheduler: what a folder would have as `scheduler_config.json`.
        tokenizers: a tokenizer's folder -> the token that fills short prompts. CLIP's vocabulary is implied.
        notes: for the user: what was assumed, and which weights are not used.
    """

    family: str
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
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
    return _Encoder(
        prefix=f"{prefix}.transformer.",
        naming=clip_tensors,
        hidden_act="quick_gelu",
        pad_token="<|endoftext|>",  # noqa: S106 (no password)
    )


def _open_clip(prefix: str, naming: Naming, *, projects: bool) -> _Encoder:
    """The place of a ViT-H or ViT-bigG. OpenCLIP fills short prompts with id 0, the token "!"."""
    return _Encoder(
        prefix=f"{prefix}.model.",
        naming=naming,
        hidden_act="gelu",
        pad_token="!",  # noqa: S106
        projects=projects,
    )


_EULER: Mapping[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "use_karras_sigmas": False,
}
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
    "sdxl": _Family(
        encoders={
            "text_encoder": _clip("conditioner.embedders.0"),
            "text_encoder_2": _open_clip("conditioner.embedders.1", open_clip_tensors, projects=True),
        },
        scheduler=_EULER,
        sample_size=128,
        scaling_factor=0.13025,
    ),
    "sdxl-refiner": _Family(
        encoders={"text_encoder_2": _open_clip("conditioner.embedders.0", open_clip_tensors, projects=True)},
        scheduler=_EULER,
        sample_size=128,
        ids=5,
        scaling_factor=0.13025,
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


def open_single_file(path: Path, *, prediction_type: str | None = None) -> SingleFile:
    """Read the header of a one-file checkpoint.

    Args:
        path: a `.safetensors` file with UNet, text encoders and autoencoder.
        prediction_type: "epsilon" or "v_prediction"; None is what the file says, or its family's default.

    Raises:
        CheckpointError: a damaged file, a pickle, another family or kind (named), or a part that is missing.
        UsageError: an unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    refuse_pickle(path)
    tensors = read_headers(path)
    refuse_other_kinds(path, tensors)
    name = _family(tensors)
    family = _FAMILIES[name]
    parts = _parts(path, tensors, family)
    notes: list[str] = []
    if averages := sum(tensor.startswith("model_ema.") for tensor in tensors):
        notes.append(f"{averages} tensors model_ema.* (averaged weights) are not used")
    prediction_type = prediction_type or _stated_prediction(tensors, read_metadata(path))
    if prediction_type is None:
        inpaints = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1] == 9
        prediction_type = "v_prediction" if name == "sd2" and not inpaints else "epsilon"
        if name == "sd2":
            notes.append(f"it does not say what its UNet predicts: {prediction_type} is assumed")
    try:
        configs = _configs(parts, family, v_768=(name, prediction_type) == ("sd2", "v_prediction"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.found}", expected=error.expected, fix=error.fix) from error
    return SingleFile(
        family=name,
        components={
            part: Component(name=part, folder=path, config=configs[part], tensors=parts[part])
            for part in parts
        },
        scheduler={
            **_SCHEDULE,
            **family.scheduler,
            "prediction_type": prediction_type,
            **({"rescale_betas_zero_snr": True} if "ztsnr" in tensors else {}),
        },
        tokenizers={
            part.replace("text_encoder", "tokenizer"): encoder.pad_token
            for part, encoder in family.encoders.items()
        },
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
    prefix = next((p for p in (VAE, "vae.") if any(name.startswith(p) for name in stored)), "")
    tensors = _under(stored, prefix)
    if not any(name.startswith("encoder.down_blocks.") for name in tensors):
        tensors = vae_tensors(tensors)
    try:
        config = vae_config(tensors)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is no autoencoder ({error.found})",
            expected="the AutoencoderKL of a Stable Diffusion checkpoint",
            fix="Check which file it is; pass tiny autoencoders as --tiny-vae.",
        ) from error
    return Component(
        name="vae", folder=path, config={**config, "scaling_factor": scaling_factor}, tensors=tensors
    )


def _under(tensors: Tensors, prefix: str) -> dict[str, TensorHeader]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _any_under(tensors: Tensors, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


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


def _parts(path: Path, tensors: Tensors, family: _Family) -> dict[str, dict[str, TensorHeader]]:
    """Each part's tensors by diffusers' names. Raises CheckpointError for missing parts, unknown tensors."""
    places: dict[str, tuple[str, Naming]] = {
        **{name: (encoder.prefix, encoder.naming) for name, encoder in family.encoders.items()},
        "unet": (UNET, unet_tensors),
        "vae": (VAE, vae_tensors),
    }
    lacking = [
        f"{name} ({prefix}*)" for name, (prefix, _) in places.items() if not _any_under(tensors, prefix)
    ]
    if lacking:
        raise CheckpointError(
            f"{path} has no {', '.join(lacking)}", expected=f"{', '.join(places)} in one file", fix=_FIX
        )
    parts = {name: naming(_under(tensors, prefix)) for name, (prefix, naming) in places.items()}
    known = {tensor.name for tensor in parts["unet"].values()}
    if surplus := [name for name in tensors if name.startswith(UNET) and name not in known]:
        raise CheckpointError(
            f"{path} has {len(surplus)} tensors that no Stable Diffusion UNet has ({surplus[0][:200]})",
            expected="a UNet without additions",
            fix="Use a diffusers folder of this model, if its family is supported.",
        )
    return parts


def _configs(parts: Mapping[str, Tensors], family: _Family, *, v_768: bool) -> dict[str, dict[str, Any]]:
    """The parts' configs. `v_768`: the model is like 2.1, which predicts v and was trained at 768 pixels."""
    configs = {
        name: text_config(parts[name], hidden_act=encoder.hidden_act, projects=encoder.projects)
        for name, encoder in family.encoders.items()
    }
    pooled = configs.get("text_encoder_2", {}).get("projection_dim", 0)
    size = 96 if v_768 else family.sample_size
    unet = unet_config(parts["unet"], head_size=family.head_size, ids=family.ids, pooled=pooled)
    vae = vae_config(parts["vae"])
    return {
        **configs,
        "unet": {**unet, **family.unet, "sample_size": size},
        "vae": {**vae, "sample_size": 8 * size, "scaling_factor": family.scaling_factor},
    }


def _stated_prediction(tensors: Tensors, metadata: Mapping[str, str]) -> str | None:
    if "v_pred" in tensors:
        return "v_prediction"
    stated = _MODELSPEC_PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower())
    return stated or _MODELSPEC_2.get(metadata.get("modelspec.architecture", "").lower())
