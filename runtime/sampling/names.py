"""How people spell samplers, and what each spelling means.

Accepted: the short names of this package, AUTOMATIC1111's ("DPM++ 2M Karras"), diffusers' classes
("EulerDiscreteScheduler"), ComfyUI's and stable-diffusion.cpp's ("dpm++2m", "euler_a", "ddim_trailing"), in
any case, with or without spaces, and a sigma schedule behind the name ("karras", "exponential", "beta", "sgm
uniform").
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from ...engines.errors import SamplerError
from .config import SCHEDULER_CLASSES, SamplerConfig, config_for_class

Preset: TypeAlias = tuple[str, dict[str, Any]]

_MULTI, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"


def _dpm(scheduler: str, order: int, algorithm: str, **more: Any) -> Preset:
    options: dict[str, Any] = {"solver_order": order, "algorithm_type": algorithm, **more}
    if "++" not in algorithm:  # noise prediction divides by the final sigma
        options["final_sigmas_type"] = "sigma_min"
    return scheduler, options


# short name -> (diffusers class, options it sets); everything else comes from the model's scheduler config
PRESETS: dict[str, Preset] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm_solver_1m": _dpm(_MULTI, 1, "dpmsolver"),
    "dpm_solver_2m": _dpm(_MULTI, 2, "dpmsolver"),
    "dpm_solver_3m": _dpm(_MULTI, 3, "dpmsolver"),
    "dpm_solver_1s": _dpm(_SINGLE, 1, "dpmsolver"),
    "dpm_solver_2s": _dpm(_SINGLE, 2, "dpmsolver"),
    "dpm_solver_3s": _dpm(_SINGLE, 3, "dpmsolver"),
    "dpm_solver_1m_sde": _dpm(_MULTI, 1, "sde-dpmsolver"),
    "dpm_solver_2m_sde": _dpm(_MULTI, 2, "sde-dpmsolver"),
    "dpmpp_1m": _dpm(_MULTI, 1, "dpmsolver++"),
    "dpmpp_2m": _dpm(_MULTI, 2, "dpmsolver++"),
    "dpmpp_3m": _dpm(_MULTI, 3, "dpmsolver++"),
    "dpmpp_1s": _dpm(_SINGLE, 1, "dpmsolver++"),
    "dpmpp_2s": _dpm(_SINGLE, 2, "dpmsolver++"),
    "dpmpp_3s": _dpm(_SINGLE, 3, "dpmsolver++"),
    "dpmpp_1m_sde": _dpm(_MULTI, 1, "sde-dpmsolver++"),
    "dpmpp_2m_sde": _dpm(_MULTI, 2, "sde-dpmsolver++"),
    "dpmpp_3m_sde": _dpm(_MULTI, 3, "sde-dpmsolver++"),
    # not in diffusers; it visits the levels of the other ancestral sampler of k-diffusion
    "dpmpp_2s_a": ("EulerAncestralDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}

# Further spellings, squeezed (see `_squeeze`) -> (short name, options on top of its own)
_ALIASES: dict[str, Preset] = {
    "eulerancestral": ("euler_a", {}),
    "dpm2ancestral": ("dpm2_a", {}),
    "dpmpp2sancestral": ("dpmpp_2s_a", {}),
    "dpmsolver1": ("dpm_solver_1m", {}),
    "dpmsolver2": ("dpm_solver_2m", {}),
    "dpmsolver3": ("dpm_solver_3m", {}),
    "dpmsolverpp": ("dpmpp_2m", {}),
    "dpmsolvermultistep": ("dpmpp_2m", {}),
    "dpmsolversinglestep": ("dpmpp_2s", {}),
    "dpmpp2mheun": ("dpmpp_2m", {"solver_type": "heun"}),
    "dpmpp2msdeheun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "deis2": ("deis", {"solver_order": 2}),
    "deis3": ("deis", {"solver_order": 3}),
    "unipc2": ("unipc", {"solver_order": 2}),
    "unipc3": ("unipc", {"solver_order": 3}),
    "unipcbh1": ("unipc", {"solver_type": "bh1"}),
    "unipcbh2": ("unipc", {"solver_type": "bh2"}),
}

# What may stand behind a name -> the field it sets; the empty suffix leaves the model's own.
_SUFFIXES: dict[str, dict[str, str]] = {
    "": {},
    "karras": {"sigma_schedule": "karras"},
    "exponential": {"sigma_schedule": "exponential"},
    "beta": {"sigma_schedule": "beta"},
    "sgmuniform": {"timestep_spacing": "trailing"},
    "trailing": {"timestep_spacing": "trailing"},
}
# field -> classes on which it has no meaning
_WITHOUT = {
    "sigma_schedule": ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler"),
    "timestep_spacing": (_SINGLE, "LCMScheduler", "TCDScheduler"),
}

_TWO_NOISES = "draws more than one noise per UNet call"
_STAGE_NOISE = "would have to remember the noise of a stage"
_ADAPTIVE = "chooses its steps while it runs"
_GUIDED = "treats the unconditional prediction apart"
# Squeezed name -> why no table can hold it.
REFUSED: dict[str, str] = {
    "dpmppsde": _TWO_NOISES,
    "dpmsolversde": _TWO_NOISES,
    "restart": _TWO_NOISES,
    "dpmpp1ssde": _STAGE_NOISE,
    "dpmpp2ssde": _STAGE_NOISE,
    "dpmpp3ssde": _STAGE_NOISE,
    "dpmsolver3msde": "has no published third-order update",
    "dpmadaptive": _ADAPTIVE,
    "dpmfast": _ADAPTIVE,
    "ddimcfgpp": _GUIDED,
    "eulercfgpp": _GUIDED,
    "euleracfgpp": _GUIDED,
}

# What the model was trained with; a partial scheduler dict takes these from the model.
_MODEL_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def resolve(sampler: str | Mapping[str, Any] | None, model_config: Mapping[str, Any]) -> SamplerConfig:
    """Settle which sampler runs, with which options.

    Args:
        sampler: None for the model's own scheduler; a name, which behaves like diffusers'
            `XScheduler.from_config(model_config)`; or a diffusers scheduler config. Of the latter, what the
            model was trained with (betas, prediction type) may be left out.
        model_config: the checkpoint's scheduler_config.json.

    Raises:
        SamplerError: an unknown name (with the closest known ones), an option no table can express, or a
            config whose values are of the wrong type.
    """
    try:
        config = _resolve(sampler, model_config)
        hash(config)
        _ = config.noise.alpha_bar  # the betas are read here, not in the middle of a request
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SamplerError(
            f"sampler {sampler!r:.80} with the model's scheduler config: {error}",
            expected="a sampler's name, or a scheduler_config.json of diffusers",
            fix="Pass a sampler by name, for example sampler='dpmpp_2m'.",
        ) from error
    _refuse_outside(config.name)
    return config


def _resolve(sampler: str | Mapping[str, Any] | None, model_config: Mapping[str, Any]) -> SamplerConfig:
    if sampler is None:
        return _from_config(model_config)
    if isinstance(sampler, Mapping):
        model = {key: model_config[key] for key in _MODEL_KEYS if key in model_config}
        return _from_config({**model, **sampler})
    if sampler in SCHEDULER_CLASSES:
        return config_for_class(sampler, model_config)
    return _from_name(sampler, model_config)


def _from_name(spelled: str, model_config: Mapping[str, Any]) -> SamplerConfig:
    name, options, suffix = _lookup(spelled)
    scheduler, own = PRESETS[name]
    for field in suffix:
        if scheduler in _WITHOUT[field]:
            raise SamplerError(
                f"sampler {spelled!r}: {name} has no {field}",
                expected=f"{name} alone, or that {field} with another sampler",
                fix=f"Use sampler={name!r}.",
            )
    # Latent models never clip: the class default of DDPM and DDIM is meant for pixels.
    config = config_for_class(scheduler, {"clip_sample": False, **model_config, **own, **options}, name)
    return replace(config, **suffix)


def _from_config(config: Mapping[str, Any]) -> SamplerConfig:
    scheduler = str(config.get("_class_name"))
    if scheduler not in SCHEDULER_CLASSES:
        _refuse_outside(scheduler.removesuffix("Scheduler"))
        raise SamplerError(
            f"scheduler class {scheduler!r}",
            expected=", ".join(SCHEDULER_CLASSES),
            fix="Pass a sampler by name, for example sampler='dpmpp_2m'.",
        )
    return config_for_class(scheduler, config)


def _refuse_outside(name: str) -> None:
    reason = REFUSED.get(_squeeze(name))
    if reason is not None:
        raise SamplerError(
            f"sampler {name!r}, which {reason}",
            expected="one that can be written as a coefficient table: " + ", ".join(PRESETS),
            fix="The nearest are dpmpp_2m_sde (with noise) and dpmpp_2m (without).",
        )


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


_KNOWN: dict[str, Preset] = {_squeeze(name): (name, dict[str, Any]()) for name in PRESETS} | _ALIASES


def _lookup(spelled: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Short name, options and suffix of a spelling; a schedule may follow the name, and a "k_" precede it."""
    squeezed = _squeeze(spelled)
    for suffix, fields in _SUFFIXES.items():
        base = squeezed.removesuffix(suffix)
        for candidate in (base, base.removeprefix("k")):
            if candidate in _KNOWN:
                return *_KNOWN[candidate], fields
        _refuse_outside(base)
    close = difflib.get_close_matches(squeezed, _KNOWN, n=3)
    names = dict.fromkeys(_KNOWN[match][0] for match in close)
    raise SamplerError(
        f"sampler {spelled!r}",
        expected=", ".join(PRESETS),
        fix=f"Did you mean {' or '.join(names)}?" if names else "Choose one of these.",
    )
