"""The parts of a device loop: memory with nets bound to it, reusable for all requests of one shape.

::

    NetProgram        any net that runs outside the rows            once per request, or per tile
    ScheduleProgram   timesteps -> one packed row per table row     once per request
    DenoiseProgram    invariants, latent, state; UNet and step      once per row of the table

A net's shapes and addresses are set when a program is made and never again: TensorRT pays for each change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod

import numpy as np

from ....engines.device import ALIGNMENT, BoundNet, Device, DeviceNet, Shapes
from ....engines.spec import (
    CONTEXT_INVARIANT,
    DTYPES,
    TIME_INVARIANT,
    Array,
    NetSpec,
    TensorSpec,
    output_shapes,
    shape_of,
    tensor_bytes,
)
from ..controls import added_inputs
from ..job import DenoiseJob

Nets = Mapping[str, DeviceNet]
Sizes = Mapping[str, int]  # symbol of the net contract -> number


def aligned(size: int) -> int:
    """`size` in bytes, rounded up to a multiple of the device's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Place:
    """One tensor of a block: `offset` in bytes from the block's start."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return tensor_bytes(self.dtype, self.shape)


class BlockLayout:
    """Places of tensors one after the other, in the order they were added; allocates nothing."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.size = 0

    def add(self, name: str, dtype: str, shape: Sequence[int]) -> Place:
        """Add a tensor at the next free place."""
        assert name not in self.places
        place = Place(offset=self.size, dtype=dtype, shape=tuple(shape))
        self.places[name] = place
        self.size += aligned(place.size)
        return place

    def add_tensors(self, tensors: Iterable[TensorSpec], sizes: Sizes, prefix: str = "") -> None:
        """Add tensors of the contract under `prefix` + their names."""
        for tensor in tensors:
            self.add(prefix + tensor.name, tensor.dtype, shape_of(tensor.shape, sizes))


class Block:
    """Memory on a device for all tensors of a layout. `close` frees it."""

    def __init__(self, device: Device, layout: BlockLayout) -> None:
        self._device = device
        self._places = dict(layout.places)
        self.size = layout.size
        self._start: int | None = device.allocate(max(layout.size, ALIGNMENT))

    @property
    def freed(self) -> bool:
        """Whether it is closed."""
        return self._start is None

    def address(self, name: str) -> int:
        """The device address of a tensor."""
        assert self._start is not None, "the block is freed"
        return self._start + self._places[name].offset

    def place(self, name: str) -> Place:
        """Shape, dtype and size of a tensor."""
        return self._places[name]

    def upload(self, name: str, array: Array) -> None:
        """Fill a tensor from the host, converted to its dtype; what fp16 cannot hold becomes infinity."""
        place = self._places[name]
        assert array.shape == place.shape, (name, array.shape, place.shape)
        with np.errstate(over="ignore"):
            content = np.ascontiguousarray(array, DTYPES[place.dtype])
        self._device.upload(self.address(name), content)

    def download(self, name: str, count: int | None = None) -> Array:
        """Copy a tensor, or its first `count` rows, to a host array that the next `synchronize` fills."""
        place = self._places[name]
        shape = place.shape if count is None else (count, *place.shape[1:])
        array = np.empty(shape, DTYPES[place.dtype])
        self._device.download(self.address(name), array)
        return array

    def close(self) -> None:
        """Free the memory. May be called twice."""
        if self._start is not None:
            start, self._start = self._start, None
            self._device.free(start)


