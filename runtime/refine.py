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

    from ..adapters.loaded import LoadedAdapters
    from ..adapters.sets import AdapterSet


def refine(
    base: Pipeline,
    refiner: Pipeline,
    prompt: str | Sequence[str],
    *,
    at: float = 0.8,
    refiner_loras: Sequence[str | tuple[str, Any]] | None = None,
    callback_on_step_end: Any = None,
    **parameters: Unpack[CallParameters],
) -> Result[Any]:
    """Draw with `base` until the share `at` of the schedule, and with `refiner` from there.

    Adapters of `loras` and of the prompt's tags are the base's, and change the refiner too where they fit it;
    where one does not, a line says so. What `set_adapters` says is for the one pipeline alone.

    Args:
        base: draws first; its default size and number of steps count for both.
        refiner: a model of the same latents.
        prompt: for both.
        at: above 0, below 1; the cut lies at the training timestep `round(T - at * T)`.
        refiner_loras: what the refiner draws with in place of `loras`.
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
    drawn: Result[Any] = first(
        prompt,
        **{**of_base, "denoising_end": at, "output_type": "latent"},
        callback_on_step_end=callback_on_step_end,
    )
    request = drawn.request
    second: Any = _with_those_of(refiner, request.adapters)
    if refiner_loras is not None:
        of_refiner["loras"] = refiner_loras
    more = {"seed": request.seeds, "num_inference_steps": request.num_inference_steps}
    more |= {name: getattr(request, name) for name in ("draw_tile", "draw_overlap", "tile")}
    refined: Result[Any] = second(
        prompt,
        **{**of_refiner, **more, "image": drawn.images, "denoising_start": at},
        callback_on_step_end=callback_on_step_end,
    )
    seconds = {f"base {name}": value for name, value in drawn.seconds.items()}
    producer = {**refined.producer, "base": drawn.producer["model"], "handed over at": f"{at:g}"}
    return replace(refined, seconds={**seconds, **refined.seconds}, producer=producer, base=drawn)


def _with_those_of(refiner: Any, chosen: AdapterSet | None) -> Any:
    """The refiner, knowing the adapters that the base has drawn with by the names that they have there."""
    if chosen is None or not chosen.adapters:
        return refiner
    known: LoadedAdapters = refiner.adapters
    lent = {name: known.fitting(adapter) for name, adapter, _ in chosen.adapters if name not in known.names}
    return refiner._with_adapters(known.knowing(lent))


def _stage(name: str) -> str:
    """Which of the two models gets a parameter; one that does not exist is refused by the first."""
    return PARAMETERS[name].stage if name in PARAMETERS else "base"
