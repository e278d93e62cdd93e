"""The pieces of a device loop: buffers with nets bound to them, each reusable for every request of its shape.

::

    Prompts   token ids -> context                       once per request
    Schedule  timesteps -> one packed line per table row  once per request
    Canvas    invariants, latent, state; UNet and step    once per row of the table
    Decoder   latent -> uint8 picture                     once per request

A net's shapes and addresses are set when a program is made and never again: TensorRT pays for each change.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ..engines.device import BoundNet, Device, DeviceNet
from ..engines.spec import CONTEXT_INVARIANT, ROW, TIME_INVARIANT, Array, NetSpec, TensorSpec
from .device_memory import Block, Layout, Scratch, Sizes, aligned, shape_of
from .job import Job

Nets = Mapping[str, DeviceNet]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What decides a Canvas: N pictures of (H, W) pixels, B rows a step, at most `rows` in one UNet call."""

    pictures: int
    guided: bool
    height: int
    width: int
    tokens: int
    rows: int
    latent_scale: int

    @property
    def batch(self) -> int:
        """B, the rows of a step: twice the pictures with guidance."""
        return self.pictures * (2 if self.guided else 1)

    def sizes(self, rows: int) -> Sizes:
        """The contract's symbols, for a call of `rows` rows."""
        scale = self.latent_scale
        return {
            "N": self.pictures,
            "B": rows,
            "H": self.height,
            "W": self.width,
            "H/8": self.height // scale,
            "W/8": self.width // scale,
            "T": self.tokens,
        }

    def calls(self) -> tuple[int, ...]:
        """Rows of each UNet call of a step, unconditional rows first."""
        full, rest = divmod(self.batch, self.rows)
        return (self.rows,) * full + ((rest,) if rest else ())