class Scratch:
    """The one block of activations that all nets share: they run one after the other on one stream."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self.size = size
        self.users = 0
        self.address = device.allocate(aligned(size)) if size else 0

    def close(self) -> None:
        """Free the memory, once nobody uses it."""
        assert self.users == 0
        if self.address:
            address, self.address = self.address, 0
            self._device.free(address)


@dataclass(frozen=True, kw_only=True)
class DenoiseShape:
    """What decides a `DenoiseProgram`.

    Attributes:
        pictures: N.
        guided: whether half of a step's rows are unconditional.
        height, width: of the latent.
        tokens: T, the length of the context.
        rows: UNet rows of one call, a divisor of the batch.
        step: the net that ends a row, "step" or "step_masked".
        groups, image_tokens: G and I, of what the UNet attends to besides the text.
    """

    pictures: int
    guided: bool
    height: int
    width: int
    tokens: int
    rows: int
    step: str = "step"
    groups: int = 1
    image_tokens: int = 1

    @property
    def batch(self) -> int:
        """B, the UNet rows of a step: with guidance twice the pictures."""
        return self.pictures * (2 if self.guided else 1)

    def sizes(self, rows: int) -> Sizes:
        """The contract's symbols for a UNet call of `rows` rows."""
        latent = {"H/8": self.height, "W/8": self.width}
        image = {"G": self.groups, "I": self.image_tokens}
        return {"N": self.pictures, "B": rows, **latent, "T": self.tokens, **image}

    def calls(self) -> tuple[int, ...]:
        """Rows of each UNet call of a step, unconditional rows first; all calls are equal."""
        return (self.rows,) * (self.batch // self.rows)


@dataclass(frozen=True, kw_only=True)
class ScheduleShape:
    """What decides a `ScheduleProgram`.

    Attributes:
        steps: rows of the table.
        rows_per_step: rows of `unet_time` of a step: one for all UNet rows, or one for each.
        step: the net that reads the table's rows.
        calls: rows of each UNet call of a step.
        noise: (N, C, H/8, W/8), the shape of a row's noise; None if no row draws any.
    """

    steps: int
    rows_per_step: int
    step: str
    calls: tuple[int, ...]
    noise: tuple[int, ...] | None

    @classmethod
    def of(cls, job: DenoiseJob, shape: DenoiseShape) -> ScheduleShape:
        """The schedule of a job that is denoised in a program of that shape."""
        return cls(
            steps=len(job.table),
            rows_per_step=job.rows_per_step,
            step=shape.step,
            calls=shape.calls(),
            noise=job.first.shape if job.table.draws.any() else None,
        )

    @property
    def sizes(self) -> Sizes:
        """The contract's symbols for `unet_time`."""
        return {"S": self.steps * self.rows_per_step}


def input_shapes(spec: NetSpec, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of every input of a net."""
    return {item.name: shape_of(item.shape, sizes) for item in spec.inputs}


def row_ranges(calls: Sequence[int]) -> list[slice]:
    """Which of a step's UNet rows each call has."""
    return [slice(sum(calls[:index]), sum(calls[: index + 1])) for index in range(len(calls))]


class RowLayout:
    """One row of the packed schedule: the table's row, then the UNet's time invariants of that row.

    An invariant that differs between the UNet's rows has a place for each call, so that every call's part of
    it begins at an aligned address.
    """

    def __init__(self, nets: Nets, step: str, calls: Sequence[int]) -> None:
        self.layout = BlockLayout()
        self.layout.add_tensors(_tensors(nets[step].spec, "row"), {})
        self.invariants = _invariants(nets["unet"].spec, TIME_INVARIANT)
        # place -> the output of `unet_time` that it is filled from, and its first row there
        self.sources: dict[str, tuple[str, int]] = {}
        for index, rows in enumerate(row_ranges(calls)):
            for tensor in self.invariants:
                place = _place_in_row(tensor, index)
                if place not in self.sources:
                    shape = shape_of(tensor.shape, {"B": rows.stop - rows.start})
                    self.layout.add(place, tensor.dtype, shape)
                    self.sources[place] = tensor.name, rows.start

    def offsets(self, index: int) -> dict[str, int]:
        """Bytes from the start of the row to the invariants of the call `index`, by name."""
        return {item.name: self.layout.places[_place_in_row(item, index)].offset for item in self.invariants}


def _place_in_row(tensor: TensorSpec, index: int) -> str:
    return f"{index}/{tensor.name}" if "B" in tensor.shape else tensor.name


class BoundProgram:
    """A block of memory, the scratch block that it shares with others, and the nets bound to both."""

    def __init__(self, device: Device, layout: BlockLayout, scratch: Scratch) -> None:
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
        """Bind a net until the program is closed. A failure frees all that the program holds."""
        try:
            bound = net.bind(shapes, addresses, self.scratch.address)
        except BaseException:
            self.close()
            raise
        self._open.callback(bound.close)
        return bound

    def addresses(self, spec: NetSpec) -> dict[str, int]:
        """Addresses of all inputs and outputs of a net, which the block has under the net's own names."""
        return {item.name: self.block.address(item.name) for item in (*spec.inputs, *spec.outputs)}

    def close(self) -> None:
        """Free everything. May be called twice."""
        self._open.close()


class NetProgram(BoundProgram):
    """One net at given input shapes, with all its tensors."""

    def __init__(self, device: Device, net: DeviceNet, shapes: Shapes, scratch: Scratch) -> None:
        every = {**shapes, **output_shapes(net.spec, shapes)}
        layout = BlockLayout()
        for item in (*net.spec.inputs, *net.spec.outputs):
            layout.add(item.name, item.dtype, every[item.name])
        super().__init__(device, layout, scratch)
        self._outputs = [item.name for item in net.spec.outputs]
        self._bound = self.bind(net, shapes, self.addresses(net.spec))

    def upload(self, arrays: Mapping[str, Array]) -> None:
        """Fill inputs from the host, converted to their dtypes."""
        for name, array in arrays.items():
            self.block.upload(name, array)

    def take_latent(self, denoiser: DenoiseProgram) -> None:
        """Fill the decoder's input with the first N rows of the UNet's."""
        size = self.block.place("latent").size
        self._device.copy(self.block.address("latent"), denoiser.block.address("latent"), size)

    def enqueue(self) -> dict[str, Array]:
        """Run the net once. Returns host arrays that are filled at the next `synchronize`."""
        self._bound.enqueue()
        return {name: self.block.download(name) for name in self._outputs}


class ScheduleProgram(BoundProgram):
    """The table on the device, one packed row for each of its rows, and the noise that it draws."""

    def __init__(self, device: Device, nets: Nets, shape: ScheduleShape, scratch: Scratch) -> None:
        net, sizes = nets["unet_time"], shape.sizes
        self._shape, self._spec = shape, net.spec
        self._row = RowLayout(nets, shape.step, shape.calls)
        layout = BlockLayout()
        layout.add_tensors((*net.spec.inputs, *net.spec.outputs), sizes)
        layout.add("rows", "float32", (shape.steps, *self._row.layout.places["row"].shape))
        layout.add("packed", "uint8", (shape.steps, self._row.layout.size))
        if shape.noise is not None:
            # each row's noise at an aligned place of its own
            layout.add("noises", "uint8", (shape.steps, aligned(4 * prod(shape.noise))))
        super().__init__(device, layout, scratch)
        self.draws = shape.noise is not None
        self._bound = self.bind(net, input_shapes(net.spec, sizes), self.addresses(net.spec))

    def enqueue(self, job: DenoiseJob) -> None:
        """Upload the table, compute the time invariants of all its rows, and pack them row by row.

        Raises UsageError for other vectors than the UNet wants.
        """
        block, inputs = self.block, job.schedule_inputs()
        self._spec.check(inputs)
        for name, array in inputs.items():
            block.upload(name, array)
        rows = job.table.packed_rows(job.guidance_scales, job.guidance_rescale)
        block.upload("rows", rows[:, : block.place("rows").shape[1]])
        if self.draws:
            self._upload_noises(job.noises())
        self._bound.enqueue()
        self._pack("row", block.address("rows"), _pitch(block.place("rows")))
        for place, (output, first) in self._row.sources.items():
            pitch = _pitch(block.place(output))
            if self._shape.rows_per_step > 1:
                self._pack(place, block.address(output) + first * pitch, self._shape.rows_per_step * pitch)
            else:
                self._pack(place, block.address(output), pitch, times=self._row.layout.places[place].shape[0])

    def _upload_noises(self, noises: Array) -> None:
        padded = np.zeros(self.block.place("noises").shape, np.uint8)
        for padded_row, noise in zip(padded, noises, strict=True):
            content = np.frombuffer(np.ascontiguousarray(noise).data, np.uint8)
            padded_row[: content.size] = content
        self.block.upload("noises", padded)

    def _pack(self, name: str, source: int, pitch: int, *, times: int = 1) -> None:
        """Fill one place of every packed row, `times` side by side, from what lies `pitch` bytes apart."""
        row = self._row.layout
        target = row.places[name]
        size = target.size // times
        for index in range(times):
            self._device.copy(
                self.block.address("packed") + target.offset + index * size,
                source,
                size,
                rows=self._shape.steps,
                to_pitch=row.size,
                pitch=pitch,
            )

    def row_address(self, row: int) -> int:
        """Address of a packed row."""
        return self.block.address("packed") + row * self._row.layout.size

    def noise_address(self, row: int) -> int:
        """Address of the noise that a row draws."""
        return self.block.address("noises") + row * _pitch(self.block.place("noises"))


def _pitch(place: Place) -> int:
    """Bytes from one row of a tensor to the next."""
    return place.size // place.shape[0]


class DenoiseProgram(BoundProgram):
    """Latent, state and invariants of one shape, with the UNet and the net `step` bound to them.

    The UNet runs in one call of B rows, or in several smaller ones when memory is short; then each call has
    buffers of its own, because a row need not start at an aligned address.
    """

    def __init__(self, device: Device, nets: Nets, shape: DenoiseShape, scratch: Scratch) -> None:
        self.shape = shape
        self._nets = nets
        unet, step = nets["unet"].spec, nets[shape.step].spec
        self._invariants = _invariants(unet, CONTEXT_INVARIANT)
        self._image = _tensors(unet, "image_latents")  # only an inpainting UNet has it
        self._added = added_inputs(unet)
        self._given: dict[str, Array | None] = {}  # of these, what was uploaded last; None: it was computed
        self._calls = shape.calls()
        self._row = RowLayout(nets, shape.step, self._calls)
        sizes = shape.sizes(shape.batch)
        layout = BlockLayout()
        layout.add_tensors([item for item in (*step.inputs, *step.outputs) if item.name != "row"], sizes)
        layout.add("packed", "uint8", (self._row.layout.size,))
        for index, rows in enumerate(self._calls):
            self._add_call(layout, index, shape.sizes(rows))
        super().__init__(device, layout, scratch)
        row = self.block.address("packed") + self._row.layout.places["row"].offset
        state = {item.name: self.block.address(item.name) for item in _tensors(step, *layout.places)}
        self._step = self.bind(nets[shape.step], input_shapes(step, sizes), {**state, "row": row})
        self._bound = [self._bind_call(index, shape.sizes(rows)) for index, rows in enumerate(self._calls)]

    def _add_call(self, layout: BlockLayout, index: int, sizes: Sizes) -> None:
        context = self._nets["unet_context"].spec.inputs
        layout.add_tensors([*context, *self._invariants, *self._image, *self._added], sizes, f"{index}/")
        if len(self._calls) > 1:
            layout.add_tensors(_tensors(self._nets["unet"].spec, "latent", "prediction"), sizes, f"{index}/")

    def _bind_call(self, index: int, sizes: Sizes) -> tuple[BoundNet, BoundNet]:
        """`unet_context` and `unet`, bound for the call `index` of a step."""
        block, context, unet = self.block, self._nets["unet_context"], self._nets["unet"]
        invariants = {item.name: block.address(f"{index}/{item.name}") for item in self._invariants}
        own_inputs = (*self._image, *self._added)
        image = {item.name: block.address(f"{index}/{item.name}") for item in own_inputs}
        own = "" if len(self._calls) == 1 else f"{index}/"
        ends = {name: block.address(f"{own}{name}") for name in ("latent", "prediction")}
        packed = block.address("packed")
        times = {name: packed + offset for name, offset in self._row.offsets(index).items()}
        reads = {"context": block.address(f"{index}/context"), **invariants}
        before = self.bind(context, input_shapes(context.spec, sizes), reads)
        addresses = {**invariants, **times, **image, **ends}
        return before, self.bind(unet, input_shapes(unet.spec, sizes), addresses)

    @property
    def profile(self) -> str:
        """The profile that the UNet's engine runs with."""
        return self._bound[0][1].profile

    def begin(self, job: DenoiseJob) -> None:
        """Upload what is the same in all rows and the first state, and compute the context's invariants."""
        assert bool(self._image) == (job.image_latents is not None), "the job is another UNet's"
        if job.steering:
            self._given.clear()
        else:
            self._clear_added()
        for index, rows in enumerate(row_ranges(self._calls)):
            self.block.upload(f"{index}/context", job.context[list(job.text_of_row[rows])])
            self._bound[index][0].enqueue()
            if job.image_latents is not None:
                self.block.upload(f"{index}/image_latents", job.image_latents[rows])
        if job.kept is not None:
            kept = {"kept": job.kept.latent, "kept_noise": job.kept.noise, "mask": job.kept.mask}
            for name, array in kept.items():
                self.block.upload(name, array)
        self.rewind(job)

    def give_added(self, name: str, value: Array) -> None:
        """Upload what controls add, (B, …), unless the very same array was uploaded last."""
        if self._given.get(name) is not value:
            for index, rows in enumerate(row_ranges(self._calls)):
                self.block.upload(f"{index}/{name}", value[rows])
            self._given[name] = value

    def copy_added(self, index: int, name: str, address: int) -> None:
        """Copy what a ControlNet adds to the rows of a call from elsewhere on the device."""
        own = f"{index}/{name}"
        self._device.copy(self.block.address(own), address, self.block.place(own).size)
        self._given[name] = None

    def _clear_added(self) -> None:
        """Zeros, which are no control."""
        for name in self._given:
            for index in range(len(self._calls)):
                place = self.block.place(f"{index}/{name}")
                self.block.upload(f"{index}/{name}", np.zeros(place.shape, DTYPES[place.dtype]))
        self._given.clear()

    def rewind(self, job: DenoiseJob) -> None:
        """Bring the state to where the first row begins."""
        # The history is multiplied by zeros at first, and zero times what lay there before might be NaN.
        self.block.upload("state", np.zeros(self.block.place("state").shape, np.float32))
        self.set_latent(job.first)

    def set_latent(self, latent: Array) -> None:
        """Start, or go on, from this latent, (N, C, H/8, W/8) float32."""
        self._device.upload(self.block.address("state"), np.ascontiguousarray(latent, np.float32))
        self.block.upload("latent", np.concatenate([latent] * (self.shape.batch // self.shape.pictures)))

    @property
    def capturable(self) -> bool:
        """Whether the libraries say that a row can be captured."""
        return self._step.capturable and all(unet.capturable for _, unet in self._bound)

    def feed_row(self, schedule: ScheduleProgram, row: int) -> None:
        """Copy in what differs from row to row: the packed row, and the noise."""
        block, device = self.block, self._device
        device.copy(block.address("packed"), schedule.row_address(row), self._row.layout.size)
        if schedule.draws:
            device.copy(block.address("noise"), schedule.noise_address(row), block.place("noise").size)

    def blank_row(self) -> None:
        """Zeros in place of the row that `feed_row` has copied in."""
        self.block.upload("packed", np.zeros(self.block.place("packed").shape, np.uint8))

    def enqueue_row(self) -> None:
        """Run UNet and row update, at the same addresses every time: this is what a CUDA graph captures."""
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
        """(2, N, C, H/8, W/8) float32, latent and newest history; filled at the next `synchronize`."""
        return self.block.download("state", 2)


def _tensors(spec: NetSpec, *names: str) -> list[TensorSpec]:
    return [item for item in (*spec.inputs, *spec.outputs) if item.name in names]


def _invariants(unet: NetSpec, prefix: str) -> list[TensorSpec]:
    return [item for item in unet.inputs if item.name.startswith(prefix)]
