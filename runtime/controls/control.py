"""One control of a request: a picture that steers through a ControlNet or a T2I-Adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ...engines.spec import Array

Mode = Literal["balanced", "prompt", "control", "guess"]
# AUTOMATIC1111's extension has 13 numbers, the first skip connection's first; SDXL's nets use the first ten.
_SOFT = tuple(0.825 ** (12 - number) for number in range(13))
# Modes in which unconditional rows are drawn without.
_CONDITIONAL_ALONE = ("control", "guess")


@dataclass(frozen=True, kw_only=True)
class Control:
    """A picture that steers a request through a ControlNet or a T2I-Adapter.

    Attributes:
        model: the name of one that was loaded.
        image: the picture, or one for each prompt: a path, a Pillow image, or an array.
        strength: 1 as the net was trained; 0 is the same picture as without it.
        start, end: the part of the steps that it is in: step i of N if start <= i/N and (i+1)/N <= end.
            Those after `denoising_end`, a refiner's, are among the N, as in diffusers.
        mode: "balanced" as diffusers; "prompt" and "control" as AUTOMATIC1111's "My prompt is more important"
            and "ControlNet is more important": less of its outputs, the first ones least, the latter for the
            rows with the prompt alone; "guess" as diffusers' `guess_mode`.
        preparation: what makes a hint of the picture (`preparations.PREPARATIONS`); None if it is one.
        settings: the preparation's.
        mask_image: white where "inpaint" and "repaint" draw anew.
        resize_mode: "stretch", "crop" or "pad".
        control_type: of a Union, what the picture is: "openpose", "depth", "scribble" (hed, pidi and ted,
            too), "canny" (lineart, anime and mlsd, too), "normal", "segment", of ProMax "tile" and "repaint";
            None is what the preparation makes. Controls of one Union are read in one call a step.
    """

    model: str
    image: Any
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: Mode = "balanced"
    preparation: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    mask_image: Any = None
    resize_mode: str = "stretch"
    control_type: str | None = None

    def scales(self, *, steps: int, rows: int, outputs: int, guided: bool, pooled: bool) -> Array:
        """What each output is multiplied with: (S, B, R) float32, zeros where it is off.

        Args:
            steps: S, the calls of the UNet.
            rows: B, unconditional ones first.
            outputs: R, the skip connections' and the middle block's.
            guided: whether there are unconditional rows.
            pooled: whether the outputs are averaged over the picture: they are made for the rows with the
                prompt alone, as "guess" has it, and nothing grades them (diffusers' pipeline does so where
                its config has `global_pool_conditions`).
        """
        factors = np.full(outputs, self.strength)
        if self.mode == "guess" and not pooled:  # diffusers' ControlNetModel.forward
            factors *= np.logspace(-1, 0, outputs)
        elif self.mode in ("prompt", "control"):
            factors *= _SOFT[:outputs]
        scales = np.zeros((steps, rows, outputs), np.float32)
        alone = pooled or self.mode in _CONDITIONAL_ALONE
        first = rows // 2 if guided and alone else 0
        scales[self.on(steps), first:] = factors
        return scales

    def on(self, steps: int) -> Array:
        """In which of the steps it is: (S,) bool."""
        return steps_on(steps, self.start, self.end)


def steps_on(steps: int, start: float, end: float) -> Array:
    """(S,) bool: the steps between two shares of them, as diffusers' `control_guidance_start` and `_end`."""
    number = np.arange(steps)
    return ~((number / steps < start) | ((number + 1) / steps > end))
