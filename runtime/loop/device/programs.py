"""The pieces of a device loop: buffers with nets bound to them, each reusable for every request of its shape.

::

    Call      any net that runs outside the rows            once per request, or per tile
    Schedule  timesteps -> one packed line per table row    once per request
    Canvas    invariants, latent, state; UNet and step      once per row of the table

A net's shapes and addresses are set when a program is made and never again: TensorRT pays for each change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod

import numpy as np

from ....engines.device import BoundNet, Device, DeviceNet, Shapes
from ....engines.spec import CONTEXT_INVARIANT, TIME_INVARIANT, Array, NetSpec, TensorSpec, output_shapes
from ..job import Job
from .buffers import Block, Layout, Place, Scratch, Sizes, aligned, shape_of

Nets = Mapping[str, DeviceNet]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What decides a Canvas: N pictures, B rows a step, at most `rows` in one UNet call.

    `height` and `width` are the latent's; `step` is the net that ends a row.
    """

    pictures: int
    guided: bool
    height: int
    width: int
    tokens: int
    rows: int
    step: str = "step"

    @property
    def batch(self) -> int:
        """B, the rows of a step: twice the pictures with guidance."""
        return self.pictures * (2 if self.guided else 1)

    def sizes(self, rows: int) -> Sizes:
        """The contract's symbols, for a call of `rows` rows."""
        return {"N": self.pictures, "B": rows, "H/8": self.height, "W/8": self.width, "T": self.tokens}

    def calls(self) -> tuple[int, ...]:
        """Rows of each UNet call of a step, unconditional rows first."""
        full, rest = divmod(self.batch, self.rows)
        return (self.rows,) * full + ((rest,) if rest else ())


@dataclass(frozen=True, kw_only=True)
class Course:
    """What decides a Schedule.

    Attributes:
        steps: rows of the table.
        rows_per_step: S is that many times the steps.
        step: the net that reads the table's row.
        calls: rows of each UNet call of a step.
        noise: (N, C, H/8, W/8) that every row draws; None if none does.
    """

    steps: int
    rows_per_step: int
    step: str
    calls: tuple[int, ...]
    noise: tuple[int, ...] | None

    @classmethod
    def of(cls, job: Job, frame: Frame) -> Course:
        """Of a job that is drawn on a canvas of that frame."""
        return cls(
            steps=len(job.table),
            rows_per_step=job.rows_per_step,
            step=frame.step,
            # where all UNet rows share the invariants, their number does not matter
            calls=frame.calls() if job.rows_per_step > 1 else (1,),
            noise=job.first.shape if job.table.draws.any() else None,
        )


