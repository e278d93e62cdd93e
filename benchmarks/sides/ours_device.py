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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, cast

import numpy as np

from ...engines.device import Addresses, BoundNet, Device, DeviceNet, Shapes, Stopwatch
from ...engines.errors import BackendError
from ...engines.ledger import take_ledger
from ...engines.spec import Array, NetSpec
from ...runtime.loop import guidance
from ...runtime.loop.device.buffers import Block, Layout, Scratch, Sizes
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.device.programs import Canvas, Course, Frame, Program, Schedule, input_shapes
from ...runtime.loop.job import Job
from ...runtime.pipeline import Pipeline
from ...runtime.request.request import make_request
from ..case import Case, sizes_of, time_inputs
from .contract import OURS, Prepared, not_available
from .ours import BETWEEN, Work, inputs_of
from .picture_timer import PictureTimer

# Pictures until the loop has chosen how to run its rows: cold, timed, captured, and timed again.
_SETTLING = 4
_LAUNCHES = 9  # of a captured run; the first is not counted

Calls = Sequence[tuple[str, Sizes]]  # nets, and the sizes they are called with


@dataclass(kw_only=True)
class DeviceWork(Work):
    """A `Prepared` that holds buffers, and downloads outputs when it is asked for them."""

    download: Callable[[], Mapping[str, Array]]
    held: ExitStack = field(default_factory=ExitStack)

    def outputs(self) -> Mapping[str, Array]:
        """Of the last run."""
        return self.download()

    def close(self) -> None:
        """Free its buffers. May be called twice."""
        self.held.close()


class _NoNet:
    """A net that does nothing when it is enqueued, bound as if it did."""

    def __init__(self, net: DeviceNet) -> None:
        self.spec: NetSpec = net.spec

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> _NoRun:
        del shapes, addresses, scratch
        return _NoRun()


class _NoRun:
    profile = "none"
    capturable = False

    def enqueue(self) -> None:
        pass

    def close(self) -> None:
        pass


