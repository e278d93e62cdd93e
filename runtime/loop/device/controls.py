"""What steers a picture on a device: a ControlNet's residuals are computed where the UNet reads them.

Before a row of the table the net runs on the same stream, on a copy of the latent, and its outputs are copied
into the UNet's inputs; nothing of it passes through the host. What does not depend on the latent is uploaded
where it changes: mostly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....engines.device import BoundNet, Device
from ....engines.spec import DTYPES, HINT_EMBEDDING, SCALES, TIME_INVARIANT, Array
from ..controls import ControlNetInputs, SteadyInputs, refuse_unloaded
from ..job import DenoiseJob
from .programs import (
    BlockLayout,
    BoundProgram,
    DenoiseProgram,
    DenoiseShape,
    Nets,
    Scratch,
    Sizes,
    input_shapes,
    row_ranges,
)

NET = "controlnet"


@dataclass(frozen=True, kw_only=True)
class ControlShape:
    """What decides a `ControlProgram`.

    Attributes:
        steps: S, rows of the table.
        calls: rows of each call of the net in a step, as the UNet's.
        height, width: of the latent.
        tokens: T, the length of the context.
    """

    steps: int
    calls: tuple[int, ...]
    height: int
    width: int
    tokens: int

    @classmethod
    def of(cls, job: DenoiseJob, shape: DenoiseShape) -> ControlShape:
        """Beside a UNet that runs a job in that shape."""
        return cls(
            steps=len(job.table),
            calls=shape.calls(),
            height=shape.height,
            width=shape.width,
            tokens=shape.tokens,
        )

    @property
    def sizes(self) -> Sizes:
        """The contract's symbols for a call; all calls are equal."""
        return {"B": self.calls[0], "H/8": self.height, "W/8": self.width, "T": self.tokens}


class ControlProgram(BoundProgram):
    """A ControlNet with its inputs and outputs, bound once for each call of a step.

    The calls share latent and outputs; what else they read lies side by side. What differs from row to row
    of the table is packed, so that one copy feeds a row.
    """

    def __init__(self, device: Device, nets: Nets, shape: ControlShape, scratch: Scratch) -> None:
        self._shape, self._net = shape, nets[NET]
        spec, sizes = self._net.spec, shape.sizes
        self._fed = [
            item for item in spec.inputs if item.name == SCALES or item.name.startswith(TIME_INVARIANT)
        ]
        self._kept = [item for item in spec.inputs if item.name != "latent" and item not in self._fed]
        self._row = BlockLayout()
        layout = BlockLayout()
        layout.add_tensors([item for item in spec.inputs if item.name == "latent"], sizes)
        layout.add_tensors(spec.outputs, sizes)
        for call in range(len(shape.calls)):
            self._row.add_tensors(self._fed, sizes, f"{call}/")
            layout.add_tensors(self._kept, sizes, f"{call}/")
        layout.add("row", "uint8", (self._row.size,))
        layout.add("rows", "uint8", (shape.steps, self._row.size))
        super().__init__(device, layout, scratch)
        self.outputs = tuple(item.name for item in spec.outputs)
        self._bound = [self._bind_call(call) for call in range(len(shape.calls))]
        self._hint: Array | None = None

    def _bind_call(self, call: int) -> BoundNet:
        block, spec = self.block, self._net.spec
        row = block.address("row")
        addresses = {
            "latent": block.address("latent"),
            **{item.name: block.address(item.name) for item in spec.outputs},
            **{item.name: block.address(f"{call}/{item.name}") for item in self._kept},
            **{item.name: row + self._row.places[f"{call}/{item.name}"].offset for item in self._fed},
        }
        return self.bind(self._net, input_shapes(spec, self._shape.sizes), addresses)

    def begin(self, inputs: ControlNetInputs) -> None:
        """Upload what a picture's rows read."""
        for call, rows in enumerate(row_ranges(self._shape.calls)):
            for name, values in inputs.constant.items():
                self.block.upload(f"{call}/{name}", values[rows])
        self.block.upload("rows", self._packed(inputs))
        self._hint = None

    def _packed(self, inputs: ControlNetInputs) -> Array:
        """(S, bytes) what each row of the table is fed."""
        steps = self._shape.steps
        packed = np.zeros((steps, self._row.size), np.uint8)
        for call, rows in enumerate(row_ranges(self._shape.calls)):
            for item in self._fed:
                place = self._row.places[f"{call}/{item.name}"]
                values: Any = inputs.scales if item.name == SCALES else inputs.schedule[item.name]
                of_call = values.reshape((steps, -1, *place.shape[1:]))[:, rows]  # (S, B of it, …)
                content: Any = np.ascontiguousarray(of_call, DTYPES[place.dtype])
                content = content.reshape((steps, -1))
                packed[:, place.offset : place.offset + place.size] = content.view(np.uint8)
        return packed

    def enqueue(self, inputs: ControlNetInputs, row: int, denoiser: DenoiseProgram) -> None:
        """Run the net on the denoiser's latent, and put what it adds where the UNet reads it."""
        block, device = self.block, self._device
        device.copy(block.address("row"), block.address("rows") + row * self._row.size, self._row.size)
        hint = inputs.hint(row)
        if hint is not self._hint:
            self._hint = hint
            for call, rows in enumerate(row_ranges(self._shape.calls)):
                block.upload(f"{call}/{HINT_EMBEDDING}", hint[rows])
        size = block.place("latent").size
        for call, bound in enumerate(self._bound):
            device.copy(block.address("latent"), denoiser.block.address("latent") + call * size, size)
            bound.enqueue()
            for name in self.outputs:
                denoiser.copy_added(call, name, block.address(name))


@dataclass(frozen=True, kw_only=True)
class SteeringInputs:
    """What steers a picture, before any of its memory is taken.

    Attributes:
        steady: what does not depend on the latent.
        nets: what its ControlNet is given, or nothing.
    """

    steady: SteadyInputs
    nets: tuple[ControlNetInputs, ...]


class DeviceControls:
    """What steers one picture: `feed` before each of its rows.

    Args:
        denoiser: whose UNet reads it.
        given: what steers.
        program: of the ControlNet; None where none steers.
    """

    def __init__(
        self, denoiser: DenoiseProgram, given: SteeringInputs, program: ControlProgram | None
    ) -> None:
        self._denoiser, self._given, self._program = denoiser, given, program
        if program is not None:
            program.begin(*given.nets)

    def feed(self, row: int) -> None:
        """Enqueue what the UNet is given at a row of the table. Raises UsageError once it is unloaded."""
        computed: Sequence[str] = ()
        if self._program is not None:
            if self._program.block.freed:
                refuse_unloaded()
            (inputs,) = self._given.nets
            if len(inputs.on(row)):
                self._program.enqueue(inputs, row, self._denoiser)
                computed = self._program.outputs
        for name, value in self._given.steady.at(row).items():
            if name not in computed:
                self._denoiser.give_added(name, value)
