"""The weights of controls that are stored as a change of a checkpoint's UNet.

Two kinds are (lllyasviel's "transfer control", cldm of ComfyUI and of sd-webui-controlnet):

- a difference: each tensor that the UNet has too is to be added to the UNet's;
- a control-LoRA (Stability AI): `up` (out, r) times `down` (r, in), flattened and without alpha, is to be
  added to the UNet's weight. What the file has whole takes the place of the UNet's, and the rest is the
  UNet's.

The base is the checkpoint's own weights. ComfyUI takes those that are in use, with the LoRAs in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce

import numpy as np

from ...engines.errors import CheckpointError, NumericError
from ...engines.net_weights import LARGEST, peak
from ...engines.spec import Array
from ..files.component import TensorHeader, read_tensors
from ..files.file_kinds import FAMILIES
from ..files.open import Checkpoint
from ..made_weights import Weight, wider
from ..stored_types import convert
from .control_file import ControlFile
from .controlnet import is_unets
from .controlnet_shapes import controlnet_shapes


def completed(control: ControlFile, base: Checkpoint) -> ControlFile:
    """The plain ControlNet that a control and its base make, described; nothing is computed yet.

    What is neither's as it is stored is in `ControlFile.made`, to be written by `completed.complete`.

    Args:
        control: one that needs a base.
        base: the checkpoint that it was made of, or a relative.

    Raises:
        CheckpointError: as `weights_with_base`.
    """
    own, unet = control.part.tensors, base.unet.tensors
    weights = weights_with_base(control, base)
    made: dict[str, Weight] = {}
    tensors: dict[str, TensorHeader] = {}
    for name, weight in weights.items():
        first, *others = _made_of(control, name, base)
        if others:
            made[name] = weight
        tensors[name] = replace(first, dtype=weight.dtype, shape=weight.shape)
    read = {name: unet[name] for name in weights if name in unet and (name in made or name not in own)}
    return replace(control, part=replace(control.part, tensors=tensors), base=read, made=made)


def weights_with_base(control: ControlFile, base: Checkpoint) -> Mapping[str, Weight]:
    """Every weight of the plain ControlNet that a control and its base make, by diffusers' names.

    Nothing is read before a weight's `read` is called, which raises NumericError for what fp16 cannot hold;
    sums are made in float32.

    Args:
        control: a ControlNet; one that needs no base has its own weights.
        base: the checkpoint that it was made of, or a relative.

    Raises:
        CheckpointError: the base's UNet lacks a tensor that the control changes, or has it in another shape.
    """
    unet = base.unet.tensors
    wanted = controlnet_shapes(control.part.config)
    for name, shape in wanted.items():
        if _reads_base(control, name) and (name not in unet or unet[name].shape != shape):
            _refuse_base(control, base, name, shape)
    stored, under = read_tensors(control.part.tensors), read_tensors(_shared(unet, wanted))
    make = _MAKERS[control.needs_base]
    return {
        name: Weight(
            shape=shape,
            dtype=reduce(wider, (header.dtype for header in _made_of(control, name, base))),
            read=partial(_checked, control, base, name, partial(make, name, stored, under)),
        )
        for name, shape in wanted.items()
    }


def _made_of(control: ControlFile, name: str, base: Checkpoint) -> tuple[TensorHeader, ...]:
    """What a weight is made of: one tensor as it is stored, or a sum's."""
    own, unet = control.part.tensors, base.unet.tensors
    module = name.removesuffix(".weight")
    if control.needs_base == "difference" and name in unet:
        return own[name], unet[name]
    if name in own:
        return (own[name],)
    if f"{module}.up" in own:
        return own[f"{module}.up"], own[f"{module}.down"], unet[name]
    return (unet[name],)


def _checked(control: ControlFile, base: Checkpoint, name: str, make: Callable[[], Array]) -> Array:
    """A weight that fp16 holds, as all that are published."""
    found = make()
    largest = peak(found)
    if not largest <= LARGEST:  # NaN neither
        raise NumericError(
            f"{control.root} and {base.root} together make a weight {name} of {largest:.6g}",
            expected=f"at most {LARGEST:.6g}, the largest number of fp16, as every model's weights are",
            fix="Open it with the checkpoint that it was made of.",
        )
    return found


def _shared(unet: Mapping[str, TensorHeader], wanted: Mapping[str, object]) -> dict[str, TensorHeader]:
    """The UNet's tensors that a ControlNet has too."""
    return {name: header for name, header in unet.items() if name in wanted}


def _reads_base(control: ControlFile, name: str) -> bool:
    if control.needs_base == "difference":
        return is_unets(name)
    return control.needs_base == "lora" and name not in control.part.tensors


def _refuse_base(control: ControlFile, base: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    found = base.unet.tensors[name].shape if name in base.unet.tensors else "missing"
    raise CheckpointError(
        f"{control.root} is a change of another UNet than that of {base.root}: {name} is {found} there",
        expected=f"{shape}, of a checkpoint of {FAMILIES[control.family]}",
        fix="Open it with the checkpoint that it was made of, or use a ControlNet that is whole.",
    )


def _single(array: Array) -> Array:
    return convert(array, "F32")


def _own(name: str, stored: Mapping[str, Array], under: Mapping[str, Array]) -> Array:
    del under
    return _single(stored[name])


def _added(name: str, stored: Mapping[str, Array], under: Mapping[str, Array]) -> Array:
    """A difference. The UNet has no picture's convolutions and no residuals'."""
    return _single(stored[name]) + _single(under[name]) if name in under else _single(stored[name])


def _changed(name: str, stored: Mapping[str, Array], under: Mapping[str, Array]) -> Array:
    """A control-LoRA's own tensor, its change of the UNet's, or the UNet's."""
    if name in stored:
        return _single(stored[name])
    module = name.removesuffix(".weight")
    weight = _single(under[name])
    if f"{module}.up" not in stored:
        return weight
    up, down = (_single(stored[f"{module}.{end}"]) for end in ("up", "down"))
    change = np.reshape(up, (up.shape[0], -1)) @ np.reshape(down, (down.shape[0], -1))
    return weight + np.reshape(change, weight.shape)


_MAKERS: Mapping[str, Callable[[str, Mapping[str, Array], Mapping[str, Array]], Array]] = {
    "": _own,
    "difference": _added,
    "lora": _changed,
}
