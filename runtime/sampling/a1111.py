"""What AUTOMATIC1111 calls a sampler with its noise levels, and what its words mean here.

Its rules are those of modules/sd_samplers.py (`get_sampler_and_scheduler`), sd_samplers_kdiffusion.py,
sd_samplers_timesteps.py and sd_schedulers.py, release 1.10. A text without `Schedule type` means "Automatic"
there, which is Karras or exponential for most DPM samplers; so the schedule is always written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...engines.noise_schedule import ZERO_SNR_FLOOR
from .config import SCHEDULER_CLASSES, SamplerConfig
from .samplers import SAMPLERS, make_table

_RAMPS = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta", "lu": "Lu"}
# Schedule types by how a class lays its levels ("k", or as DPM-Solver), and timestep spacing. n timesteps
# from the first to the last are "Uniform" there; DPM-Solver's linspace has n + 1 and leaves the last out,
# which is "SGM Uniform". "DDIM" goes from timestep 1 upwards in whole steps, as leading spacing does.
_SPACINGS = {
    ("k", "linspace"): "Uniform",
    ("k", "trailing"): "SGM Uniform",
    ("k", "leading"): "DDIM",
    ("dpm", "linspace"): "SGM Uniform",
    ("dpm", "trailing"): "SGM Uniform",
}
# What "Automatic" means since release 1.9; for all others it is "Uniform".
_AUTOMATIC = {
    "DPM++ 2M": "Karras",
    "DPM++ 2S a": "Karras",
    "DPM2": "Karras",
    "DPM2 a": "Karras",
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 2M SDE Heun": "Exponential",
    "DPM++ 3M SDE": "Exponential",
}
_AYS = "AYS"
_VERSION = re.compile(r"v?(\d+)\.(\d+)")
_NO_SCHEDULES = (1, 9)  # before this release a schedule was part of the sampler's name
_NEAR = 0.01  # diffusers rounds some ramps to whole timesteps
_UNIPC = {"variant": "UniPC variant", "order": "UniPC order"}


def a1111_fields(
    config: SamplerConfig, num_inference_steps: int, *, custom: bool = False
) -> dict[str, str | int | float]:
    """`Sampler`, `Schedule type` and what else AUTOMATIC1111 writes of a sampler with so many steps.

    A sampler that it does not have, or not with these levels, has a name that it does not know either.
    `custom` says that the timesteps or sigmas are the caller's own.
    """
    sampler = SAMPLERS[config.name]
    name = sampler.a1111 or config.name
    if config.solver_type == "heun" and sampler.a1111:
        name = f"{name} Heun"
    if sampler.a1111_grid is not None:
        # A class without spacings (LCM's) has whatever the model's own scheduler says, to no effect.
        spaced = "timestep_spacing" not in SCHEDULER_CLASSES[config.scheduler].without
        own_grid = not spaced or config.timestep_spacing == sampler.a1111_grid
        usual = config.sigma_schedule == "default" and own_grid
        if custom or not usual:
            name = f"{name} {'custom' if custom else _schedule(config)}"
        return {"Sampler": name, **_options(config)}
    if custom:
        return {"Sampler": name, "Schedule type": "custom"}
    return {"Sampler": name, "Schedule type": _schedule(config), **_ends(config, num_inference_steps)}


def _schedule(config: SamplerConfig) -> str:
    if config.step_list is not None:
        # Not "Align Your Steps": it lays n levels down to the lowest one, where the authors lay n + 1.
        return _AYS
    if config.sigma_schedule != "default":
        return _RAMPS[config.sigma_schedule]
    levels = SCHEDULER_CLASSES[config.scheduler].levels
    return _SPACINGS.get((levels, config.timestep_spacing), config.timestep_spacing)


def _ends(config: SamplerConfig, num_inference_steps: int) -> dict[str, float]:
    """The ends of a ramp that does not run from the noisiest to the cleanest level of the model."""
    if config.sigma_schedule not in _RAMPS:
        return {}
    visited, known = make_table(config, num_inference_steps).alpha_bar, config.noise.alpha_bar
    found = {
        "Schedule max sigma": (_sigma(visited[0]), _sigma(known.min())),
        "Schedule min sigma": (_sigma(visited[-1]), _sigma(known.max())),
    }
    return {name: round(end, 6) for name, (end, usual) in found.items() if abs(end / usual - 1) > _NEAR}


def _sigma(alpha_bar: float) -> float:
    return float((1 - alpha_bar) / max(alpha_bar, ZERO_SNR_FLOOR)) ** 0.5


def _options(config: SamplerConfig) -> dict[str, str | int | float]:
    if config.name == "unipc":  # its own defaults there are bh1 and 3
        return {_UNIPC["variant"]: config.solver_type, _UNIPC["order"]: config.solver_order}
    return {"Eta DDIM": config.eta} if config.name == "ddim" and config.eta else {}


def spelled_by_a1111(fields: Mapping[str, str]) -> str:
    """The sampler of an AUTOMATIC1111 text as `names.resolve` takes it, if that knows it.

    Args:
        fields: of the text, with `Sampler`; `Schedule type` and `Version` where they are known.
    """
    name, schedule = fields["Sampler"], fields.get("Schedule type", "Automatic")
    version = _VERSION.match(fields.get("Version", ""))
    if schedule == "Automatic":
        old = version is not None and tuple(map(int, version.groups())) < _NO_SCHEDULES
        schedule = "Uniform" if old else _AUTOMATIC.get(name, "Uniform")
    known = {sampler.a1111: sampler for sampler in SAMPLERS.values() if sampler.a1111}
    sampler = known.get(name.removesuffix(" Heun")) or known.get(name)
    if name == "UniPC":
        order = fields.get(_UNIPC["order"], "3")
        name = f"unipc {fields.get(_UNIPC['variant'], 'bh1') if order == '2' else order}"
    if sampler is None:  # ComfyUI's names, for one
        plain = schedule in ("Uniform", "Automatic", "normal")
        return name if plain else f"{name} {schedule}"
    without = SCHEDULER_CLASSES[sampler.scheduler].without
    if sampler.a1111_grid is not None:
        return name if "timestep_spacing" in without else f"{name} {sampler.a1111_grid}"
    if schedule in _RAMPS.values():
        return f"{name} {schedule}"
    levels = SCHEDULER_CLASSES[sampler.scheduler].levels
    spacings = {(kind, label): spacing for (kind, spacing), label in reversed(_SPACINGS.items())}
    spacing = spacings.get((levels, schedule))
    return f"{name} {schedule if spacing is None or 'timestep_spacing' in without else spacing}"
