"""latentrt's own runtime as a side where its loop runs on a device.

`picture` is the pipeline as a user has it, and has the loop's ways to do with less memory. Everything else is
bound once to buffers of its own, timed by the device's events too (`device_s`; `host_s` is what the host took
to enqueue it), and raises MemoryLimitError where it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...engines.device import Addresses, BoundNet, Shapes
from ...engines.spec import Array
from ...runtime.loop.denoise import guided_batch
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.device.programs import (
    Block,
    BlockLayout,
    BoundProgram,
    DenoiseProgram,
    DenoiseShape,
    ScheduleProgram,
    ScheduleShape,
    Scratch,
    Sizes,
    input_shapes,
)
from ...runtime.pipeline import Pipeline
from ...runtime.request.request import make_request
from ..case import BETWEEN, Case, inputs_of, row_time_inputs, sizes_of, time_inputs
from .contract import OURS, OpenSide, Work, makers_of
from .drawing import drawing


def device_side(pipe: Pipeline, loop: DeviceLoop, *, replayed: bool = False) -> OpenSide:
    """A pipeline on a device; it is closed with the side, and what was prepared before it.

    `replayed`: everything but pictures, whose loop decides for itself, is captured once and replayed as a
    CUDA graph. What cannot be captured is not prepared then: a BackendError says why.
    """
    resources = ExitStack()
    resources.callback(pipe.close)
    return OpenSide(
        name=OURS,
        versions={"backend": pipe.backend, "device": loop.device.name},
        makers=makers_of(_OnDevice(pipe, loop, replayed)),
        resources=resources,
        memory=lambda: ledger_of(loop),
    )


def ledger_of(loop: DeviceLoop) -> dict[str, Any]:
    """What a loop holds on its device, in bytes, as JSON.

    Returns:
        ledger: of each net, as it says itself: `weights`, `activations` (None where the library has them in
            an arena and does not tell), and `io`. Buffers that two nets share count for both.
        scratch: the block of activations that all nets share.
    """
    nets = {name: asdict(held) for name, held in loop.ledger.items()}
    return {"ledger": nets, "scratch": loop.pool.scratch_size}


class _OnDevice:
    """The workloads, by the names of the contract. What each has prepared has buffers of its own."""

    def __init__(self, pipe: Pipeline, loop: DeviceLoop, replayed: bool) -> None:
        self._pipe, self._nets, self._device = pipe, loop.nets, loop.device
        self._replayed = replayed
        self._manifest = pipe.package.manifest

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_net("text_encoder", "context", case, stack)

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_net("vae_decoder", "image", case, stack)

    def _one_net(self, net: str, output: str, case: Case, stack: ExitStack) -> Work:
        inputs = inputs_of(self._pipe.package, net, case)
        block, (bound,) = self._bind(stack, sizes_of(case, self._manifest), [net], inputs)
        return self._timed(stack, bound.enqueue, lambda: {output: block.download(output)})

    def invariants(self, case: Case, stack: ExitStack) -> Work:
        """Keys and values of all rows, and the time embeddings of every row of the table."""
        inputs = inputs_of(self._pipe.package, "unet", case)
        steps = np.linspace(999, 0, case.steps, dtype=np.float32)
        arrays = {"context": inputs["context"], **time_inputs(case, self._manifest, inputs, steps)}
        nets = ["unet_context", "unet_time"]
        _, (context, time) = self._bind(stack, sizes_of(case, self._manifest), nets, arrays)

        def enqueue() -> None:
            context.enqueue()
            time.enqueue()

        return self._timed(stack, enqueue)

    def unet(self, case: Case, stack: ExitStack) -> Work:
        """One call, with what does not change from step to step computed before."""
        inputs = inputs_of(self._pipe.package, "unet", case)
        arrays = {**inputs, **row_time_inputs(case, self._manifest, inputs)}
        sizes = {**sizes_of(case, self._manifest), "S": len(arrays["timestep"])}
        block, (context, time, unet) = self._bind(stack, sizes, ["unet_context", "unet_time", "unet"], arrays)
        context.enqueue()
        time.enqueue()
        return self._timed(stack, unet.enqueue, lambda: {"prediction": block.download("prediction")})

    def update(self, case: Case, stack: ExitStack) -> Work:
        """`BETWEEN` rows of the loop, all of which begin with the same noise and see the same prediction."""
        case = replace(case, steps=BETWEEN)
        job = self._pipe.prepare(make_request(self._manifest, case.prompt, **case.parameters))
        sizes = sizes_of(case, self._manifest)
        shape = DenoiseShape(
            pictures=case.pictures,
            guided=case.guided,
            height=sizes["H/8"],
            width=sizes["W/8"],
            tokens=sizes["T"],
            rows=case.batch,
        )
        around = self._device, {**self._nets, "unet": _does_nothing(self._nets["unet"])}
        scratch = self._scratch(stack, sizes, ["step", "unet_context", "unet_time"])
        program = stack.enter_context(closing(DenoiseProgram(*around, shape, scratch)))
        of_rows = ScheduleShape.of(job, shape)
        schedule = stack.enter_context(closing(ScheduleProgram(*around, of_rows, scratch)))
        program.begin(job)
        schedule.enqueue(job)
        block, size = program.block, program.block.place("state").size
        block.upload("prediction", guided_batch(job.first / job.table.init, case.guided))
        # What a run leaves is no fit start for the next: it would grow beyond all bounds.
        first = self._device.allocate(size)
        stack.callback(self._device.free, first)
        self._device.copy(first, block.address("state"), size)

        def enqueue() -> None:
            self._device.copy(block.address("state"), first, size)
            for row in range(BETWEEN):
                program.feed_row(schedule, row)
                program.enqueue_row()

        return self._timed(stack, enqueue, lambda: {"latent": program.read_state()[0]}, BETWEEN)

    def picture(self, case: Case, stack: ExitStack) -> Work:
        """The whole pipeline; the loop has the buffers, and keeps them."""
        return drawing(self._pipe, case)

    def _scratch(self, stack: ExitStack, sizes: Sizes, names: list[str]) -> Scratch:
        """Room for the activations of any of these nets. Raises MemoryLimitError."""
        nets = [self._nets[name] for name in names]
        size = max(net.scratch(input_shapes(net.spec, sizes)) for net in nets)
        return stack.enter_context(closing(Scratch(self._device, size)))

    def _bind(
        self, stack: ExitStack, sizes: Sizes, names: list[str], arrays: Mapping[str, Array]
    ) -> tuple[Block, list[BoundNet]]:
        """Nets bound to one block that holds `arrays`; what one writes, the others read by its name.

        Raises MemoryLimitError, BackendError and UsageError as the device and the nets do.
        """
        nets, layout = [self._nets[name] for name in names], BlockLayout()
        for net in nets:
            tensors = (*net.spec.inputs, *net.spec.outputs)
            layout.add_tensors([item for item in tensors if item.name not in layout.places], sizes)
        program = BoundProgram(self._device, layout, self._scratch(stack, sizes, names))
        stack.enter_context(closing(program))
        bound = [
            program.bind(net, input_shapes(net.spec, sizes), program.addresses(net.spec)) for net in nets
        ]
        for name, array in arrays.items():
            program.block.upload(name, array)
        return program.block, bound

    def _timed(
        self,
        stack: ExitStack,
        enqueue: Callable[[], None],
        fetch: Callable[[], Mapping[str, Array]] = dict[str, Array],
        repeats: int = 1,
    ) -> Work:
        """What is enqueued is timed, by the device too, and waited for; `fetch` downloads."""
        device = self._device
        watch = stack.enter_context(closing(device.stopwatch()))
        run, host_s = self._captured(stack, enqueue) if self._replayed else enqueue, 0.0
        device.synchronize()

        def call() -> Mapping[str, Array]:
            nonlocal host_s
            began = perf_counter()
            watch.start()
            run()
            watch.stop()
            host_s = perf_counter() - began
            device.synchronize()
            return {}

        def outputs() -> Mapping[str, Array]:
            found = fetch()
            device.synchronize()
            return found

        return Work(
            call=call,
            fetch=outputs,
            figures=lambda: {"device_s": watch.seconds() / repeats, "host_s": host_s / repeats},
            repeats=repeats,
        )

    def _captured(self, stack: ExitStack, enqueue: Callable[[], None]) -> Callable[[], None]:
        """The same as a graph. Raises BackendError if it cannot be captured."""
        enqueue()  # in a first run libraries allocate and load, which a capture forbids
        self._device.synchronize()
        with self._device.capture() as graphs:
            enqueue()
        stack.callback(graphs[0].close)
        return graphs[0].launch


def _does_nothing(net: Any) -> Any:
    """A net to be bound like another one, whose runs do nothing."""
    bound = SimpleNamespace(enqueue=lambda: None, close=lambda: None)

    def bind(shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
        del shapes, addresses, scratch
        return bound

    return SimpleNamespace(spec=net.spec, bind=bind)
