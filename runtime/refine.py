"""Two models for one picture: a base that stops early, and a refiner that goes on from its latent.

Podell et al. 2023 (arXiv 2307.01952), section 2.5; diffusers' "ensemble of expert denoisers".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..engines.errors import UsageError
from .pipeline import Pipeline
from .request.parameters import PARAMETERS, CallParameters
from .result import Result

if TYPE_CHECKING:
    from typing_extensions import Unpack


def refine(
    base: Pipeline,
    refiner: Pipeline,
    prompt: str | Sequence[str],
    *,
    at: float = 0.8,
    callback_on_step_end: Any = None,
    **parameters: Unpack[CallParameters],
) -> Result[Any]:
    """Draw with `base` until the share `at` of the schedule, and with `refiner` from there.

    Args:
        base: draws first; its default size and number of steps count for both.
        refiner: a model of the same latents.
        prompt: for both.
        at: above 0, below 1; the cut lies at the training timestep `round(T - at * T)`.
        callback_on_step_end: of both, as `Pipeline` calls it.
        parameters: of both; each model gets those that it has a use for.

    Returns:
        The refiner's result, whose record names the base.

    Raises:
        UsageError: `at` out of range, a mask, or whatever the two models refuse.
    """
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not 0 < at < 1:
        raise UsageError(f"the refiner begins at {at!r}", expected="above 0, below 1", fix="Use at=0.8.")
    if parameters.get("mask_image") is not None:
        raise UsageError(
            "a mask with a refiner",
            expected="a whole picture",
            fix="Repaint with the base, then refine the result.",
        )
    of_base = {name: value for name, value in parameters.items() if _stage(name) != "refiner"}
    of_refiner = {name: value for name, value in parameters.items() if _stage(name) != "base"}
    first: Any = base  # its parameters are checked where it is called
    second: Any = refiner
    drawn: Result[Any] = first(
        prompt,
        **{**of_base, "denoising_end": at, "output_type": "latent"},
        callback_on_step_end=callback_on_step_end,
    )
    request = drawn.request
    more = {"seed": request.seeds, "num_inference_steps": request.num_inference_steps}
    refined: Result[Any] = second(
        prompt,
        **{**of_refiner, **more, "image": drawn.images, "denoising_start": at},
        callback_on_step_end=callback_on_step_end,
    )
    seconds = {f"base {name}": value for name, value in drawn.seconds.items()}
    producer = {**refined.producer, "base": drawn.producer["model"], "handed over at": f"{at:g}"}
    return replace(refined, seconds={**seconds, **refined.seconds}, producer=producer, base=drawn)


def _stage(name: str) -> str:
    """Which of the two models gets a parameter; one that does not exist is refused by the first."""
    return PARAMETERS[name].stage if name in PARAMETERS else "base"
