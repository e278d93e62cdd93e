"""LoRAs that were distilled to draw in a few steps: the sampler, the steps and the guidance that each wants.

Which one a file is, its metadata may say. A file's name says it too, mostly; but anyone may call a file
anything, so a name is only worth a remark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..engines.errors import UsageError

# What trainers call a file, in its metadata.
_SAID_IN = ("ss_output_name", "modelspec.title")


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """How a few-step LoRA draws.

    Attributes:
        sampler: a spelling that `sampler=` takes.
        steps: how many it was distilled for, or what its authors advise.
        called: what its name looks like, in small letters and digits with spaces between.
        source: where the authors say so.
    """

    sampler: str
    steps: int
    called: str
    source: str

    @property
    def defaults(self) -> dict[str, Any]:
        """By the names of `engines.package.Defaults`. All are distilled with guidance in them: 1 is off."""
        return {"sampler": self.sampler, "num_inference_steps": self.steps, "guidance_scale": 1.0}


# Rows of one family, by their steps. `cfg` in a name of Hyper-SD's means that it keeps guidance.
_HYPER = r"^(?!.*\bcfg\b).*\bhyper ?(?:sd|sdxl)?\d*\b.*\b{} ?steps?\b"
_LIGHTNING = r"\blightning\b.*\b{} ?steps?\b"
_HYPER_SOURCE = "arXiv 2404.13686; the card of ByteDance/Hyper-SD"
_LIGHTNING_SOURCE = "arXiv 2402.13929; the card of ByteDance/SDXL-Lightning"

FEW_STEPS: Mapping[str, FewSteps] = {
    "lcm": FewSteps(
        sampler="lcm",
        steps=4,
        called=r"\blcm\b",
        source="arXiv 2311.05556; the cards of latent-consistency/lcm-lora-*",
    ),
    "tcd": FewSteps(
        sampler="tcd",
        steps=4,
        called=r"\btcd\b",
        source="arXiv 2402.19159; the cards of h1t/TCD-*-LoRA",
    ),
    "dmd2": FewSteps(
        sampler="dmd2",
        steps=4,
        called=r"\bdmd2\b",
        source="arXiv 2405.14867; the card of tianweiy/DMD2",
    ),
    "turbo": FewSteps(
        sampler="euler a trailing",
        steps=4,
        called=r"\bsd ?(?:xl ?)?turbo\b",
        source="arXiv 2311.17042; the scheduler of stabilityai/sdxl-turbo",
    ),
    "hyper-1": FewSteps(sampler="tcd", steps=1, called=_HYPER.format(1), source=_HYPER_SOURCE),
    **{
        f"hyper-{steps}": FewSteps(
            sampler="ddim trailing", steps=steps, called=_HYPER.format(steps), source=_HYPER_SOURCE
        )
        for steps in (2, 4, 8)
    },
    **{
        f"lightning-{steps}": FewSteps(
            sampler="euler trailing", steps=steps, called=_LIGHTNING.format(steps), source=_LIGHTNING_SOURCE
        )
        for steps in (2, 4, 8)
    },
}


def named(name: object) -> FewSteps:
    """A row by its name. Raises UsageError for an unknown one."""
    row = FEW_STEPS.get(name) if isinstance(name, str) else None
    if row is None:
        near = get_close_matches(str(name), FEW_STEPS, 1)
        raise UsageError(
            f"no kind of few-step LoRA is called {name!r:.100}",
            expected=", ".join(FEW_STEPS),
            fix=f"Did you mean {near[0]}?" if near else "Choose one of these.",
        )
    return row


def said_by(metadata: Mapping[str, str]) -> str | None:
    """The name of the row that a file's metadata speaks of; None where it speaks of none."""
    return next((name for key in _SAID_IN if (name := looks_like(metadata.get(key, "")))), None)


def looks_like(title: str) -> str | None:
    """The name of the row that a file's name or title looks like; None where it looks like none."""
    words = re.sub(r"[^a-z0-9]+", " ", title.lower())
    return next((name for name, row in FEW_STEPS.items() if re.search(row.called, words)), None)
