"""Which layout of a net is the fastest here: the decision, with the measuring left to the caller.

A clock on a GPU that others use, or that warms up, drifts by more than two layouts differ. So all candidates
are open at once and take turns, in an order that is turned round in every round, and medians are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import UsageError
from ..package import Package
from ..profiles import NetProfile, fixed_profile, net_profiles
from ..spec import NETS, Array
from ..tolerances import NET_RELATIVE_L2, ROUNDED_RELATIVE_L2, ROUNDING_TIMES, relative_l2

WARM_UP = 3  # rounds that are not counted: arenas grow, clocks rise, cuDNN chooses
ROUNDS = 20
MARGIN = 0.02  # within this share of the fastest, the simpler layout wins
TUNED_NETS = ("unet", "vae_decoder")  # those with convolutions and GroupNormalization


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A candidate that is open and has run once.

    Attributes:
        outputs: the outputs of that run, by name; every candidate gets the same inputs.
        run: runs it again, waits for the end, and returns the milliseconds that took.
        close: free it.
    """

    outputs: Mapping[str, Array]
    run: Callable[[], float]
    close: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The fastest layout, and why.

    Attributes:
        layout: its name.
        milliseconds: the median of every candidate that was timed.
        relative_l2: how far each candidate's outputs are from the first one's, where that is a finite number.
        rejected: why a candidate is out.
    """

    layout: str
    milliseconds: Mapping[str, float]
    relative_l2: Mapping[str, float]
    rejected: Mapping[str, str]


def choose_layout(
    measure: Callable[[str], Measured],
    candidates: Sequence[str],
    *,
    parity: float,
    coarser: Mapping[str, float] = MappingProxyType({}),
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
) -> Choice:
    """Measure the candidates against each other and choose.

    Args:
        measure: opens a candidate. An error that it raises, or that `run` raises later, puts the candidate
            out. An error of the first candidate is raised on: without it there is nothing to compare with.
        candidates: names of layouts, the simplest first; that one is the reference.
        parity: the largest relative L2 to the first candidate's outputs that is no reason to reject.
        coarser: how much more that may be, of candidates that compute in another precision.
        rounds: how often each is timed.
        warm_up: how many rounds run before and are not counted.

    Raises:
        Exception: whatever the first candidate's `measure` and `run` raise.
    """
    contest = _Contest(candidates[0], measure(candidates[0]), parity, coarser)
    with ExitStack() as stack:
        stack.callback(contest.close)
        for name in candidates[1:]:
            contest.enter(name, measure)
        for index in range(warm_up + rounds):
            contest.take_turns(backwards=bool(index % 2), counted=index >= warm_up)
        milliseconds = {name: median(contest.times[name]) for name in contest.open}
    most = min(milliseconds.values()) * (1 + MARGIN)
    return Choice(
        layout=next(name for name in candidates if milliseconds.get(name, most + 1) <= most),
        milliseconds=milliseconds,
        relative_l2=contest.relative_l2,
        rejected=contest.rejected,
    )


class _Contest:
    """The candidates that are still in. The first is the reference."""

    def __init__(self, name: str, reference: Measured, parity: float, coarser: Mapping[str, float]) -> None:
        self._first = name
        self._parity, self._coarser = parity, coarser
        self._reference = reference
        self.open = {name: reference}
        self.times: dict[str, list[float]] = {name: []}
        self.relative_l2: dict[str, float] = {}
        self.rejected: dict[str, str] = {}

    def enter(self, name: str, measure: Callable[[str], Measured]) -> None:
        """Open a candidate, and keep it if its outputs are the reference's."""
        try:
            self.open[name] = measure(name)
        except Exception as error:  # whatever goes wrong is the reason why it is out
            self.rejected[name] = _in_one_line(error)
            return
        outputs, wanted = self.open[name].outputs, self._reference.outputs
        self.times[name] = []
        if not _finite(wanted):
            self._reject(
                name, f"the output of {self._first} is not finite, so nothing can be compared with it"
            )
        elif not _finite(outputs):
            self._reject(name, "its output is not finite")
        else:
            far = {key: relative_l2(outputs[key], wanted[key]) for key in wanted}
            self.relative_l2[name] = max(far.values())
            for key, distance in far.items():
                if distance > (most := self._allowed(name, wanted[key])):
                    self._reject(
                        name,
                        f"its output is {distance:.1e} (relative L2) from {self._first}'s, over {most:.0e}",
                    )
                    return

    def _allowed(self, name: str, wanted: Array) -> float:
        least = ROUNDED_RELATIVE_L2 if wanted.dtype.kind in "iu" else 0.0
        return max(self._parity, least) + self._coarser.get(name, 0.0)

    def take_turns(self, *, backwards: bool, counted: bool) -> None:
        """Run each candidate once."""
        for name in list(reversed(self.open)) if backwards else list(self.open):
            try:
                took = self.open[name].run()
            except Exception as error:
                if name == self._first:
                    raise
                self._reject(name, _in_one_line(error))
                continue
            if counted:
                self.times[name].append(took)

    def _reject(self, name: str, reason: str) -> None:
        self.rejected[name] = reason
        self.open.pop(name).close()

    def close(self) -> None:
        """Free whatever is still open."""
        while self.open:
            self.open.popitem()[1].close()


def _finite(outputs: Mapping[str, Array]) -> bool:
    return all(bool(np.isfinite(array).all()) for array in outputs.values())


def _in_one_line(error: Exception) -> str:
    """An error in one line."""
    text = str(getattr(error, "found", error)) or type(error).__name__
    return " ".join(text.split())


def choice_facts(choice: Choice) -> dict[str, Any]:
    """What the engine store keeps of a choice."""
    return {
        "layout": choice.layout,
        "milliseconds": {name: round(value, 4) for name, value in choice.milliseconds.items()},
        "relative_l2": {name: float(f"{value:.3g}") for name, value in choice.relative_l2.items()},
        "rejected": dict(choice.rejected),
    }


def tuned_nets(package: Package, nets: Iterable[str]) -> tuple[str, ...]:
    """Those of `nets` (none: all) that have a choice. Raises UsageError for one that has none."""
    every = tuple(net for net in TUNED_NETS if net in package.manifest.nets)
    wanted = tuple(nets)
    if unknown := [name for name in wanted if name not in every]:
        raise UsageError(
            f"the net {unknown[0]!r} has no layouts to choose from",
            expected=", ".join(every) or "a package with a UNet or a decoder",
            fix="Leave --nets out to measure all of them.",
        )
    return tuple(net for net in every if not wanted or net in wanted)


def allowed_distance(package: Package, net: str) -> float:
    """The largest relative L2 between two programs of a net: its bar, or more where products are rounded."""
    bar = NET_RELATIVE_L2[package.manifest.dtype]
    return max(bar, ROUNDING_TIMES * float(rounding_of(package, net).get("relative_l2", 0.0)))


def rounding_of(package: Package, net: str) -> Mapping[str, Any]:
    """What was done to a net's products (`Manifest.quantised`); empty where nothing was."""
    return package.manifest.quantised if NETS[net].part == "unet" else {}


def measured_profile(package: Package, net: str) -> NetProfile:
    """The shapes a net is measured with: one picture of the package's default size, with guidance.

    `shapes[name][1]` is the shape of an input. Raises PackageError for a symbol this release does not know.
    """
    manifest = package.manifest
    size = manifest.defaults.width, manifest.defaults.height
    picture = fixed_profile(*size, batch=1, tokens=manifest.max_tokens)
    return net_profiles(net, manifest.nets[net].spec, [picture])[0]
