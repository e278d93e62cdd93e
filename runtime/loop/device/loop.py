"""The loop on a device: uploaded once, enqueued to the end, waited for once.

Latent, invariants, table and noise stay on the device; guidance and the row update are the net `step`, or
`step_masked` where a picture is kept outside a mask. A row that ran before can be replayed as a captured
graph (`replay.py`); memory that runs out is the ladder's business (`ladder.py`). What a request needs before
its rows, such as its prompts' contexts, is a `call` each, with a synchronisation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from threading import Event, RLock
from time import perf_counter
from typing import TypeVar

import numpy as np

from ....engines.backend import MemoryLedger
from ....engines.device import Device, Shapes
from ....engines.errors import NumericError
from ....engines.package import Manifest
from ....engines.spec import Array
from ...pictures.tiling import Tiling, decode_tiled
from ...sampling.table import Table
from ..clock import Clock
from ..denoise import State
from ..job import Drawn, Job, check_cancelled
from .cuda_graphs import Graphs, Replay
from .memory_fallback import Need, Plan, climb
from .pool import Pool, Take
from .programs import Call, Canvas, Course, Frame, Nets, Program, Schedule, input_shapes

Result = TypeVar("Result")

# So many requests of a size begin where the ladder ended; then one begins at the top again.
_REMEMBERED = 32


@dataclass(frozen=True, kw_only=True)
class _Remembered:
    """A plan that fitted when all at once did not."""

    plan: Plan
    requests_left: int


class DeviceLoop:
    """Implements `job.Loop` over the seam `engines/device.py`. Threads may share it: they take turns.

    Args:
        device: is closed with the loop, and so are `nets`.
        nets: of the package, by name.
        manifest: the package's.
        graphs: whether to replay rows as captured graphs: "on", "off", or "auto", where that is faster.
        log: is told of every rung of the ladder, and why a row is not captured.
    """

    def __init__(
        self,
        device: Device,
        nets: Nets,
        manifest: Manifest,
        *,
        graphs: Graphs = "auto",
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.device = device
        self.nets = nets
        self.pool = Pool(device, nets, self._forget)
        self._manifest = manifest
        self._scale = manifest.latent_scale
        self._graphs: Graphs = graphs
        self._log = log
        self._lock = RLock()
        self._plans: dict[Need, _Remembered] = {}
        self._replays: dict[Program, Replay] = {}
        self._closed = False

    # ── job.Loop ───────────────────────────────────────────────────────────────────────────────

    def call(self, net: str, **arrays: Array) -> dict[str, Array]:
        """Run a net once at the shapes of the arrays, and wait for it.

        Raises PackageError if the package has none, UsageError, MemoryLimitError, BackendError.
        """
        self._manifest.net(net)
        self.nets[net].spec.check(arrays)
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        need = Need(call=f"{net} of {shapes}")
        with self._lock:
            return self._climb(need, lambda plan: self._call(net, arrays))

    def steps(self, job: Job, clock: Clock, cancel: Event | None) -> Iterator[State]:
        """One item per row of the table, waited for. Raises CancelledError, NumericError."""
        with self._lock, clock.stage("prepare"):
            need = _need(job, self._scale)
            canvas, schedule, _ = self._climb(need, lambda plan: self._begun(job, plan, decoder=False))
        total = len(job.table)
        try:
            with self._lock:
                replay = self._begin_rows(canvas)
            given = job.first
            for row in range(total):
                check_cancelled(cancel, row, total)
                with self._lock, clock.stage("unet"):
                    canvas.feed_row(schedule, row)
                    replay.enqueue(canvas.enqueue_row)
                    latent, remembered = canvas.read_state()
                    self.device.synchronize()
                _check_finite(latent, f"after step {row + 1} of {total}")
                prediction = _prediction(job.table, row, given, remembered)
                state = State(
                    index=row, unet_input=given, prediction=prediction, latent=latent, profile=canvas.profile
                )
                yield state
                if state.latent is not latent:
                    with self._lock:
                        canvas.set_latent(state.latent)
                given = state.latent
        finally:
            with self._lock:
                self.pool.give_back(canvas, schedule)

    def draw(self, job: Job, clock: Clock, *, decode: bool) -> Drawn:
        """All of it, with one synchronisation (more if the decoder is tiled).

        Raises NumericError, MemoryLimitError, BackendError.
        """
        need = _need(job, self._scale)
        with self._lock:
            drawn = self._climb(need, lambda plan: self._draw(job, plan, clock, decode=decode))
            _check_finite(drawn.latent, "after the last step")
            if decode and drawn.image is None:
                with clock.stage("vae_decoder"):
                    image, mean = self._decode(drawn.latent, job.tile, self.plan(job))
                drawn = replace(drawn, image=image, mean=mean)
            self._settle()
            return drawn

    def decode(self, latent: Array, *, tile: int | None = None) -> tuple[Array, Array]:
        """(N, C, H/8, W/8) float32 -> (N, H, W, 3) uint8 and (N,) float32, the mean before clamping."""
        with self._lock:
            decoded = self._decode(latent, tile)
            self._settle()
            return decoded

    def close(self) -> None:
        """Free everything, nets and device too, whatever fails on the way. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with ExitStack() as everything:
                everything.callback(self.device.close)
                for net in self.nets.values():
                    everything.callback(net.close)
                everything.callback(self.pool.close)
                everything.callback(self.free_idle)

    # ── the ladder ─────────────────────────────────────────────────────────────────────────────

    def free_idle(self) -> bool:
        """Free what no request uses now; whether there was anything."""
        freed = self.pool.free_idle()
        if not self.pool.in_use:  # a graph that is still alive may hold what a library would release
            for net in self.nets.values():
                net.release()
        return freed

    def _forget(self, program: Program) -> None:
        """Free the graph that holds the addresses of a program that is about to go."""
        if program in self._replays:
            self._replays.pop(program).close()

    def _settle(self) -> None:
        """The stream is idle and the picture on the host: a moment for what must not be timed."""
        for net in self.nets.values():
            net.settle()

    def stream_weights(self) -> int:
        """Bytes freed by streaming the weights of every net that can; it closes all of a net's bindings."""
        self.free_idle()
        return 0 if self.pool.in_use else sum(net.stream_weights() for net in self.nets.values())

    def describe_memory(self) -> str:
        """The numbers, for a refusal."""
        now = self.device.memory()
        weights = sum(item.weights for item in self.ledger.values())
        return (
            f"{now.free / 2**20:.0f} MiB of {now.total / 2**20:.0f} free on {self.device.name}, weights"
            f" {weights / 2**20:.0f} MiB, activations {self.pool.scratch_size / 2**20:.0f} MiB"
        )

    @property
    def ledger(self) -> Mapping[str, MemoryLedger]:
        """What each net holds now."""
        return {name: net.memory for name, net in self.nets.items()}

    def plan(self, job: Job) -> Plan:
        """How such a job is carried out, as far as is known: what the ladder found, or all at once."""
        need = _need(job, self._scale)
        remembered = self._plans.get(need)
        return remembered.plan if remembered else need.start

    def _climb(self, need: Need, attempt: Callable[[Plan], Result], start: Plan | None = None) -> Result:
        """Try from what fitted last time; now and then from the start, as memory may have come back."""
        start = start or need.start
        remembered = self._plans.pop(need, None)
        if remembered is None or not remembered.requests_left:
            remembered = _Remembered(plan=start, requests_left=_REMEMBERED)
        result, plan = climb(attempt, remembered.plan, need, self, self._log)
        if plan != start:
            left = remembered.requests_left - 1 if plan == remembered.plan else _REMEMBERED
            self._plans[need] = _Remembered(plan=plan, requests_left=left)
        return result

    # ── one attempt ────────────────────────────────────────────────────────────────────────────

    def _begun(self, job: Job, plan: Plan, *, decoder: bool) -> tuple[Canvas, Schedule, Call | None]:
        """Buffers and bindings for a job, with its invariants, table, noise and first latent enqueued.

        `decoder`: take the decoder as well, before any work is done that it could make worthless.
        """
        device, nets, frame = self.device, self.nets, self._frame(job, plan)
        course, latents = Course.of(job, frame), {"latent": job.first.shape}
        sized = [
            *((net, frame.sizes(n)) for n in set(frame.calls()) for net in ("unet", "unet_context")),
            (frame.step, frame.sizes(frame.batch)),
            ("unet_time", {"S": course.steps * course.rows_per_step}),
        ]
        calls: list[tuple[str, Shapes]] = [(net, input_shapes(nets[net].spec, sizes)) for net, sizes in sized]
        self.pool.reserve([*calls, ("vae_decoder", latents)] if decoder else calls)
        with self.pool.returning_on_error() as take:
            schedule = take(course, "unet_time", partial(Schedule, device, nets, course))
            canvas = take(frame, "unet", partial(Canvas, device, nets, frame))
            last = self._take_call(take, "vae_decoder", latents) if decoder else None
            canvas.begin(job)
            schedule.enqueue(job)
        return canvas, schedule, last

    def _take_call(self, take: Take, net: str, shapes: Shapes) -> Call:
        return take(tuple(shapes.items()), net, partial(Call, self.device, self.nets[net], shapes))

    def _call(self, net: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """One attempt at running a net; arrays are converted to its dtypes."""
        shapes = {item.name: arrays[item.name].shape for item in self.nets[net].spec.inputs}
        self.pool.reserve([(net, shapes)])
        with self.pool.returning_on_error() as take:
            program = self._take_call(take, net, shapes)
            program.upload(arrays)
            outputs = program.enqueue()
            self.device.synchronize()
        self.pool.give_back(program)
        return outputs

    def _begin_rows(self, canvas: Canvas) -> Replay:
        """The canvas's replay, ready for one picture."""
        if canvas not in self._replays:
            graphs = self._graphs
            if graphs != "off" and not canvas.capturable:
                self._log("the loop is not captured: the library says that its runs cannot be")
                graphs = "off"
            self._replays[canvas] = Replay(graphs, self._log)
        replay = self._replays[canvas]
        replay.begin(self.device, canvas.enqueue_row)
        return replay

    def _draw(self, job: Job, plan: Plan, clock: Clock, *, decode: bool) -> Drawn:
        """Latent, and with a plan that decodes all at once the picture."""
        whole = decode and plan.decoder_pictures is None and plan.tile is None
        with clock.stage("prepare"):
            canvas, schedule, decoder = self._begun(job, plan, decoder=whole)
        try:
            began = perf_counter()
            with clock.stage("enqueue"):
                replay = self._begin_rows(canvas)
                for row in range(len(job.table)):
                    canvas.feed_row(schedule, row)
                    replay.enqueue(canvas.enqueue_row)
                decoded: Mapping[str, Array] = {}
                if decoder is not None:
                    decoder.take_latent(canvas)
                    decoded = decoder.enqueue()
                latent = canvas.read_state()[0]
            with clock.stage("wait"):
                self.device.synchronize()
            replay.took((perf_counter() - began) / len(job.table))
        finally:
            self.pool.give_back(canvas, schedule, *([decoder] if decoder else []))
        image, mean = decoded.get("image"), decoded.get("mean")
        return Drawn(latent=latent, image=image, mean=mean, profile=canvas.profile)

    def _decode(self, latent: Array, tile: int | None, start: Plan | None = None) -> tuple[Array, Array]:
        """Down the ladder, beginning with `start`, or as it was asked for."""
        pictures, _, height, width = latent.shape
        need = Need(pictures=pictures, height=height * self._scale, width=width * self._scale, tile=tile)
        return self._climb(need, lambda plan: self._decode_by(plan, latent), start)

    def _decode_by(self, plan: Plan, latent: Array) -> tuple[Array, Array]:
        """All pictures at once, one by one, or in tiles, as the plan says."""

        def whole(part: Array) -> tuple[Array, Array]:
            decoded = self._call("vae_decoder", {"latent": part})
            return decoded["image"], decoded["mean"]

        def picture(part: Array) -> tuple[Array, Array]:
            if plan.tile is None:
                return whole(part)
            return decode_tiled(whole, part, Tiling(size=plan.tile), self._scale)

        count = plan.decoder_pictures or len(latent)
        parts = [picture(latent[i : i + count]) for i in range(0, len(latent), count)]
        return np.concatenate([image for image, _ in parts]), np.concatenate([mean for _, mean in parts])

    def _frame(self, job: Job, plan: Plan) -> Frame:
        batch, (height, width) = len(job.text_of_row), job.shape[1:]
        step = "step" if job.kept is None else "step_masked"
        self._manifest.net(step)  # older packages have no masked one
        return Frame(
            pictures=job.pictures,
            guided=job.guided,
            height=height,
            width=width,
            tokens=job.context.shape[1],
            rows=min(plan.rows or batch, batch),
            step=step,
        )


def _need(job: Job, scale: int) -> Need:
    _, height, width = job.shape
    return Need(
        batch=len(job.text_of_row),
        guided=job.guided,
        pictures=job.pictures,
        height=height * scale,
        width=width * scale,
        tile=job.tile,
    )


def _prediction(table: Table, row: int, given: Array, remembered: Array) -> Array:
    """The guided output m, solved from what the row remembers of it: h = p*y + q*m."""
    p, q = float(table.p[row]), float(table.q[row])
    answer: Array = (remembered - p * given) / q
    return answer


def _check_finite(latent: Array, when: str) -> None:
    if not np.isfinite(latent).all():
        raise NumericError(
            f"the latent is not finite {when}",
            expected="finite numbers",
            fix="An fp16 package may overflow: export it again with --dtype fp32.",
        )
