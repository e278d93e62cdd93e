"""latentrt's own runtime as a side where its loop runs on a device: bound once, timed by the device's events.

    text_encoder   the net, at the loop's shapes and in buffers of its own
    invariants     unet_context for all B rows, and unet_time for all S
    unet           the net, with its invariants computed where it reads them
    update         the loop's own canvas around a UNet that does nothing: the net `step` and the copies
    vae_decoder    the net
    picture        the pipeline as a user has it

A row of the loop may be replayed as a captured graph (`runtime/loop/device/cuda_graphs.py`). `picture` does
what the loop does: it is prepared by drawing until the loop has chosen, and tells what it chose (`replayed`).
`unet` is timed as it is enqueued, also by the host's clock, and tells what the device takes for a captured
run (`captured_device_s`): where the two differ, it is the host that cannot enqueue as fast.

A net that does not fit raises MemoryLimitError: only `picture` has the loop's ways to do with less.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, cast

import numpy as np

from ...engines.device import Addresses, BoundNet, Device, DeviceNet, Shapes
from ...engines.errors import BackendError
from ...engines.spec import Array, NetSpec
from ...runtime.loop.denoise import guided_batch
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.device.programs import (
    DenoiseProgram,
    DenoiseShape,
    ScheduleProgram,
    ScheduleShape,
    Sizes,
)
from ...runtime.loop.job import DenoiseJob
from ...runtime.pipeline import Pipeline
from ...runtime.request.request import make_request
from ..case import BETWEEN, Case, inputs_of, sizes_of, time_inputs
from .contract import OURS, OpenSide, Work, makers_of, staged
from .device_work import DeviceNets, TimedDevice, ledger_of, upload

# Pictures until the loop has chosen how to run its rows: cold, timed, captured, and timed again.
_SETTLING = 4
_LAUNCHES = 9  # of a captured run; the first is not counted


def device_side(pipe: Pipeline, loop: DeviceLoop, slow_down: float = 0.0) -> OpenSide:
    """A pipeline on a device; it is closed with the side, and what was prepared before it."""
    resources = ExitStack()
    resources.callback(pipe.close)
    nets = DeviceNets(device=loop.device, nets=loop.nets)
    timer = TimedDevice(loop.device)
    resources.callback(timer.stop_timing)
    loop.device = cast(Device, timer)
    ours = _OnDevice(pipe, nets, timer)
    return OpenSide(
        name=OURS,
        versions={"backend": pipe.backend, "device": loop.device.name},
        makers=makers_of(ours),
        resources=resources,
        memory=lambda: ledger_of(loop),
        slow_down=slow_down,
    )


class _NoNet:
    """A net that does nothing when it is enqueued, bound as if it did."""

    profile = "none"
    capturable = False

    def __init__(self, net: DeviceNet) -> None:
        self.spec: NetSpec = net.spec

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> _NoNet:
        del shapes, addresses, scratch
        return self

    def enqueue(self) -> None:
        pass

    def close(self) -> None:
        pass


class _OnDevice:
    """The workloads, by the names of the contract. What each has prepared has buffers of its own."""

    def __init__(self, pipe: Pipeline, nets: DeviceNets, timer: TimedDevice) -> None:
        self._pipe, self._nets, self._timer = pipe, nets, timer
        self._manifest = pipe.package.manifest
        self._device = nets.device

    def _one_call(self, net: str, output: str, case: Case, stack: ExitStack) -> Work:
        inputs = inputs_of(self._pipe.package, net, case)
        return self._nets.one_call(stack, net, sizes_of(case, self._manifest), inputs, output)

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_call("text_encoder", "context", case, stack)

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_call("vae_decoder", "image", case, stack)

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
        return self._nets.work(
            stack,
            unet.enqueue,
            lambda: {"prediction": block.download("prediction")},
            figures=self._captured(unet),
        )

    def _captured(self, bound: BoundNet) -> dict[str, Any]:
        """Seconds that the device takes for a run as a captured graph, or why it cannot be captured."""
        if not bound.capturable:
            return {"not_captured": "the library says that its runs cannot be"}
        device = self._device
        bound.enqueue()  # libraries allocate in the first run, which a capture may not
        device.synchronize()
        try:
            with device.capture() as graphs:
                bound.enqueue()
        except BackendError as error:
            return {"not_captured": error.found}
        seconds: list[float] = []
        (graph,) = graphs
        with closing(graph), closing(device.stopwatch()) as watch:
            for _ in range(_LAUNCHES):
                watch.start()
                graph.launch()
                watch.stop()
                device.synchronize()
                seconds.append(watch.seconds())
        return {"captured_device_s": median(seconds[1:])}

    def update(self, case: Case, stack: ExitStack) -> Work:
        """`BETWEEN` rows of the loop, all of which begin with the same noise and see the same prediction."""
        case = replace(case, steps=BETWEEN)
        job = self._pipe.prepare(make_request(self._manifest, case.prompt, **case.parameters))
        canvas, schedule = self._canvas(stack, job, sizes_of(case, self._manifest))
        canvas.begin(job)
        schedule.enqueue(job)
        canvas.block.upload("prediction", guided_batch(job.first / job.table.init, case.guided))
        # What a run leaves is no fit start for the next: it would grow beyond all bounds.
        place, state = canvas.block.place("state"), canvas.block.address("state")
        first = self._device.allocate(place.size)
        stack.callback(self._device.free, first)
        self._device.copy(first, state, place.size)

        def enqueue() -> None:
            for row in range(BETWEEN):
                canvas.feed_row(schedule, row)
                canvas.enqueue_row()

        return self._nets.work(
            stack,
            enqueue,
            lambda: {"latent": canvas.read_state()[0]},
            before=partial(self._device.copy, state, first, place.size),
            repeats=BETWEEN,
        )

    def _canvas(
        self, stack: ExitStack, job: DenoiseJob, sizes: Sizes
    ) -> tuple[DenoiseProgram, ScheduleProgram]:
        """The loop's own, with a UNet that does nothing."""
        frame = DenoiseShape(
            pictures=job.pictures,
            guided=job.guided,
            height=sizes["H/8"],
            width=sizes["W/8"],
            tokens=sizes["T"],
            rows=sizes["B"],
        )
        nets = {**self._nets.nets, "unet": cast(DeviceNet, _NoNet(self._nets.nets["unet"]))}
        scratch = self._nets.scratch(stack, [(name, sizes) for name in ("step", "unet_context", "unet_time")])
        canvas = stack.enter_context(closing(DenoiseProgram(self._device, nets, frame, scratch)))
        schedule = ScheduleProgram(self._device, nets, ScheduleShape.of(job, frame), scratch)
        return canvas, stack.enter_context(closing(schedule))

    def picture(self, case: Case, stack: ExitStack) -> Work:
        """The whole pipeline; the loop has the buffers, and keeps them."""

        def draw() -> tuple[Array, Mapping[str, float]]:
            self._timer.restart()
            result = self._pipe(case.prompt, **case.parameters)
            return np.asarray(result.images), result.seconds

        for _ in range(_SETTLING):
            draw()
        return staged(draw, lambda: self._timer.figures)
