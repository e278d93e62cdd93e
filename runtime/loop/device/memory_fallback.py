"""What to give up when a device runs out of memory, one rung at a time, until the request fits or is refused.

::

    free idle contexts          of earlier requests' sizes
    tile the decoder            picture by picture first, then tiles of half the side, down to 256 pixels
    split the batch             the UNet in several calls of fewer rows
    run the CFG halves apart    down to one row a call
    stream weights              from the host, where the engine was built for it
    refuse                      with the numbers

A rung that cannot lower what ran out is passed over as long as another can: a UNet that does not fit is no
reason to tile the decoder, until nothing else is left. (Then it is one: nets share a block of activations,
and the decoder's may be what makes it large.)
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
class Plan:
    """How a request is carried out. None is: all at once.

    `rows` of a UNet call at most, `decoder_pictures` decoded at once, `tile` in pixels.
    """

    rows: int | None = None
    decoder_pictures: int | None = None
    tile: int | None = None


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a request asks of the memory: B rows, N pictures of (H, W) pixels, decoded in tiles if `tile`.

    B is 0 where nothing is drawn; of a `call` of one net there is nothing else to say.
    """

    batch: int = 0
    guided: bool = False
    pictures: int = 0
    height: int = 0
    width: int = 0
    tile: int | None = None
    call: str = ""

    @property
    def start(self) -> Plan:
        """How it is carried out before anything is given up."""
        return Plan() if self.tile is None else Plan(decoder_pictures=1, tile=self.tile)

    def __str__(self) -> str:
        """For people."""
        return self.call or f"{self.pictures} x {self.width}x{self.height}"


class Actions(Protocol):
    """What rungs do besides changing the plan."""

    def free_idle(self) -> bool:
        """Free what no request uses now; whether there was anything."""
        ...

    def stream_weights(self) -> int:
        """Bytes freed by streaming weights; 0 if nothing can, or all do already."""
        ...

    def describe_memory(self) -> str:
        """The numbers, for the refusal."""
        ...


Lower = Callable[[Plan, Need, Actions], "Plan | None"]


def _free_idle(plan: Plan, need: Need, actions: Actions) -> Plan | None:
    """Only before anything else was tried: later, idle is what failed attempts left."""
    return plan if actions.free_idle() else None


def _tile_the_decoder(plan: Plan, need: Need, actions: Actions) -> Plan | None:
    if need.pictures > 1 and plan.decoder_pictures != 1:
        return replace(plan, decoder_pictures=1)
    largest = max(need.height, need.width)
    side = min(plan.tile or largest, largest)
    half = max(-(-side // 2 // _TILE_STEP) * _TILE_STEP, SMALLEST_TILE)
    return replace(plan, decoder_pictures=1, tile=half) if half < side else None


def _split_the_batch(plan: Plan, need: Need, actions: Actions) -> Plan | None:
    rows = plan.rows or need.batch
    smallest = 2 if need.guided else 1
    return replace(plan, rows=max(-(-rows // 2), smallest)) if rows > smallest else None


def _run_the_halves_apart(plan: Plan, need: Need, actions: Actions) -> Plan | None:
    return replace(plan, rows=1) if need.guided and (plan.rows or need.batch) > 1 else None


def _stream_weights(plan: Plan, need: Need, actions: Actions) -> Plan | None:
    return plan if actions.stream_weights() else None


_UNET = ("unet", "unet_context", "step", "step_masked")
# Name -> how it lowers a plan, and the nets it helps (none named: all).
RUNGS: Mapping[str, tuple[Lower, tuple[str, ...]]] = {
    "free idle contexts": (_free_idle, ()),
    "tile the decoder": (_tile_the_decoder, ("vae_decoder",)),
    "split the batch": (_split_the_batch, _UNET),
    "run the CFG halves apart": (_run_the_halves_apart, _UNET),
    "stream weights": (_stream_weights, ()),
}


def climb(
    attempt: Callable[[Plan], Result], plan: Plan, need: Need, actions: Actions, log: Callable[[str], None]
) -> tuple[Result, Plan]:
    """Try, and with every MemoryLimitError try again one rung lower; returns the plan that fitted as well.

    Raises:
        MemoryLimitError: nothing is left to give up. Whatever else `attempt` raises passes through.
    """
    tried: list[str] = []
    while True:
        try:
            return attempt(plan), plan
        except MemoryLimitError as error:
            short = error
        rung, plan = _next_rung(short, plan, need, actions, tried)
        actions.free_idle()  # what the attempt left would be in the way of the next one
        tried.append(rung)
        log(f"out of memory ({short.found}): {rung} -> {plan}")


def _next_rung(
    short: MemoryLimitError, plan: Plan, need: Need, actions: Actions, tried: list[str]
) -> tuple[str, Plan]:
    passed_over = {
        name for name, (_, helps) in RUNGS.items() if helps and short.culprit not in (None, *helps)
    }
    for name in sorted(RUNGS, key=passed_over.__contains__):  # in their order, and these last
        lower, _ = RUNGS[name]
        if lower is _free_idle and tried:
            continue
        lowered = lower(plan, need, actions)
        if lowered is not None:
            return name, lowered
    raise MemoryLimitError(
        f"{need} does not fit: {short.found}"
        f" ({actions.describe_memory()}; tried: {', '.join(tried) or 'nothing helps'})",
        expected="a size and batch that fit",
        fix="Draw fewer or smaller pictures, or build engines that stream their weights:"
        " latentrt build PACKAGE --weights streamed.",
        culprit=short.culprit,
    ) from short
