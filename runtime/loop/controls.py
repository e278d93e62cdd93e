"""What ControlNets add to the UNet's calls: the residuals of each step, computed on the host.

Zhang et al. 2023 (arXiv 2302.05543), section 3.1; diffusers' `StableDiffusionControlNetPipeline`.
"""

from __future__ import annotations

import numpy as np

from ...engines.package import Manifest
from ...engines.spec import (
    DTYPES,
    FEATURE,
    HINT_EMBEDDING,
    RESIDUAL,
    SCALES,
    Array,
    NetSpec,
    shape_of,
)
from .job import ControlJob, DenoiseJob


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
        embedding = call("controlnet_hint", hint=control.hint)[HINT_EMBEDDING]
        self._constant = {HINT_EMBEDDING: embedding[list(control.hint_of_row)]}
        if "controlnet_context" in nets:
            context = nets["controlnet_context"].spec.inputs[0]
            texts = call("controlnet_context", context=job.context.astype(DTYPES[context.dtype]))
            self._constant |= {name: value[list(job.text_of_row)] for name, value in texts.items()}
        each = len(job.text_of_row) // job.rows_per_step
        schedule = call("controlnet_time", **_times(control.manifest, job))
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
            SCALES: scales[on],
        }
        found = self._control.call("controlnet", **inputs)
        if self._control.manifest.control.get("global_pool"):
            found = {name: value.mean(axis=(2, 3), keepdims=True) for name, value in found.items()}
        return found if len(on) == rows else {name: _among(rows, on, value) for name, value in found.items()}


def _times(manifest: Manifest, job: DenoiseJob) -> dict[str, Array]:
    """The inputs of `controlnet_time`: of the job's those that it takes (a guidance embedding is none)."""
    given = job.schedule_inputs()
    return {item.name: given[item.name] for item in manifest.nets["controlnet_time"].spec.inputs}


def _among(rows: int, places: Array, values: Array) -> Array:
    """Rows of zeros with these values in these places."""
    whole = np.zeros((rows, *values.shape[1:]), values.dtype)
    whole[places] = values
    return whole
