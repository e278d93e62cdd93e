"""How people spell samplers, and what each spelling, or a diffusers `scheduler_config.json`, means.

Accepted: the short names of this package, AUTOMATIC1111's ("DPM++ 2M Karras"), diffusers' classes
("EulerDiscreteScheduler"), ComfyUI's and stable-diffusion.cpp's ("dpm++2m", "euler_a", "ddim_trailing"), in
any case, with or without spaces, and a schedule behind the name ("karras", "exponential", "beta",
"sgm uniform"; "linspace", "leading", "trailing"; "ays" for the steps that were published for the model).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from ...engines.errors import SamplerError
from ...engines.noise_schedule import ZERO_SNR_FLOOR, NoiseSchedule
from .config import SCHEDULER_CLASSES, SamplerConfig, refusal
from .samplers import SAMPLERS
from .step_lists import STEP_LISTS
from .table import PREDICTION_TYPES


class _Spelling(NamedTuple):
    """What a spelling means: a key of SAMPLERS, and options on top of the sampler's own."""

    name: str
    options: Mapping[str, Any]


def _squeeze(name: str) -> str:
    """Lower-case letters and digits; "++" becomes "pp"."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def _spellings() -> Iterator[tuple[str, _Spelling]]:
    for name, sampler in SAMPLERS.items():
        for spelled in (name, sampler.a1111 or name):
            yield _squeeze(spelled), _Spelling(name, {})
        for spelled, options in sampler.aliases.items():
            yield _squeeze(spelled), _Spelling(name, options)


_SPELLINGS = dict(_spellings())

# What may follow a name -> the field it sets; the empty suffix leaves the model's own.
_OF_MODEL = "of the model"  # stands for the step list that fits it
_SUFFIXES: dict[str, dict[str, str]] = {
    "": {},
    "karras": {"sigma_schedule": "karras"},
    "exponential": {"sigma_schedule": "exponential"},
    "beta": {"sigma_schedule": "beta"},
    "sgmuniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "ays": {"step_list": _OF_MODEL, "sigma_schedule": "default"},
    "alignyoursteps": {"step_list": _OF_MODEL, "sigma_schedule": "default"},
}
_IN_WORDS = {"step_list": "steps", "sigma_schedule": "sigmas", "timestep_spacing": "spacing"}

_TWO_NOISES = "draws more than one noise per UNet call"
_STAGE_NOISE = "would have to remember the noise of a stage"
_ADAPTIVE = "chooses its steps while it runs"
_GUIDED = "treats the unconditional prediction apart"
# Squeezed name -> why no table can hold it.
_REFUSED: dict[str, str] = {
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

# Keys that must hold these values: anything else makes the sampler non-linear, or is another kind of model.
_REQUIRED: dict[str, Any] = {
    "clip_sample": False,
    "thresholding": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "solver_p": None,
    "shift_terminal": None,
    "skip_prk_steps": True,
}
# A solver type meant for another class falls back to the class's own, as diffusers does.
_SOLVER_TYPE_NAMES = ("midpoint", "heun", "logrho", "bh1", "bh2")
_RAMP_KEYS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
_NOISE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")


def resolve(
    sampler: str | Mapping[str, Any] | None,
    model_config: Mapping[str, Any],
    step_list: str | None = None,
) -> SamplerConfig:
    """Settle which sampler runs, with which options.

    Args:
        sampler: None for the model's own scheduler; a name, which behaves like diffusers'
            `XScheduler.from_config(model_config)`; a diffusers scheduler config, which may leave out what
            the model was trained with (betas, prediction type); or what a picture's record has.
        model_config: the checkpoint's scheduler_config.json.
        step_list: what "ays" means for the model (`step_lists.list_of_model`).

    Raises:
        SamplerError: an unknown name (with the closest known ones), steps that were not published for the
            model, an option no table can express, or a
            config whose values are of the wrong type.
    """
    try:
        config = _resolve(sampler, model_config, step_list)
        hash(config)
        _ = config.noise.alpha_bar  # the betas are read here, not in the middle of a request
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise SamplerError(
            f"sampler {sampler!r:.80} with the model's scheduler config: {error}",
            expected="a sampler's name, or a scheduler_config.json of diffusers",
            fix="Pass a sampler by name, for example sampler='dpmpp_2m'.",
        ) from error
    _refuse_outside(config.name)
    return config


def _resolve(
    sampler: str | Mapping[str, Any] | None, model_config: Mapping[str, Any], step_list: str | None
) -> SamplerConfig:
    if sampler is None:
        return _from_config(model_config)
    if isinstance(sampler, Mapping) and "name" in sampler:
        return _from_record(sampler)
    if isinstance(sampler, Mapping):
        model = {key: model_config[key] for key in _MODEL_KEYS if key in model_config}
        return _from_config({**model, **sampler})
    if sampler in SCHEDULER_CLASSES:
        return _of_class(sampler, model_config)
    return _from_name(sampler, model_config, step_list)


def _from_name(spelled: str, model_config: Mapping[str, Any], step_list: str | None) -> SamplerConfig:
    (name, options), suffix = _lookup(spelled)
    sampler = SAMPLERS[name]
    for field in suffix:
        if field in SCHEDULER_CLASSES[sampler.scheduler].without:
            raise SamplerError(
                f"sampler {spelled!r}: {name} takes no other {_IN_WORDS[field]} than its own",
                expected=f"{name} alone, or the suffix after another sampler",
                fix=f"Use sampler={name!r}.",
            )
    if "step_list" in suffix:
        suffix = {**suffix, "step_list": _list_of(step_list, spelled, name)}
    # Latent models never clip: the class default of DDPM and DDIM is meant for pixels.
    combined = {"clip_sample": False, **model_config, **sampler.options, **options}
    return replace(_config_for_class(sampler.scheduler, combined, name), **suffix)


def _list_of(step_list: str | None, spelled: str, name: str) -> str:
    if step_list is None:
        raise SamplerError(
            f"sampler {spelled!r}, and no steps were published for this model",
            expected=" or ".join(one.made_for for one in STEP_LISTS.values()),
            fix=f"Use sampler={name!r}.",
        )
    return step_list


def _from_record(record: Mapping[str, Any]) -> SamplerConfig:
    """A sampler as a picture's record has it: what differs from our defaults, of the noise schedule too."""

    def hashable(values: Mapping[str, Any]) -> dict[str, Any]:
        lists = {key: tuple(cast(Any, value)) for key, value in values.items() if isinstance(value, list)}
        return {**values, **lists}

    options = hashable(record)
    if options["name"] not in SAMPLERS or options["scheduler"] not in SCHEDULER_CLASSES:
        raise ValueError(f"this release has no {options['name']!r} of {options['scheduler']!r}")
    noise = NoiseSchedule(**hashable(options.pop("noise")))
    return SamplerConfig(noise=noise, **options)


