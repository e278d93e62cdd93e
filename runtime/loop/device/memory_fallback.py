"""What to give up when a device runs out of memory, one fallback after the other.

::

    free idle contexts          of earlier requests' sizes
    tile the decoder            picture by picture first, then tiles of half the side, down to 256 pixels
    split the batch             the UNet in several calls of fewer rows
    run the CFG halves apart    down to one row a call
    stream weights              from the host, where the engine was built for it
    refuse                      with the numbers

A fallback that does not help the net that ran out is passed over as long as another is left: a UNet that does
not fit is no reason to tile the decoder. In the end it may be: nets share a block of activations, and the
decoder's may be what makes it large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from ....engines.errors import MemoryLimitError
from ....engines.profiles import SMALLEST_TILE

Result = TypeVar("Result")

_TILE_STEP = 64


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a request is carried out; None everywhere is all at once.

    Attributes:
        rows: UNet rows of one call, at most.
        decoder_pictures: pictures decoded in one call.
        tile: side of the decoder's tiles in pixels.
    """

    rows: int | None = None
    decoder_pictures: int | None = None
    tile: int | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """What of a request decides how much memory it takes.

    Attributes:
        batch: B, the UNet rows of a step; 0 where nothing is denoised.
        guided: whether half of them are unconditional.
        pictures: N.
        height, width: of a picture, in pixels.
        tile: side of the decoder's tiles that the request itself asks for, in pixels.
        controlnets: nets that run beside the UNet.
        call: of a single call of a net, its description; the other fields are unset then.
    """

    batch: int = 0
    guided: bool = False
    pictures: int = 0
    height: int = 0
    width: int = 0
    tile: int | None = None
    controlnets: int = 0
    call: str = ""

    @property
    def start(self) -> MemoryPlan:
        """The plan before anything is given up."""
        return MemoryPlan() if self.tile is None else MemoryPlan(decoder_pictures=1, tile=self.tile)

    def __str__(self) -> str:
        """For people."""
        return self.call or f"{self.pictures} x {self.width}x{self.height}"


class MemoryActions(Protocol):
    """What fallbacks do besides changing the plan."""

    def free_idle(self) -> bool:
        """Free what no request uses now; return whether there was anything."""
        ...

    def stream_weights(self) -> int:
        """Stream weights from the host; return the bytes that this freed, 0 if it was not possible."""
        ...

    def describe_memory(self) -> str:
        """The numbers, for the refusal."""
        ...


def equal_rows(batch: int, most: int) -> int:
    """Rows of each of a step's UNet calls, `most` or fewer: a divisor of `batch`, so that all are equal.

    cuDNN's plans are for one shape, and ONNX Runtime would make those of every convolution anew between two
    calls of different sizes.
    """
    return max(rows for rows in range(1, min(most, batch) + 1) if batch % rows == 0)


# A fallback returns the lower plan, or None where it has nothing to give up.
Fallback = Callable[[MemoryPlan, MemoryNeed, MemoryActions], "MemoryPlan | None"]


def _free_idle(plan: MemoryPlan, need: MemoryNeed, actions: MemoryActions) -> MemoryPlan | None:
    return plan if actions.free_idle() else None


def _tile_the_decoder(plan: MemoryPlan, need: MemoryNeed, actions: MemoryActions) -> MemoryPlan | None:
    if need.pictures > 1 and plan.decoder_pictures != 1:
        return replace(plan, decoder_pictures=1)
    largest = max(need.height, need.width)
    side = min(plan.tile or largest, largest)
    half = max(-(-side // 2 // _TILE_STEP) * _TILE_STEP, SMALLEST_TILE)
    return replace(plan, decoder_pictures=1, tile=half) if half < side else None


def _split_the_batch(plan: MemoryPlan, need: MemoryNeed, actions: MemoryActions) -> MemoryPlan | None:
    rows = plan.rows or need.batch
    smallest = 2 if need.guided else 1
    return replace(plan, rows=equal_rows(need.batch, max(rows // 2, smallest))) if rows > smallest else None


def _run_the_halves_apart(plan: MemoryPlan, need: MemoryNeed, actions: MemoryActions) -> MemoryPlan | None:
    return replace(plan, rows=1) if need.guided and (plan.rows or need.batch) > 1 else None


def _stream_weights(plan: MemoryPlan, need: MemoryNeed, actions: MemoryActions) -> MemoryPlan | None:
    return plan if actions.stream_weights() else None


_UNET = ("unet", "unet_context", "step", "step_masked", "controlnet")
# Name -> the fallback, and the nets it helps (none named: all).
FALLBACKS: Mapping[str, tuple[Fallback, tuple[str, ...]]] = {
    "free idle contexts": (_free_idle, ()),
    "tile the decoder": (_tile_the_decoder, ("vae_decoder",)),
    "split the batch": (_split_the_batch, _UNET),
    "run the CFG halves apart": (_run_the_halves_apart, _UNET),
    "stream weights": (_stream_weights, ()),
}


def fit_in_memory(
    attempt: Callable[[MemoryPlan], Result],
    plan: MemoryPlan,
    need: MemoryNeed,
    actions: MemoryActions,
    log: Callable[[str], None],
) -> tuple[Result, MemoryPlan]:
    """Attempt the plan, and after every MemoryLimitError the next lower one.

    Returns:
        What `attempt` returned, and the plan that fitted. `log` is passed a line for every fallback.

    Raises:
        MemoryLimitError: nothing is left to give up. Whatever else `attempt` raises passes through.
    """
    tried: list[str] = []
    while True:
        try:
            return attempt(plan), plan
        except MemoryLimitError as error:
            short = error
        fallback, plan = _next_fallback(short, plan, need, actions, tried)
        actions.free_idle()  # what the attempt left would be in the way of the next one
        tried.append(fallback)
        log(f"out of memory ({short.found}): {fallback} -> {plan}")
        # Its traceback holds this frame, and the net that failed: a circle, which would keep a closed net.
        del short


def _next_fallback(
    short: MemoryLimitError, plan: MemoryPlan, need: MemoryNeed, actions: MemoryActions, tried: list[str]
) -> tuple[str, MemoryPlan]:
    passed_over = {
        name for name, (_, helps) in FALLBACKS.items() if helps and short.culprit not in (None, *helps)
    }
    for name in sorted(FALLBACKS, key=passed_over.__contains__):  # in their order, and these last
        fallback, _ = FALLBACKS[name]
        if fallback is _free_idle and tried:
            continue  # what is idle by now was left by failed attempts
        lower = fallback(plan, need, actions)
        if lower is not None:
            return name, lower
    raise MemoryLimitError(
        f"{need} does not fit: {short.found}"
        f" ({actions.describe_memory()}; tried: {', '.join(tried) or 'nothing helps'})",
        expected="a size and batch that fit",
        fix="Draw fewer or smaller pictures, or build engines that stream their weights:"
        " latentrt build PACKAGE --weights streamed",
        culprit=short.culprit,
    ) from short
