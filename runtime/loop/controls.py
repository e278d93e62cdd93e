"""What controls add to the UNet's calls.

Zhang et al. 2023 (arXiv 2302.05543), section 3.1; diffusers' `StableDiffusionControlNetPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from ...engines.errors import UsageError
from ...engines.package import Manifest
from ...engines.spec import (
    CONTROL_TYPE,
    DTYPES,
    FEATURE,
    HINT,
    HINT_EMBEDDING,
    IMAGE_KEYS,
    IMAGE_MASK,
    IMAGE_VALUES,
    RESIDUAL,
    SCALES,
    STRENGTH,
    Array,
    NetSpec,
    TensorSpec,
    shape_of,
)
from ..controls.image_prompt import shrunk_mask
from .job import Condition, ControlJob, DenoiseJob, FeatureJob, ImagePromptJob

# Prefixes of the inputs that `unet` does not have.
_OWN = (RESIDUAL, FEATURE, IMAGE_KEYS, IMAGE_VALUES, IMAGE_MASK)


def added_inputs(unet: NetSpec) -> list[TensorSpec]:
    """What a graph of the UNet takes from controls; zeros, with G and I 1, are no control."""
    return [item for item in unet.inputs if item.name.startswith(_OWN)]


def refuse_unloaded() -> NoReturn:
    """Raise UsageError for a job with controls that another thread unloaded."""
    raise UsageError(
        "the controls of this picture were unloaded before its last step",
        expected="controls that stay loaded while a picture is drawn",
        fix="Call pipe.unload_controls() when no picture is drawn.",
    )


class SteadyInputs:
    """What the UNet is given besides the inputs of `unet` that does not depend on the latent.

    Zeros where nothing steers. All is computed as it is made, once.

    Args:
        job: with the rows of the UNet, of which some may be left alone.
        unet: the contract of the graph that takes controls.
    """

    def __init__(self, job: DenoiseJob, unet: NetSpec) -> None:
        self._steering = job.steering
        _, height, width = job.shape
        prompt = job.steering.image_prompt
        tokens = {"G": 1, "I": 1} if prompt is None else {"G": prompt.groups, "I": prompt.tokens}
        sizes = {"B": len(job.text_of_row), "H/8": height, "W/8": width, **tokens}
        own = added_inputs(unet)
        self._types = {item.name: DTYPES[item.dtype] for item in own}
        self.zeros = {
            item.name: np.zeros(shape_of(item.shape, sizes), self._types[item.name]) for item in own
        }
        self._constant = {} if prompt is None else self.typed(prompt.inputs)
        self._shrunk = {} if prompt is None else _shrunk(prompt, self.zeros)
        self._maps = [_maps(one) for one in job.steering.features]
        self._features: dict[tuple[bool, ...], dict[str, Array]] = {}
        self._masks: dict[bytes, dict[str, Array]] = {}

    def at(self, row: int) -> dict[str, Array]:
        """All of them, at a row of the table; in rows that are alike the very same arrays."""
        return {**self.zeros, **self._constant, **self._features_of(row), **self._masks_of(row)}

    def typed(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The arrays in the types of the UNet's inputs of their names."""
        return {name: value.astype(self._types[name], copy=False) for name, value in arrays.items()}

    def sums(self, added: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """By name; in float32, so that the order of several does not matter."""
        totals: dict[str, Array] = {}
        for one in added:
            for name, value in one.items():
                if name not in totals:
                    totals[name] = np.zeros(self.zeros[name].shape, np.float32)
                totals[name] += value
        return self.typed(totals)

    def _features_of(self, row: int) -> dict[str, Array]:
        """Those of the T2I-Adapters that are on in a row."""
        on = tuple(bool(one.on[row]) for one in self._steering.features)
        if on not in self._features:
            self._features[on] = self.sums([maps for maps, read in zip(self._maps, on, strict=True) if read])
        return self._features[on]

    def _masks_of(self, row: int) -> dict[str, Array]:
        """Where each group of image tokens counts in a row."""
        prompt = self._steering.image_prompt
        if prompt is None:
            return {}
        on = prompt.on[row]
        if (key := on.tobytes()) not in self._masks:
            factors = on[None, :, None, None]
            self._masks[key] = self.typed({name: mask * factors for name, mask in self._shrunk.items()})
        return self._masks[key]


class HostControls:
    """What the UNet is given besides the inputs of `unet`, on the host. Arguments as of `SteadyInputs`."""

    def __init__(self, job: DenoiseJob, unet: NetSpec) -> None:
        self._steady = SteadyInputs(job, unet)
        self._nets = [ControlNetInputs(control, job) for control in job.steering.controlnets]

    def inputs(self, latent: Array, row: int) -> dict[str, Array]:
        """All of them.

        Args:
            latent: (B, C, H/8, W/8), as the UNet sees it.
            row: of the table.
        """
        found = [residuals for net in self._nets if (residuals := net.residuals(latent, row))]
        return {**self._steady.at(row), **self._steady.sums(found)}


def _maps(job: FeatureJob) -> dict[str, Array]:
    """What a T2I-Adapter makes of its pictures, by the names of the UNet's inputs, (B, C, …) float32."""
    found = job.call("t2i_adapter", **{HINT: job.hint})
    return {
        name: job.strength * value.astype(np.float32)[list(job.hint_of_row)] for name, value in found.items()
    }


def _shrunk(prompt: ImagePromptJob, zeros: Mapping[str, Array]) -> dict[str, Array]:
    """Where each group counts at the UNet's levels, by the names of its inputs, (B, G, …) float32."""
    found: dict[str, Array] = {}
    for name, value in zeros.items():
        if name.startswith(IMAGE_MASK):
            rows, _, height, width = value.shape
            masks = np.stack([shrunk_mask(mask, height, width) for mask in prompt.masks])
            found[name] = np.repeat(masks[None], rows, axis=0)
    return found


class ControlNetInputs:
    """What a ControlNet is given besides the latent; its nets that do not depend on it are called once.

    Attributes:
        constant: (B, …) by the names of its inputs, the same in every row.
        schedule: (S * B, …) by the names of its inputs.
        scales: (S, B, R) float32, as `ControlJob.scales`.
    """

    def __init__(self, control: ControlJob, job: DenoiseJob) -> None:
        self._control = control
        nets, call = control.manifest.nets, control.loop.call
        self._net = nets["controlnet"].spec
        self._hints = _Hints(control)
        self.constant: dict[str, Array] = {}
        if "controlnet_context" in nets:
            context = nets["controlnet_context"].spec.inputs[0]
            texts = call("controlnet_context", context=job.context.astype(DTYPES[context.dtype]))
            self.constant = {name: value[list(job.text_of_row)] for name, value in texts.items()}
        each = len(job.text_of_row) // job.rows_per_step
        schedule = call("controlnet_time", **_times(control, job))
        self.schedule = {name: np.repeat(rows, each, axis=0) for name, rows in schedule.items()}
        self.scales = control.scales

    def on(self, row: int) -> Array:
        """The rows of the UNet that it adds to at a row of the table."""
        return np.flatnonzero(self.scales[row].any(axis=1))

    def hint(self, row: int) -> Array:
        """(B, C, H/8, W/8) what it makes of its pictures, at a row in which it is on."""
        return self._hints.at(row)

    def residuals(self, latent: Array, row: int) -> dict[str, Array]:
        """By name, (B, C, …), or (B, C, 1, 1) of a net that averages them; nothing where it is off."""
        on = self.on(row)
        if not len(on):
            return {}
        rows = len(latent)
        inputs = {
            **{name: value[on] for name, value in self.constant.items()},
            **{name: value[row * rows : (row + 1) * rows][on] for name, value in self.schedule.items()},
            "latent": latent[on].astype(DTYPES[self._net.inputs[0].dtype], copy=False),
            HINT_EMBEDDING: self.hint(row)[on],
            SCALES: self.scales[row][on],
        }
        found = self._control.loop.call("controlnet", **inputs)
        if averages(self._control.manifest):
            found = {name: value.mean(axis=(2, 3), keepdims=True) for name, value in found.items()}
        return found if len(on) == rows else {name: _among(rows, on, value) for name, value in found.items()}


def averages(manifest: Manifest) -> bool:
    """Whether a ControlNet's residuals are averaged over the picture ("shuffle")."""
    return bool(manifest.control.get("global_pool"))


class _Hints:
    """What a net makes of its pictures, once; of a Union's the sum of those that are read in a step."""

    def __init__(self, control: ControlJob) -> None:
        self._conditions, self._summed = control.conditions, dict[bytes, Array]()
        if control.conditions:
            self._parts = [_embedded(control, condition) for condition in control.conditions]
        else:
            embedding = control.loop.call("controlnet_hint", hint=control.hint)[HINT_EMBEDDING]
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
    embedding = control.loop.call("controlnet_hint", hint=condition.hint, **told)[HINT_EMBEDDING]
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
