"""latentrt's own runtime as a side where its loop runs on a device.

    text_encoder   the net, at the loop's shapes and in buffers of its own
    invariants     unet_context for all B rows, and unet_time for all S
    unet           the net as it is enqueued, with its invariants computed where it reads them
    update         the loop's own program around a UNet that does nothing: the net `step` and the copies
    vae_decoder    the net
    picture        the pipeline as a user has it

Everything but `picture` is bound once, and timed by the device's events too (`device_s`).

A row of the loop may be replayed as a captured graph (`runtime/loop/device/cuda_graphs.py`). `picture` does
what the loop does: it is prepared by drawing until the loop has chosen, and tells what it chose (`replayed`).

A net that does not fit raises MemoryLimitError: only `picture` has the loop's ways to do with less.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from ...engines.device import Addresses, Device, Shapes
from ...engines.spec import Array
from ...runtime.loop.denoise import guided_batch
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.device.programs import DenoiseProgram, DenoiseShape, ScheduleProgram, ScheduleShape
from ...runtime.pipeline import Pipeline
from ...runtime.request.request import make_request
from ..case import BETWEEN, Case, inputs_of, sizes_of, time_inputs
from .contract import OURS, OpenSide, Work, makers_of
from .device_work import CountedDevice, DeviceNets, ledger_of, upload

# Pictures until the loop has chosen how to run its rows: cold, timed, captured, and timed again.
_SETTLING = 4


def device_side(pipe: Pipeline, loop: DeviceLoop) -> OpenSide:
    """A pipeline on a device; it is closed with the side, and what was prepared before it."""
    resources = ExitStack()
    resources.callback(pipe.close)
    nets = DeviceNets(device=loop.device, nets=loop.nets)
    counted = CountedDevice(loop.device)
    loop.device = cast(Device, counted)
    return OpenSide(
        name=OURS,
        versions={"backend": pipe.backend, "device": loop.device.name},
        makers=makers_of(_OnDevice(pipe, nets, counted)),
        resources=resources,
        memory=lambda: ledger_of(loop),
    )


class _OnDevice:
    """The workloads, by the names of the contract. What each has prepared has buffers of its own."""

    def __init__(self, pipe: Pipeline, nets: DeviceNets, counted: CountedDevice) -> None:
        self._pipe, self._nets, self._counted = pipe, nets, counted
        self._manifest = pipe.package.manifest
        self._device = nets.device

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_net("text_encoder", "context", case, stack)

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_net("vae_decoder", "image", case, stack)

    def _one_net(self, net: str, output: str, case: Case, stack: ExitStack) -> Work:
        block, (bound,) = self._nets.bind(stack, (net, sizes_of(case, self._manifest)))
        upload(block, inputs_of(self._pipe.package, net, case))
        return self._nets.work(stack, bound.enqueue, lambda: {output: block.download(output)})

    def invariants(self, case: Case, stack: ExitStack) -> Work:
        """Keys and values of all rows, and the time embeddings of every row of the table."""
        sizes = sizes_of(case, self._manifest)
        block, (context, time) = self._nets.bind(stack, ("unet_context", sizes), ("unet_time", sizes))
        inputs = inputs_of(self._pipe.package, "unet", case)
        steps = np.linspace(999, 0, case.steps, dtype=np.float32)
        upload(block, {"context": inputs["context"], **time_inputs(case, self._manifest, inputs, steps)})

        def enqueue() -> None:
            context.enqueue()
            time.enqueue()

        return self._nets.work(stack, enqueue)

    def unet(self, case: Case, stack: ExitStack) -> Work:
        """One call, with what does not change from step to step computed before."""
        sizes = sizes_of(replace(case, steps=1), self._manifest)
        calls = [(name, sizes) for name in ("unet_context", "unet_time", "unet")]
        block, (context, time, unet) = self._nets.bind(stack, *calls)
        inputs = inputs_of(self._pipe.package, "unet", case)
        upload(block, {**inputs, **time_inputs(case, self._manifest, inputs, inputs["timestep"])})
        context.enqueue()
        time.enqueue()
        return self._nets.work(stack, unet.enqueue, lambda: {"prediction": block.download("prediction")})

    def update(self, case: Case, stack: ExitStack) -> Work:
        """`BETWEEN` rows of the loop, all of which begin with the same noise and see the same prediction."""
        job = self._pipe.prepare(
            make_request(self._manifest, case.prompt, **replace(case, steps=BETWEEN).parameters)
        )
        sizes, nets = sizes_of(case, self._manifest), self._nets.nets
        shape = DenoiseShape(
            pictures=case.pictures,
            guided=case.guided,
            height=sizes["H/8"],
            width=sizes["W/8"],
            tokens=sizes["T"],
            rows=case.batch,
        )
        schedule_shape = ScheduleShape.of(job, shape)
        calls = [("step", sizes), ("unet_context", sizes), ("unet_time", schedule_shape.sizes)]
        around = self._device, {**nets, "unet": _does_nothing(nets["unet"])}
        scratch = self._nets.scratch(stack, calls)
        program = stack.enter_context(closing(DenoiseProgram(*around, shape, scratch)))
        schedule = stack.enter_context(closing(ScheduleProgram(*around, schedule_shape, scratch)))
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

        return self._nets.work(stack, enqueue, lambda: {"latent": program.read_state()[0]}, repeats=BETWEEN)

    def picture(self, case: Case, stack: ExitStack) -> Work:
        """The whole pipeline; the loop has the buffers, and keeps them."""
        figures: dict[str, Any] = {}

        def draw() -> dict[str, Array]:
            before = self._counted.launches
            result = self._pipe(case.prompt, **case.parameters)
            figures.update(stages_s=result.seconds, replayed=self._counted.launches > before)
            return {"image": np.asarray(result.images)}

        for _ in range(_SETTLING):
            draw()
        return Work(call=draw, figures=lambda: figures)


def _does_nothing(net: Any) -> Any:
    """A net to be bound like another one, whose runs do nothing."""
    bound = SimpleNamespace(enqueue=lambda: None, close=lambda: None)

    def bind(shapes: Shapes, addresses: Addresses, scratch: int) -> Any:
        del shapes, addresses, scratch
        return bound

    return SimpleNamespace(spec=net.spec, bind=bind)
