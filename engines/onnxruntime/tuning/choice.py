"""Which layout of a net is the fastest on a device: the decision, with the measuring left to the caller.

A clock on a GPU that others use, or that warms up, drifts by more than two layouts differ. So all candidates
are open at once and take turns, in an order that is turned round in every round; and medians are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import numpy as np

from ...spec import Array

WARM_UP = 3  # rounds that are not counted: arenas grow, clocks rise, cuDNN chooses
ROUNDS = 20
MARGIN = 0.02  # within this share of the fastest, the simpler layout wins
PARITY = 5e-3  # relative L2 to `plain`: what docs/design.md allows fp16
# At least this is allowed an output of whole numbers: a value beside a half may be rounded to its other side.
# Two layouts of SD 1.5's decoder, 3e-7 apart before rounding, were 1.1e-4 apart in uint8.
ROUNDED_PARITY = 1e-3
TUNED_NETS = ("unet", "vae_decoder")  # those with convolutions and GroupNormalization
# Modules whose `tune_package` measures the layouts of a backend.
TUNERS: Mapping[str, str] = {
    "onnxruntime": f"{__package__}.cpu",
    "onnxruntime-cuda": f"{__package__}.cuda",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a net may be laid out.

    Attributes:
        name: as the store remembers it.
        lowered: whether `lowering.lower` makes the graph; else it is the package's own.
        convolutions: of `lower`.
        prefer_nhwc: of the CUDA provider.
    """

    name: str
    lowered: bool
    convolutions: bool
    prefer_nhwc: bool


# The simplest first. The first is also what the others are compared with.
LAYOUTS: Mapping[str, Layout] = {
    item.name: item
    for item in (
        Layout(name="plain", lowered=False, convolutions=False, prefer_nhwc=False),
        Layout(name="groupnorm", lowered=True, convolutions=False, prefer_nhwc=True),
        Layout(name="nhwc", lowered=True, convolutions=True, prefer_nhwc=False),
    )
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A candidate that is open and has run once.

    Attributes:
        outputs: of that run, by name; the same inputs for every candidate.
        run: run it (again), waiting for the end; how long it took, in milliseconds.
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
    candidates: Sequence[str] = tuple(LAYOUTS),
    *,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    parity: float = PARITY,
) -> Choice:
    """Measure the candidates against each other and choose.

    Args:
        measure: opens a candidate. What it raises, or its `run` later, puts the candidate out; for the first
            candidate it is raised on, because without that one there is nothing to compare with.
        candidates: the simplest first; that one is the reference.
        rounds: how often each is timed.
        warm_up: how many rounds are run before, and not counted.
        parity: the largest relative L2 to the first candidate's outputs that is no reason to reject.

    Raises:
        Exception: whatever the first candidate's `measure` and `run` raise.
    """
    contest = _Contest(candidates[0], measure(candidates[0]), parity)
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
    """The candidates that are still in; the first is the reference."""

    def __init__(self, name: str, reference: Measured, parity: float) -> None:
        self._first = name
        self._parity = parity
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
            self.rejected[name] = _said(error)
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
                if distance > (most := self._allowed(wanted[key])):
                    self._reject(
                        name,
                        f"its output is {distance:.1e} (relative L2) from {self._first}'s, over {most:.0e}",
                    )
                    return

    def _allowed(self, wanted: Array) -> float:
        return max(self._parity, ROUNDED_PARITY) if wanted.dtype.kind in "iu" else self._parity

    def take_turns(self, *, backwards: bool, counted: bool) -> None:
        """Run each candidate once."""
        for name in list(reversed(self.open)) if backwards else list(self.open):
            try:
                took = self.open[name].run()
            except Exception as error:
                if name == self._first:
                    raise
                self._reject(name, _said(error))
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


def relative_l2(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted| in float64; 0 where both are 0."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    size = float(np.linalg.norm(b))
    difference = float(np.linalg.norm(a - b))
    return difference / (size or 1.0)


def _finite(outputs: Mapping[str, Array]) -> bool:
    return all(bool(np.isfinite(array).all()) for array in outputs.values())


def _said(error: Exception) -> str:
    """An error in one line."""
    text = str(getattr(error, "found", error)) or type(error).__name__
    return " ".join(text.split())
