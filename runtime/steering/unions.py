"""Controls of Union ControlNets: what each picture is, and those of one net joined into one call.

As diffusers' `StableDiffusionXLControlNetUnionPipeline` with `control_mode`, but for this: where several
controls are all off, or of no strength, diffusers goes on calling the net without pictures and adds what it
says; here it is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...engines.errors import UsageError
from ...engines.package import Manifest
from ..controls.control import Control
from ..loop.job import Condition, ControlJob
from .steered import Rows


def union_type(control: Control, manifest: Manifest) -> str | None:
    """What a Union is told that a control's picture is; None of a ControlNet of one kind of picture.

    Raises:
        UsageError: a Union is told nothing, or a type that it does not have; or another net is told one.
    """
    types: Sequence[str] = manifest.control.get("control_types", ())
    told = control.control_type
    if not types:
        if told is not None:
            raise UsageError(
                f"control_type {told!r:.50} for {control.model!r}, which reads one kind of picture",
                expected="no control type",
                fix="Leave it out: control_type, or --control-type",
            )
        return None
    if told is None and control.preparation in types:
        return control.preparation
    if told not in types:
        raise UsageError(
            f"{control.model!r} reads several kinds of pictures, and control_type is {told!r:.50}",
            expected=f"one of {', '.join(types)}",
            fix=f"Say what the picture is: control_type={types[0]!r} (--control-type {types[0]})",
        )
    return told


def check_unions(controls: Sequence[tuple[Control, Manifest]]) -> None:
    """Raise UsageError as `union_type`, and for controls of one Union that differ in their mode."""
    modes: dict[str, str] = {}
    for control, manifest in controls:
        if union_type(control, manifest) is None:
            continue
        mode = modes.setdefault(control.model, control.mode)
        if mode != control.mode:
            raise UsageError(
                f"{control.model!r} is to draw in the modes {mode} and {control.mode} at once",
                expected="one mode for all pictures that a Union reads",
                fix="Give all of its controls the same mode.",
            )


def joined(jobs: Sequence[ControlJob], controls: Sequence[Control], rows: Rows) -> tuple[ControlJob, ...]:
    """The jobs of some controls, one for each: those of a Union become one, in the place of the first.

    One picture counts as its strength says at the net's outputs; several count so before the net, and its
    outputs in full (diffusers' `ControlNetUnionModel.forward`).
    """
    alike: dict[tuple[str, int], list[int]] = {}
    for number, (job, control) in enumerate(zip(jobs, controls, strict=True)):
        union = bool(job.manifest.control.get("control_types"))
        alike.setdefault((control.model, -1 if union else number), []).append(number)
    return tuple(
        _union([jobs[n] for n in numbers], [controls[n] for n in numbers], rows)
        if number < 0
        else jobs[numbers[0]]
        for (_, number), numbers in alike.items()
    )


def _union(jobs: Sequence[ControlJob], controls: Sequence[Control], rows: Rows) -> ControlJob:
    several = len(jobs) > 1
    conditions = tuple(
        _condition(job, control, rows, control.strength if several else 1.0)
        for job, control in zip(jobs, controls, strict=True)
    )
    if not several:
        return replace(jobs[0], conditions=conditions)
    scales = np.zeros_like(jobs[0].scales)
    for job, control in zip(jobs, controls, strict=True):
        if control.strength:
            scales = np.where(job.scales, job.scales / np.float32(control.strength), scales)
    return replace(jobs[0], scales=scales, conditions=conditions)


def _condition(job: ControlJob, control: Control, rows: Rows, strength: float) -> Condition:
    types: Sequence[str] = job.manifest.control["control_types"]
    return Condition(
        control_type=types.index(union_type(control, job.manifest) or ""),
        hint=job.hint,
        hint_of_row=job.hint_of_row,
        strength=strength,
        on=control.on(rows.schedule)[: rows.steps],
    )