def input_shapes(spec: NetSpec, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of every input of a net."""
    return {item.name: shape_of(item.shape, sizes) for item in spec.inputs}


def spans(calls: Sequence[int]) -> list[slice]:
    """Which of a step's rows each call has."""
    return [slice(sum(calls[:index]), sum(calls[: index + 1])) for index in range(len(calls))]


class Line:
    """One line of the packed schedule: the step's row, then the UNet's time invariants of that row.

    An invariant that differs between the UNet's rows has a place for each call, so that every call's rows of
    it begin at an aligned address.
    """

    def __init__(self, nets: Nets, step: str, calls: Sequence[int]) -> None:
        self.layout = Layout()
        self.layout.add_tensors(_tensors(nets[step].spec, "row"), {})
        self.invariants = _invariants(nets["unet"].spec, TIME_INVARIANT)
        # Place -> the output of `unet_time` that it is filled from, and its first row there.
        self.sources: dict[str, tuple[str, int]] = {}
        for index, span in enumerate(spans(calls)):
            for tensor in self.invariants:
                place = _line_place(tensor, index)
                if place not in self.sources:
                    shape = shape_of(tensor.shape, {"B": span.stop - span.start})
                    self.layout.add(place, tensor.dtype, shape)
                    self.sources[place] = tensor.name, span.start

    def offsets(self, index: int) -> dict[str, int]:
        """Where in the line the call `index` finds its invariants."""
        return {item.name: self.layout.places[_line_place(item, index)].offset for item in self.invariants}


def _line_place(tensor: TensorSpec, index: int) -> str:
    return f"{index}/{tensor.name}" if "B" in tensor.shape else tensor.name


class Program:
    """What all of them have in common: a block, the scratch it shares, and the nets bound to them."""

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

    def bind(self, net: DeviceNet, shapes: Shapes, addresses: Mapping[str, int]) -> BoundNet:
        """Bind a net for good; a failure frees what this program holds."""
        try:
            bound = net.bind(shapes, addresses, self.scratch.address)
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


class Call(Program):
    """One net at given input shapes, with all its tensors."""

    def __init__(self, device: Device, net: DeviceNet, shapes: Shapes, scratch: Scratch) -> None:
        every = {**shapes, **output_shapes(net.spec, shapes)}
        layout = Layout()
        for item in (*net.spec.inputs, *net.spec.outputs):
            layout.add(item.name, item.dtype, every[item.name])
        super().__init__(device, layout, scratch)
        self._outputs = [item.name for item in net.spec.outputs]
        self._bound = self.bind(net, shapes, self.addresses(net.spec))

    def upload(self, arrays: Mapping[str, Array]) -> None:
        """Fill inputs from the host, converted to their dtypes."""
        for name, array in arrays.items():
            self.block.upload(name, array)

    def take_latent(self, canvas: Canvas) -> None:
        """Fill the decoder's input: the first N rows of what the canvas has for the UNet."""
        size = self.block.place("latent").size
        self._device.copy(self.block.address("latent"), canvas.block.address("latent"), size)

    def enqueue(self) -> dict[str, Array]:
        """Run it once; the outputs, filled at the next `synchronize`."""
        self._bound.enqueue()
        return {name: self.block.download(name) for name in self._outputs}


class Schedule(Program):
    """The table on the device, one packed line for each of its rows, and the noise it draws."""

    def __init__(self, device: Device, nets: Nets, course: Course, scratch: Scratch) -> None:
        net = nets["unet_time"]
        sizes = {"S": course.steps * course.rows_per_step}
        self._course, self._spec = course, net.spec
        self._line = Line(nets, course.step, course.calls)
        layout = Layout()
        layout.add_tensors((*net.spec.inputs, *net.spec.outputs), sizes)
        layout.add("rows", "float32", (course.steps, *self._line.layout.places["row"].shape))
        layout.add("packed", "uint8", (course.steps, self._line.layout.size))
        if course.noise is not None:
            # each row's noise at an aligned place of its own
            layout.add("noises", "uint8", (course.steps, aligned(4 * prod(course.noise))))
        super().__init__(device, layout, scratch)
        self.draws = course.noise is not None
        self._bound = self.bind(net, input_shapes(net.spec, sizes), self.addresses(net.spec))

    def enqueue(self, job: Job) -> None:
        """Upload the table, compute the time invariants of all its rows, and pack one line per row.

        Raises UsageError for other vectors than the UNet wants.
        """
        block, inputs = self.block, job.schedule_inputs()
        self._spec.check(inputs)
        for name, array in inputs.items():
            block.upload(name, array)
        rows = job.table.packed_rows(job.guidance_scale, job.guidance_rescale)
        block.upload("rows", rows[:, : block.place("rows").shape[1]])
        if self.draws:
            self._upload_noises(job.noises())
        self._bound.enqueue()
        self._pack("row", block.address("rows"), _pitch(block.place("rows")))
        for place, (output, first) in self._line.sources.items():
            pitch = _pitch(block.place(output))
            self._pack(place, block.address(output) + first * pitch, self._course.rows_per_step * pitch)

    def _upload_noises(self, noises: Array) -> None:
        padded = np.zeros(self.block.place("noises").shape, np.uint8)
        for line, drawn in zip(padded, noises, strict=True):
            content = np.frombuffer(np.ascontiguousarray(drawn).data, np.uint8)
            line[: content.size] = content
        self.block.upload("noises", padded)

    def _pack(self, name: str, source: int, pitch: int) -> None:
        """Fill a place of every line from what lies `pitch` bytes apart."""
        line = self._line.layout
        target = line.places[name]
        self._device.copy(
            self.block.address("packed") + target.offset,
            source,
            target.size,
            rows=self._course.steps,
            to_pitch=line.size,
            pitch=pitch,
        )

    def line_address(self, row: int) -> int:
        """Of the packed line of a row."""
        return self.block.address("packed") + row * self._line.layout.size

    def noise_address(self, row: int) -> int:
        """Of the noise that a row draws."""
        return self.block.address("noises") + row * _pitch(self.block.place("noises"))


def _pitch(place: Place) -> int:
    """Bytes from one row of a tensor to the next."""
    return place.size // place.shape[0]


class Canvas(Program):
    """Latent, state and invariants of one frame, with the UNet and the step bound to them.

    The UNet runs in one call of B rows, or in several smaller ones when memory is short; then each call has
    buffers of its own, because a row need not start at an aligned address.
    """

    def __init__(self, device: Device, nets: Nets, frame: Frame, scratch: Scratch) -> None:
        self.frame = frame
        self._nets = nets
        unet, step = nets["unet"].spec, nets[frame.step].spec
        self._invariants = _invariants(unet, CONTEXT_INVARIANT)
        self._image = _tensors(unet, "image_latents")  # of an inpainting UNet
        self._calls = frame.calls()
        self._line = Line(nets, frame.step, self._calls)
        sizes = frame.sizes(frame.batch)
        layout = Layout()
        layout.add_tensors([item for item in (*step.inputs, *step.outputs) if item.name != "row"], sizes)
        layout.add("line", "uint8", (self._line.layout.size,))
        for index, rows in enumerate(self._calls):
            self._add_call(layout, index, frame.sizes(rows))
        super().__init__(device, layout, scratch)
        row = self.block.address("line") + self._line.layout.places["row"].offset
        state = {item.name: self.block.address(item.name) for item in _tensors(step, *layout.places)}
        self._step = self.bind(nets[frame.step], input_shapes(step, sizes), {**state, "row": row})
        self._bound = [self._bind_call(index, frame.sizes(rows)) for index, rows in enumerate(self._calls)]

    def _add_call(self, layout: Layout, index: int, sizes: Sizes) -> None:
        context = self._nets["unet_context"].spec.inputs
        layout.add_tensors([*context, *self._invariants, *self._image], sizes, f"{index}/")
        if len(self._calls) > 1:
            layout.add_tensors(_tensors(self._nets["unet"].spec, "latent", "prediction"), sizes, f"{index}/")

    def _bind_call(self, index: int, sizes: Sizes) -> tuple[BoundNet, BoundNet]:
        """The UNet's call `index`, and what computes its invariants."""
        block, context, unet = self.block, self._nets["unet_context"], self._nets["unet"]
        invariants = {item.name: block.address(f"{index}/{item.name}") for item in self._invariants}
        image = {item.name: block.address(f"{index}/{item.name}") for item in self._image}
        own = "" if len(self._calls) == 1 else f"{index}/"
        ends = {name: block.address(f"{own}{name}") for name in ("latent", "prediction")}
        line = block.address("line")
        times = {name: line + offset for name, offset in self._line.offsets(index).items()}
        reads = {"context": block.address(f"{index}/context"), **invariants}
        before = self.bind(context, input_shapes(context.spec, sizes), reads)
        addresses = {**invariants, **times, **image, **ends}
        return before, self.bind(unet, input_shapes(unet.spec, sizes), addresses)

    @property
    def profile(self) -> str:
        """What the UNet's engine was optimised for."""
        return self._bound[0][1].profile

    def begin(self, job: Job) -> None:
        """Upload what stays for all rows, compute the invariants, and stand at the job's first state."""
        assert bool(self._image) == (job.image_latents is not None), "the job is another UNet's"
        for index, span in enumerate(spans(self._calls)):
            self.block.upload(f"{index}/context", job.context[list(job.text_of_row[span])])
            self._bound[index][0].enqueue()
            if job.image_latents is not None:
                self.block.upload(f"{index}/image_latents", job.image_latents[span])
        if job.kept is not None:
            kept = {"kept": job.kept.latent, "kept_noise": job.kept.noise, "mask": job.kept.mask}
            for name, array in kept.items():
                self.block.upload(name, array)
        # A number times whatever lay in the history before might be NaN.
        self.block.upload("state", np.zeros(self.block.place("state").shape, np.float32))
        self.set_latent(job.first)

    def set_latent(self, latent: Array) -> None:
        """(N, C, H/8, W/8) float32: start, or go on, from here."""
        frame = self.frame
        self._device.upload(self.block.address("state"), np.ascontiguousarray(latent, np.float32))
        self.block.upload("latent", np.concatenate([latent] * (frame.batch // frame.pictures)))

    @property
    def capturable(self) -> bool:
        """Whether the libraries say that a row can be captured."""
        return self._step.capturable and all(unet.capturable for _, unet in self._bound)

    def feed_row(self, schedule: Schedule, row: int) -> None:
        """Copy in what differs from row to row: the line, and the noise."""
        block, device = self.block, self._device
        device.copy(block.address("line"), schedule.line_address(row), self._line.layout.size)
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


def _tensors(spec: NetSpec, *names: str) -> list[TensorSpec]:
    return [item for item in (*spec.inputs, *spec.outputs) if item.name in names]


def _invariants(unet: NetSpec, prefix: str) -> list[TensorSpec]:
    return [item for item in unet.inputs if item.name.startswith(prefix)]