def _from_config(config: Mapping[str, Any]) -> SamplerConfig:
    scheduler = str(config.get("_class_name"))
    if scheduler not in SCHEDULER_CLASSES:
        _refuse_outside(scheduler.removesuffix("Scheduler"))
        raise SamplerError(
            f"scheduler class {scheduler!r}",
            expected=", ".join(SCHEDULER_CLASSES),
            fix="Pass a sampler by name, for example sampler='dpmpp_2m'.",
        )
    # Defaults that a config lists as such are its own class's, or what a pipeline put in place of them.
    return _of_class(scheduler, {key: value for key, value in config.items() if key != "_use_default_values"})


def _of_class(scheduler: str, config: Mapping[str, Any]) -> SamplerConfig:
    """A diffusers class with its options, under the short name of the sampler that they make."""
    settled = _config_for_class(scheduler, config, scheduler)
    name = next(name for name, sampler in SAMPLERS.items() if sampler.scheduler == scheduler)
    if "algorithm_type" in SCHEDULER_CLASSES[scheduler].defaults:
        family = "dpmpp" if "++" in settled.algorithm_type else "dpm_solver"
        kind = "s" if "Singlestep" in scheduler else "m"
        sde = "_sde" if settled.algorithm_type.startswith("sde") else ""
        name = f"{family}_{settled.solver_order}{kind}{sde}"  # may be one that `resolve` refuses
    return replace(settled, name=name)


