"""What ControlNets add to the UNet's calls: the residuals of each step, computed on the host.

Zhang et al. 2023 (arXiv 2302.05543), section 3.1; diffusers' `StableDiffusionControlNetPipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...engines.spec import (
    CONTROL_TYPE,
    DTYPES,
    FEATURE,
    HINT_EMBEDDING,
    RESIDUAL,
    SCALES,
    STRENGTH,
    Array,
    NetSpec,
    shape_of,
)
from .job import Condition, ControlJob, DenoiseJob


class HostControls:
    """The ControlNets of a job. What does not depend on the latent is computed as it is made, once.

    Args:
        job: with the rows of the UNet, of which some may be left alone.
        unet: the contract of `unet_controlled`.
    """

    def __init__(self, job: DenoiseJob, unet: NetSpec) -> None:
        self._unet = unet
        self._nets = [_OnHost(control, job) for control in job.controls]

    def inputs(self, latent: Array, row: int) -> dict[str, Array]:
        """What `unet_controlled` has besides the inputs of `unet`; nothing where no ControlNet is on.

        Args:
            latent: (B, C, H/8, W/8), as the UNet sees it.
            row: of the table.
        """
        found = [residuals for net in self._nets if (residuals := net.residuals(latent, row))]
        if not found:
            return {}
        sizes = {"B": len(latent), "H/8": latent.shape[2], "W/8": latent.shape[3]}
        given: dict[str, Array] = {}
        for item in self._unet.inputs:
            shape = shape_of(item.shape, sizes) if item.name.startswith((RESIDUAL, FEATURE)) else ()
            if item.name.startswith(RESIDUAL):
                # in float32, so that the order of several does not matter
                total = np.zeros(shape, np.float32)
                for residuals in found:
                    total += residuals[item.name]
                given[item.name] = total.astype(DTYPES[item.dtype], copy=False)
            elif item.name.startswith(FEATURE):
                given[item.name] = np.zeros(shape, DTYPES[item.dtype])
        return given


class _OnHost:
    """One of them."""

    def __init__(self, control: ControlJob, job: DenoiseJob) -> None:
        self._control = control
        nets, call = control.manifest.nets, control.call
        self._net = nets["controlnet"].spec
        self._hints = _Hints(control)
        self._constant: dict[str, Array] = {}
        if "controlnet_context" in nets:
            context = nets["controlnet_context"].spec.inputs[0]
            texts = call("controlnet_context", context=job.context.astype(DTYPES[context.dtype]))
            self._constant = {name: value[list(job.text_of_row)] for name, value in texts.items()}
        each = len(job.text_of_row) // job.rows_per_step
        schedule = call("controlnet_time", **_times(control, job))
        self._schedule = {
            name: np.repeat(rows, each, axis=0) for name, rows in schedule.items()
        }  # (S * B, …)

    def residuals(self, latent: Array, row: int) -> dict[str, Array]:
        """By name, (B, C, …), or (B, C, 1, 1) of a net that averages them; nothing where it is off."""
        scales = self._control.scales[row]  # (B, R)
        on = np.flatnonzero(scales.any(axis=1))
        if not len(on):
            return {}
        rows = len(latent)
        inputs = {
            **{name: value[on] for name, value in self._constant.items()},
            **{name: value[row * rows : (row + 1) * rows][on] for name, value in self._schedule.items()},
            "latent": latent[on].astype(DTYPES[self._net.inputs[0].dtype], copy=False),
            HINT_EMBEDDING: self._hints.at(row)[on],
            SCALES: scales[on],
        }
        found = self._control.call("controlnet", **inputs)
        if self._control.manifest.control.get("global_pool"):
            found = {name: value.mean(axis=(2, 3), keepdims=True) for name, value in found.items()}
        return found if len(on) == rows else {name: _among(rows, on, value) for name, value in found.items()}


class _Hints:
    """What a net makes of its pictures, once; of a Union's the sum of those that are read in a step."""

    def __init__(self, control: ControlJob) -> None:
        self._conditions, self._summed = control.conditions, dict[bytes, Array]()
        if control.conditions:
            self._parts = [_embedded(control, condition) for condition in control.conditions]
        else:
            embedding = control.call("controlnet_hint", hint=control.hint)[HINT_EMBEDDING]
            self._parts = [embedding[list(control.hint_of_row)]]

    def at(self, row: int) -> Array:
        """(B, C, H/8, W/8), for a row of the table in which the net is on."""
        if len(self._parts) == 1:
            return self._parts[0]
        on = np.array([condition.on[row] for condition in self._conditions])
        if on.tobytes() not in self._summed:
            parts = [part for part, read in zip(self._parts, on, strict=True) if read]
            total = np.sum(parts, axis=0, dtype=np.float32)
            self._summed = {on.tobytes(): total.astype(parts[0].dtype, copy=False)}
        return self._summed[on.tobytes()]


def _embedded(control: ControlJob, condition: Condition) -> Array:
    """What a Union makes of one of its pictures, (B, C, H/8, W/8)."""
    rows = len(condition.hint)
    told = {
        CONTROL_TYPE: np.repeat(_types(control, [condition])[None], rows, axis=0),
        STRENGTH: np.full(rows, condition.strength, np.float32),
    }
    embedding = control.call("controlnet_hint", hint=condition.hint, **told)[HINT_EMBEDDING]
    return embedding[list(condition.hint_of_row)]


def _types(control: ControlJob, conditions: Sequence[Condition]) -> Array:
    """1 for each type that these conditions are of, (types,) float32."""
    types = np.zeros(control.manifest.vectors[CONTROL_TYPE], np.float32)
    types[[condition.control_type for condition in conditions]] = 1
    return types


def _times(control: ControlJob, job: DenoiseJob) -> dict[str, Array]:
    """The inputs of `controlnet_time`: of the job's those that it takes (a guidance embedding is none)."""
    given = job.schedule_inputs()
    if control.conditions:
        given[CONTROL_TYPE] = np.tile(_types(control, control.conditions), (len(given["timestep"]), 1))
    return {item.name: given[item.name] for item in control.manifest.nets["controlnet_time"].spec.inputs}


def _among(rows: int, places: Array, values: Array) -> Array:
    """Rows of zeros with these values in these places."""
    whole = np.zeros((rows, *values.shape[1:]), values.dtype)
    whole[places] = values
    return whole