def input_shapes(spec: NetSpec, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of every input of a net."""
    return {item.name: shape_of(item.shape, sizes) for item in spec.inputs}


def row_layout(unet: NetSpec) -> Layout:
    """One line of the packed schedule: the step's row, then the UNet's time invariants of that row."""
    layout = Layout()
    layout.add("row", "float32", (len(ROW),))
    layout.add_tensors([item for item in unet.inputs if item.name.startswith(TIME_INVARIANT)], {})
    return layout


class Program:
    """What all four have in common: a block, the scratch it shares, and the nets bound to them."""

    def __init__(self, device: Device, layout: Layout, scratch: Scratch) -> None:
        self._device = device
        self.scratch = scratch
        self._open = ExitStack()
        self.block = Block(device, layout)
        self._open.callback(self.block.close)
        scratch.users += 1
        self._open.callback(self._leave)

    def _leave(self) -> None:
        self.scratch.users -= 1

    def bind(self, net: DeviceNet, sizes: Sizes, addresses: Mapping[str, int]) -> BoundNet:
        """Bind a net for good; a failure frees what this program holds."""
        try:
            bound = net.bind(input_shapes(net.spec, sizes), addresses, self.scratch.address)
        except BaseException:
            self.close()
            raise
        self._open.callback(bound.close)
        return bound

    def addresses(self, spec: NetSpec) -> dict[str, int]:
        """Of every input and output that the block has under the net's own names."""
        return {item.name: self.block.address(item.name) for item in (*spec.inputs, *spec.outputs)}

    def close(self) -> None:
        """Free everything. May be called twice."""
        self._open.close()


class Prompts(Program):
    """The text encoder for P texts."""

    def __init__(self, device: Device, nets: Nets, texts: int, scratch: Scratch) -> None:
        net, sizes = nets["text_encoder"], {"P": texts}
        layout = Layout()
        layout.add_tensors((*net.spec.inputs, *net.spec.outputs), sizes)
        super().__init__(device, layout, scratch)
        self._bound = self.bind(net, sizes, self.addresses(net.spec))

    def enqueue(self, job: Job) -> None:
        """Encode the job's texts."""
        self.block.upload("input_ids", job.token_ids)
        self._bound.enqueue()


class Schedule(Program):
    """The table of S rows on the device, one packed line each, and the noise it draws."""

    def __init__(
        self, device: Device, nets: Nets, rows: int, noise: tuple[int, ...] | None, scratch: Scratch
    ) -> None:
        net, sizes = nets["unet_time"], {"S": rows}
        self.line = row_layout(nets["unet"].spec)
        layout = Layout()
        layout.add_tensors((*net.spec.inputs, *net.spec.outputs), sizes)
        layout.add("rows", "float32", (rows, len(ROW)))
        layout.add("packed", "uint8", (rows, self.line.size))
        if noise is not None:
            # each row's noise at an aligned place of its own
            pitch = aligned(4 * int(np.prod(noise)))
            layout.add("noises", "uint8", (rows, pitch))
        super().__init__(device, layout, scratch)
        self._outputs = net.spec.outputs
        self._rows = rows
        self.draws = noise is not None
        self._bound = self.bind(net, sizes, self.addresses(net.spec))

    def enqueue(self, job: Job, noises: Array | None) -> None:
        """Upload the table, compute the time invariants of all its rows, and pack one line per row."""
        block = self.block
        block.upload("timestep", job.table.t)
        block.upload("rows", job.table.rows(job.guidance_scale, job.guidance_rescale))
        if noises is not None:
            padded = np.zeros(block.place("noises").shape, np.uint8)
            for line, drawn in zip(padded, noises, strict=True):
                content = np.frombuffer(np.ascontiguousarray(drawn).data, np.uint8)
                line[: content.size] = content
            block.upload("noises", padded)
        self._bound.enqueue()
        self._pack("rows", "row")
        for output in self._outputs:
            self._pack(output.name, output.name)

    def _pack(self, source: str, place: str) -> None:
        """(S, C) contiguous -> column `place` of the packed lines."""
        target = self.line.places[place]
        self._device.copy(
            self.block.address("packed") + target.offset,
            self.block.address(source),
            target.size,
            rows=self._rows,
            to_pitch=self.line.size,
            pitch=target.size,
        )

    def line_address(self, row: int) -> int:
        """Of the packed line of a row."""
        return self.block.address("packed") + row * self.line.size

    def noise_address(self, row: int) -> int:
        """Of the noise that a row draws."""
        return self.block.address("noises") + row * self.block.place("noises").shape[1]


class Canvas(Program):
    """Latent, state and invariants of one frame, with the UNet and the step bound to them.

    The UNet runs in one call of B rows, or in several smaller ones when memory is short; then each call has
    buffers of its own, because a row need not start at an aligned address.
    """

    def __init__(self, device: Device, nets: Nets, frame: Frame, scratch: Scratch) -> None:
        self.frame = frame
        self._nets = nets
        unet, step = nets["unet"].spec, nets["step"].spec
        sizes = frame.sizes(frame.batch)
        self._invariants = [item for item in unet.inputs if item.name.startswith(CONTEXT_INVARIANT)]
        layout = Layout()
        layout.add_tensors([*_tensors(step, "prediction", "state", "noise", "next_state", "latent")], sizes)
        self._line = row_layout(unet)
        layout.add("line", "uint8", (self._line.size,))
        self._calls = frame.calls()
        for index, rows in enumerate(self._calls):
            self._add_call(layout, index, frame.sizes(rows))
        super().__init__(device, layout, scratch)
        line = self.block.address("line")
        self._now = {name: line + place.offset for name, place in self._line.places.items()}
        state = {item.name: self.block.address(item.name) for item in _tensors(step, *layout.places)}
        self._step = self.bind(nets["step"], sizes, {**state, "row": self._now["row"]})
        self._bound = [self._bind_call(index, frame.sizes(rows)) for index, rows in enumerate(self._calls)]

    def _add_call(self, layout: Layout, index: int, sizes: Sizes) -> None:
        context = self._nets["unet_context"].spec.inputs
        layout.add_tensors([*context, *self._invariants], sizes, f"{index}/")
        if len(self._calls) > 1:
            layout.add_tensors(_tensors(self._nets["unet"].spec, "latent", "prediction"), sizes, f"{index}/")

    def _bind_call(self, index: int, sizes: Sizes) -> tuple[BoundNet, BoundNet]:
        """The UNet's call `index`, and what computes its invariants."""
        block = self.block
        invariants = {item.name: block.address(f"{index}/{item.name}") for item in self._invariants}
        own = "" if len(self._calls) == 1 else f"{index}/"
        ends = {name: block.address(f"{own}{name}") for name in ("latent", "prediction")}
        times = {name: address for name, address in self._now.items() if name != "row"}
        context = {"context": block.address(f"{index}/context"), **invariants}
        before = self.bind(self._nets["unet_context"], sizes, context)
        return before, self.bind(self._nets["unet"], sizes, {**invariants, **times, **ends})

    @property
    def profile(self) -> str:
        """What the UNet's engine was optimised for."""
        return self._bound[0][1].profile

    def set_context(self, prompts: Prompts, text_of_row: tuple[int, ...]) -> None:
        """Give every row its text's context, and compute the invariants of all rows."""
        source, place = prompts.block.address("context"), prompts.block.place("context")
        width = place.size // place.shape[0]
        row = 0
        for index, (rows, (before, _)) in enumerate(zip(self._calls, self._bound, strict=True)):
            target = self.block.address(f"{index}/context")
            for place_in_call in range(rows):
                self._device.copy(target + place_in_call * width, source + text_of_row[row] * width, width)
                row += 1
            before.enqueue()

    def set_latent(self, latent: Array) -> None:
        """(N, C, H/8, W/8) float32: start, or go on, from here, with nothing remembered if at the start."""
        frame = self.frame
        self._device.upload(self.block.address("state"), np.ascontiguousarray(latent, np.float32))
        self.block.upload("latent", np.concatenate([latent] * (frame.batch // frame.pictures)))

    def forget(self) -> None:
        """Clear what the state remembers: a number times whatever lay there before might be NaN."""
        place = self.block.place("state")
        self._device.upload(self.block.address("state"), np.zeros(place.shape, np.float32))

    @property
    def capturable(self) -> bool:
        """Whether the libraries say that a row can be captured."""
        return self._step.capturable and all(unet.capturable for _, unet in self._bound)

    def feed_row(self, schedule: Schedule, row: int) -> None:
        """Copy in what differs from row to row: the line, and the noise."""
        block, device = self.block, self._device
        device.copy(block.address("line"), schedule.line_address(row), self._line.size)
        if schedule.draws:
            device.copy(block.address("noise"), schedule.noise_address(row), block.place("noise").size)

    def enqueue_row(self) -> None:
        """UNet and row update, at the same addresses every time: what a captured graph holds."""
        block, device = self.block, self._device
        if len(self._calls) > 1:
            self._exchange("latent", inward=True)
        for _, unet in self._bound:
            unet.enqueue()
        if len(self._calls) > 1:
            self._exchange("prediction", inward=False)
        self._step.enqueue()
        device.copy(block.address("state"), block.address("next_state"), block.place("state").size)

    def _exchange(self, name: str, *, inward: bool) -> None:
        """Copy the rows of a tensor into the calls' own buffers, or out of them."""
        whole = self.block.address(name)
        for index in range(len(self._calls)):
            own, size = self.block.address(f"{index}/{name}"), self.block.place(f"{index}/{name}").size
            self._device.copy(*((own, whole) if inward else (whole, own)), size)
            whole += size

    def read_state(self) -> Array:
        """(2, N, C, H/8, W/8) float32 at the next `synchronize`: latent and newest history."""
        return self.block.download("state", 2)


class Decoder(Program):
    """The decoder for N latents of one size."""

    def __init__(
        self, device: Device, nets: Nets, shape: tuple[int, ...], scale: int, scratch: Scratch
    ) -> None:
        net = nets["vae_decoder"]
        pictures, _, height, width = shape
        sizes = {"N": pictures, "H/8": height, "W/8": width}
        sizes |= {"H": height * scale, "W": width * scale}
        layout = Layout()
        layout.add_tensors((*net.spec.inputs, *net.spec.outputs), sizes)
        super().__init__(device, layout, scratch)
        self._bound = self.bind(net, sizes, self.addresses(net.spec))

    def enqueue(self, latent: Array | Canvas) -> tuple[Array, Array]:
        """Image (N, H, W, 3) uint8 and mean (N,), filled at the next `synchronize`."""
        if isinstance(latent, Canvas):
            size = self.block.place("latent").size  # the first N rows of the canvas's own
            self._device.copy(self.block.address("latent"), latent.block.address("latent"), size)
        else:
            self.block.upload("latent", latent)
        self._bound.enqueue()
        return self.block.download("image"), self.block.download("mean")


def _tensors(spec: NetSpec, *names: str) -> list[TensorSpec]:
    return [item for item in (*spec.inputs, *spec.outputs) if item.name in names]