def _config_for_class(scheduler: str, config: Mapping[str, Any], name: str) -> SamplerConfig:
    """The configuration that diffusers' `scheduler.from_config(config)` would run with, under a short name.

    Raises SamplerError for an option outside the table form, or a value the class does not know.
    """
    facts = SCHEDULER_CLASSES[scheduler]
    skipped = {*config.get("_use_default_values", ()), "_use_default_values"}
    chosen = {key: value for key, value in config.items() if key not in skipped}
    options = dict(facts.defaults) | {key: chosen[key] for key in facts.defaults if key in chosen}
    if chosen.get("timestep_type") == "continuous" and "timestep_type" not in options:
        raise SamplerError(
            f"{name} for a model that is told log(sigma) / 4 as its timestep",
            expected="a sampler that can say it, which is euler",
            fix="Use sampler='euler'.",
        )
    _refuse_unsupported(scheduler, options)
    _translate_solver(scheduler, options)
    noise_options = {key: options[key] for key in _NOISE_KEYS if key in options}
    betas = options["trained_betas"]
    noise = NoiseSchedule(
        **noise_options,
        trained_betas=None if betas is None else tuple(float(beta) for beta in betas),
        # samplers of these levels divide by alpha_bar
        zero_snr_floor=ZERO_SNR_FLOOR if facts.levels in ("k", "dpm") else 0.0,
    )
    fields = {key: value for key, value in options.items() if key in SamplerConfig.__dataclass_fields__}
    fields["disable_corrector"] = tuple(options.get("disable_corrector", ()))
    # diffusers reads these two wherever a ramp is made, also on classes that do not list them.
    fields |= {key: chosen.get(key) for key in ("sigma_min", "sigma_max")}
    fields["sigma_schedule"] = _sigma_schedule(options)
    return SamplerConfig(name=name, scheduler=scheduler, noise=noise, **fields)


def _refuse_unsupported(scheduler: str, options: dict[str, Any]) -> None:
    for option, required in _REQUIRED.items():
        if option in options and options[option] != required:
            raise SamplerError(
                f"{scheduler} with {option} = {options[option]!r}",
                expected=f"{required!r}: the rest cannot be written as a coefficient table",
                fix=f"Set {option} to {required!r}.",
            )
    if SCHEDULER_CLASSES[scheduler].no_sample_prediction and options["prediction_type"] == "sample":
        raise refusal(scheduler, "prediction_type", "sample", PREDICTION_TYPES[:2])
    if options.get("variance_type", "") is None:
        del options["variance_type"]


def _translate_solver(scheduler: str, options: dict[str, Any]) -> None:
    """Settle solver_type and algorithm_type the way the diffusers class does."""
    known = SCHEDULER_CLASSES[scheduler].solver_types
    if "solver_type" in options and options["solver_type"] not in known:
        if options["solver_type"] not in _SOLVER_TYPE_NAMES:
            raise refusal(scheduler, "solver_type", options["solver_type"], known)
        options["solver_type"] = known[0]
    if "algorithm_type" not in options:
        return
    if options["algorithm_type"] == "deis":
        options["algorithm_type"] = "dpmsolver++"
    noise_prediction = options["algorithm_type"] in ("dpmsolver", "sde-dpmsolver")
    if noise_prediction and options["final_sigmas_type"] == "zero":
        raise refusal(scheduler, "final_sigmas_type", "zero", ("sigma_min",))


def _sigma_schedule(options: Mapping[str, Any]) -> str:
    chosen = [schedule for key, schedule in _RAMP_KEYS.items() if options.get(key)]
    if len(chosen) > 1:
        raise SamplerError(
            f"sigma schedules {' and '.join(chosen)} at once",
            expected="at most one",
            fix="Set the others to false.",
        )
    if options.get("use_lu_lambdas") and "karras" not in chosen:  # diffusers' precedence
        return "lu"
    return chosen[0] if chosen else "default"


def _refuse_outside(name: str) -> None:
    reason = _REFUSED.get(_squeeze(name))
    if reason is not None:
        raise SamplerError(
            f"sampler {name!r}, which {reason}",
            expected="one that can be written as a coefficient table: " + ", ".join(SAMPLERS),
            fix="The nearest are dpmpp_2m_sde (with noise) and dpmpp_2m (without).",
        )


def _lookup(spelled: str) -> tuple[_Spelling, dict[str, str]]:
    """What a spelling means: a schedule may follow the name, and a "k_" precede it."""
    squeezed = _squeeze(spelled)
    for suffix, fields in _SUFFIXES.items():
        base = squeezed.removesuffix(suffix)
        for candidate in (base, base.removeprefix("k")):
            if candidate in _SPELLINGS:
                return _SPELLINGS[candidate], fields
        _refuse_outside(base)
    close = difflib.get_close_matches(squeezed, _SPELLINGS, n=3)
    names = dict.fromkeys(_SPELLINGS[match].name for match in close)
    raise SamplerError(
        f"sampler {spelled!r}",
        expected=", ".join(SAMPLERS),
        fix=f"Did you mean {' or '.join(names)}?" if names else "Choose one of these.",
    )
