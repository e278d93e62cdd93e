"""How strongly each row of a run is guided: by one scale, by one for each step, or not at all.

Guidance does the most between the noisiest and the cleanest steps; outside it costs half of each UNet call
(Kynkäänniemi et al. 2024, arXiv 2404.07724).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...engines.errors import UsageError
from ...engines.spec import Array
from ..controls.control import steps_on

OFF = 1.0  # at this scale the unconditional rows cancel


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """Which rows of a schedule a run has.

    Attributes:
        count: S, the rows that are run.
        to_end: those from its first one to the end of the schedule: more where another model goes on.
        whole: those of the schedule.
        calls: of the UNet in a step; the last step may have fewer.
        steps: of the schedule, as `num_inference_steps` counts them.
        continues: whether another model has run what comes before the first row.
    """

    count: int
    to_end: int
    whole: int
    calls: int
    steps: int
    continues: bool

    @property
    def first(self) -> int:
        """The place of the first row in the schedule."""
        return self.whole - self.to_end

    @property
    def step_of_row(self) -> Array:
        """(S,) int: the step that each row belongs to."""
        repeated = max(self.whole - self.calls * self.steps, 0)  # PLMS runs its first step twice
        places = self.first + np.arange(self.count) - repeated
        return np.minimum(np.maximum(places // self.calls, 0), self.steps - 1)


def scales_of_rows(
    scale: float | Sequence[float], interval: tuple[float, float] | None, rows: RunRows
) -> Array:
    """The guidance scale of each row.

    Args:
        scale: of all steps, or of each of the schedule's.
        interval: (start, end), shares of the run as those of a control; where two models share a schedule,
            shares of that. None is all of it.
        rows: the run's.

    Returns:
        (S,) float32; `OFF` in rows that are not guided.

    Raises:
        UsageError: another number of scales than steps, or an interval without a whole one.
    """
    if isinstance(scale, Sequence):
        if len(scale) != rows.steps:
            raise UsageError(
                f"guidance_scale has {len(scale)} numbers for {rows.steps} steps",
                expected="one number, or one for each step",
                fix=f"Pass guidance_scale as {rows.steps} numbers, or as one.",
            )
        scales = np.asarray(scale, np.float32)[rows.step_of_row]
    else:
        scales = np.full(rows.count, scale, np.float32)
    if interval is not None:
        before = rows.first if rows.continues else 0
        on = steps_on(before + rows.to_end, *interval)
        if not on.any():
            raise UsageError(
                f"guidance_interval is {interval[0]:g} to {interval[1]:g}, with none of {len(on)} calls",
                expected="a whole one between these shares",
                fix="Widen guidance_interval, or pass guidance_scale=1.",
            )
        scales = np.where(on[before : before + rows.count], scales, np.float32(OFF))
    return np.maximum(scales, np.float32(OFF))
