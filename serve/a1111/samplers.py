"""Samplers and schedules by AUTOMATIC1111's names, as lists for its clients and as what a request chooses.

Source: `modules/sd_samplers.py` (`get_sampler_and_scheduler`) and `modules/sd_schedulers.py`, release 1.10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...engines.errors import UsageError
from ...runtime.sampling.a1111 import spelled_by_a1111
from ...runtime.sampling.samplers import SAMPLERS


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How noise levels are laid; `rho` and `inner` are what its clients are told of it."""

    name: str
    label: str
    aliases: tuple[str, ...] = ()
    rho: float = -1.0
    inner: bool = False


SCHEDULES = (  # those that `runtime/sampling/a1111.py` can say
    Schedule(name="automatic", label="Automatic"),
    Schedule(name="uniform", label="Uniform", inner=True),
    Schedule(name="karras", label="Karras", rho=7.0),
    Schedule(name="exponential", label="Exponential"),
    Schedule(name="sgm_uniform", label="SGM Uniform", aliases=("SGMUniform",), inner=True),
    Schedule(name="ddim", label="DDIM", inner=True),
    Schedule(name="beta", label="Beta", inner=True),
)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A sampler: its name and schedule there, and what it is called here."""

    name: str
    schedule: str
    spelling: str


_WITH_HEUN = ("dpmpp_2m_sde",)  # there a sampler of its own


def _listed() -> dict[str, list[str]]:
    """Each sampler's name there, or ours where it has none, with the names that mean the same."""
    found: dict[str, list[str]] = {}
    for key, sampler in SAMPLERS.items():
        name = sampler.a1111 or key
        spoken = [alias.replace(" ", "_") for alias, options in sampler.aliases.items() if not options]
        found.setdefault(name, []).extend(dict.fromkeys((key, f"k_{key}", *(f"k_{one}" for one in spoken))))
    return found | {f"{SAMPLERS[key].a1111} Heun": [f"k_{key}_heun"] for key in _WITH_HEUN}


_LISTED = _listed()
_NAMES = {
    spelled.lower(): name for name, aliases in reversed(_LISTED.items()) for spelled in (*aliases, name)
}
_SCHEDULES = {word.lower(): one.label for one in SCHEDULES for word in (one.label, one.name, *one.aliases)}


def choose(name: str, schedule: str | None) -> Chosen:
    """The sampler of a request; a schedule at the end of its name, as older clients write it, goes first.

    Raises:
        UsageError: an unknown schedule. One that the sampler does not have, and an unknown sampler, are
            refused where the request is made.
    """
    label = _SCHEDULES.get((schedule or "Automatic").lower())
    for word, found in _SCHEDULES.items():
        if name.lower().endswith(f" {word}"):
            name, label = name[: -len(word) - 1], found
            break
    if label is None:
        raise UsageError(
            f"the scheduler is {schedule!r:.80}",
            expected=f"one of {', '.join(one.label for one in SCHEDULES)}",
            fix="Choose one of these, or leave it out.",
        )
    name = _NAMES.get(name.lower(), name)
    return Chosen(
        name=name,
        schedule=label,
        spelling=spelled_by_a1111({"Sampler": name, "Schedule type": label}),
    )


def sampler_list() -> list[dict[str, Any]]:
    """What clients choose samplers from."""
    return [{"name": name, "aliases": aliases, "options": {}} for name, aliases in _LISTED.items()]


def schedule_list() -> list[dict[str, Any]]:
    """What clients choose schedules from."""
    return [
        {
            "name": one.name,
            "label": one.label,
            "aliases": list(one.aliases) or None,
            "default_rho": one.rho,
            "need_inner_model": one.inner,
        }
        for one in SCHEDULES
    ]