class DeviceSide:
    """On a device. Everything prepared has buffers of its own, until it is closed or the side is.

    A net that does not fit raises MemoryLimitError: only `picture` has the loop's ways to do with less.
    """

    def __init__(self, pipe: Pipeline, loop: DeviceLoop, slow_down: float = 0.0) -> None:
        self._pipe, self._loop, self._slow_down = pipe, loop, slow_down
        self._manifest = pipe.package.manifest
        self._device = loop.device
        self._open = ExitStack()
        self._open.callback(pipe.close)
        self._timer = PictureTimer(loop.device)
        self._open.callback(self._timer.stop_timing)
        loop.device = cast(Device, self._timer)

    @property
    def versions(self) -> Mapping[str, str]:
        """What executes the nets, and on what."""
        return {"backend": self._pipe.backend, "device": self._device.name}

    def memory(self) -> Mapping[str, Any]:
        """`engines.ledger.Ledger` as JSON, its nets under `ledger` by name."""
        told: Callable[[], int | None] | None = getattr(self._device, "process_memory", None)
        found = take_ledger(
            self._device.name,
            self._loop.nets,
            self._device.memory(),
            process=told() if told else None,
            scratch=self._loop.pool.scratch_size,
        ).to_json()
        return {"ledger": {row.pop("name"): row for row in found.pop("nets")}, **found}

    def close(self) -> None:
        """Free what was prepared, then nets and device, whatever fails on the way. May be called twice."""
        self._open.close()

    def prepare(self, workload: str, case: Case) -> Prepared:
        """Raises NotAvailableError, MemoryLimitError, or UsageError if no engine covers the shapes."""
        makers: Mapping[str, Callable[[Case, ExitStack], DeviceWork]] = {
            "text_encoder": self._text_encoder,
            "invariants": self._invariants,
            "unet": self._unet,
            "update": self._update,
            "vae_decoder": self._vae_decoder,
            "picture": self._picture,
        }
        if workload not in makers:
            raise not_available(OURS, workload)
        with ExitStack() as stack:
            work = makers[workload](case, stack)
            self._device.synchronize()
            work.held = stack.pop_all()
        self._open.callback(work.close)
        return work

    # ── what they have in common ───────────────────────────────────────────────────────────────

    def _scratch(self, stack: ExitStack, calls: Calls) -> Scratch:
        """Room for the activations of any of them."""
        nets = self._loop.nets
        needed = [nets[name].scratch(input_shapes(nets[name].spec, sizes)) for name, sizes in calls]
        scratch = Scratch(self._device, max(needed))
        stack.callback(scratch.close)
        return scratch

    def _bind(self, stack: ExitStack, *calls: tuple[str, Sizes]) -> tuple[Block, list[BoundNet]]:
        """Nets bound to one block; what one writes under a name, the others read there."""
        layout = Layout()
        for name, sizes in calls:
            spec = self._loop.nets[name].spec
            new = [item for item in (*spec.inputs, *spec.outputs) if item.name not in layout.places]
            layout.add_tensors(new, sizes)
        program = Program(self._device, layout, self._scratch(stack, calls))
        stack.callback(program.close)
        nets = [(self._loop.nets[name], sizes) for name, sizes in calls]
        bound = [
            program.bind(net, input_shapes(net.spec, sizes), program.addresses(net.spec))
            for net, sizes in nets
        ]
        return program.block, bound

    def _work(
        self,
        stack: ExitStack,
        enqueue: Callable[[], None],
        download: Callable[[], Mapping[str, Array]],
        *,
        before: Callable[[], None] = lambda: None,
        repeats: int = 1,
        figures: Mapping[str, Any] | None = None,
    ) -> DeviceWork:
        """What is enqueued after `before` is timed, and waited for."""
        watch, device = self._stopwatch(stack), self._device

        def call() -> Mapping[str, Array]:
            before()
            watch.start()
            enqueue()
            watch.stop()
            device.synchronize()
            return {}

        def outputs() -> Mapping[str, Array]:
            found = download()
            device.synchronize()
            return found

        return DeviceWork(
            call=call,
            told=lambda: {"device_s": watch.seconds() / repeats, **(figures or {})},
            repeats=repeats,
            slow_down=self._slow_down,
            download=outputs,
        )

    def _stopwatch(self, stack: ExitStack) -> Stopwatch:
        watch = self._device.stopwatch()
        stack.callback(watch.close)
        return watch

    # ── the workloads ──────────────────────────────────────────────────────────────────────────

    def _text_encoder(self, case: Case, stack: ExitStack) -> DeviceWork:
        block, (bound,) = self._bind(stack, ("text_encoder", sizes_of(case, self._manifest)))
        _upload(block, inputs_of(self._pipe, "text_encoder", case))
        return self._work(stack, bound.enqueue, lambda: {"context": block.download("context")})

    def _vae_decoder(self, case: Case, stack: ExitStack) -> DeviceWork:
        block, (bound,) = self._bind(stack, ("vae_decoder", sizes_of(case, self._manifest)))
        _upload(block, inputs_of(self._pipe, "vae_decoder", case))
        return self._work(stack, bound.enqueue, lambda: {"image": block.download("image")})

    def _invariants(self, case: Case, stack: ExitStack) -> DeviceWork:
        """Keys and values of all rows, and the time embeddings of every row of the table."""
        sizes = sizes_of(case, self._manifest)
        block, (context, time) = self._bind(stack, ("unet_context", sizes), ("unet_time", sizes))
        inputs = inputs_of(self._pipe, "unet", case)
        block.upload("context", inputs["context"])
        steps = np.linspace(999, 0, case.steps, dtype=np.float32)
        _upload(block, time_inputs(case, self._manifest, inputs, steps))

        def enqueue() -> None:
            context.enqueue()
            time.enqueue()

        return self._work(stack, enqueue, dict[str, Array])

    def _unet(self, case: Case, stack: ExitStack) -> DeviceWork:
        """One call, with what does not change from step to step computed before."""
        sizes = sizes_of(replace(case, steps=1), self._manifest)
        calls = [(name, sizes) for name in ("unet_context", "unet_time", "unet")]
        block, (context, time, unet) = self._bind(stack, *calls)
        inputs = inputs_of(self._pipe, "unet", case)
        _upload(block, {**inputs, **time_inputs(case, self._manifest, inputs, inputs["timestep"])})
        context.enqueue()
        time.enqueue()
        figures = self._captured(unet)
        return self._work(
            stack, unet.enqueue, lambda: {"prediction": block.download("prediction")}, figures=figures
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
        with ExitStack() as stack:
            (graph,) = graphs
            stack.callback(graph.close)
            watch = self._stopwatch(stack)
            for _ in range(_LAUNCHES):
                watch.start()
                graph.launch()
                watch.stop()
                device.synchronize()
                seconds.append(watch.seconds())
        return {"captured_device_s": median(seconds[1:])}

    def _update(self, case: Case, stack: ExitStack) -> DeviceWork:
        """`BETWEEN` rows of the loop, all of which begin with the same noise and see the same prediction."""
        job = self._job(case)
        canvas, schedule = self._canvas(stack, job, sizes_of(replace(case, steps=BETWEEN), self._manifest))
        canvas.begin(job)
        schedule.enqueue(job)
        canvas.block.upload("prediction", guidance.batch(job.first / job.table.init, case.guided))
        # What a run leaves is no fit start for the next: it would grow beyond all bounds.
        place, state = canvas.block.place("state"), canvas.block.address("state")
        layout = Layout()
        layout.add("state", place.dtype, place.shape)
        first = Block(self._device, layout)
        stack.callback(first.close)
        self._device.copy(first.address("state"), state, place.size)

        def enqueue() -> None:
            for row in range(BETWEEN):
                canvas.feed_row(schedule, row)
                canvas.enqueue_row()

        return self._work(
            stack,
            enqueue,
            lambda: {"latent": canvas.read_state()[0]},
            before=partial(self._device.copy, state, first.address("state"), place.size),
            repeats=BETWEEN,
        )

    def _job(self, case: Case) -> Job:
        """The case's picture in `BETWEEN` steps."""
        parameters = replace(case, steps=BETWEEN).parameters
        request = make_request(self._manifest, case.prompt, **parameters)
        return self._pipe.prepare(request)

    def _canvas(self, stack: ExitStack, job: Job, sizes: Sizes) -> tuple[Canvas, Schedule]:
        """The loop's own, with a UNet that does nothing."""
        frame = Frame(
            pictures=job.pictures,
            guided=job.guided,
            height=sizes["H/8"],
            width=sizes["W/8"],
            tokens=sizes["T"],
            rows=sizes["B"],
        )
        nets = {**self._loop.nets, "unet": cast(DeviceNet, _NoNet(self._loop.nets["unet"]))}
        scratch = self._scratch(stack, [(name, sizes) for name in ("step", "unet_context", "unet_time")])
        canvas = Canvas(self._device, nets, frame, scratch)
        stack.callback(canvas.close)
        schedule = Schedule(self._device, nets, Course.of(job, frame), scratch)
        stack.callback(schedule.close)
        return canvas, schedule

    def _picture(self, case: Case, stack: ExitStack) -> DeviceWork:
        images: dict[str, Array] = {}
        stages: dict[str, float] = {}

        def call() -> Mapping[str, Array]:
            self._timer.restart()
            result = self._pipe(case.prompt, **case.parameters)
            images["image"] = np.asarray(result.images)
            stages.clear()
            stages.update(result.seconds)
            return {}

        del stack  # the loop has the buffers, and keeps them
        for _ in range(_SETTLING):
            call()
        return DeviceWork(
            call=call,
            told=lambda: {"stages_s": dict(stages), **self._timer.figures},
            slow_down=self._slow_down,
            download=lambda: images,
        )


def _upload(block: Block, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        block.upload(name, array)
