"""The loop on a device: uploaded once, enqueued to the end, waited for once.

Latent, invariants, table and noise stay on the device; guidance and the row update are the net `step`. A loop
that ran before can be replayed as one captured graph (`replay.py`); memory that runs out is the ladder's
business (`ladder.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from threading import Event, RLock
from time import perf_counter
from typing import TypeVar

import numpy as np

from ..engines.backend import MemoryLedger
from ..engines.device import Device
from ..engines.errors import NumericError
from ..engines.spec import Array
from .clock import Clock
from .denoise import State
from .device_programs import Canvas, Decoder, Frame, Nets, Program, Prompts, Schedule
from .job import Drawn, Job, check_cancelled
from .ladder import Need, Plan, climb
from .program_pool import Pool
from .replay import Graphs, Replay
from .table import Table
from .tiling import Tiling, decode_tiled

Result = TypeVar("Result")


class DeviceLoop:
    """Implements `job.Loop` over the seam `engines/device.py`. Threads may share it: they take turns.

    Args:
        device: is closed with the loop, and so are `nets`.
        nets: the loop's nets by name.
        latent_scale: pixels per latent value.
        graphs: whether to replay the loop as a captured graph: "on", "off", or "auto", where that is faster.
        log: is told of every rung of the ladder, and why a loop is not captured.
    """

    def __init__(
        self,
        device: Device,
        nets: Nets,
        latent_scale: int,
        *,
        graphs: Graphs = "auto",
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.device = device
        self.nets = nets
        self.pool = Pool(device, nets, self._forget)
        self._scale = latent_scale
        self._graphs: Graphs = graphs
        self._log = log
        self._lock = RLock()
        self._plans: dict[Need, Plan] = {}  # what fitted, so that the ladder is climbed once
        self._replays: dict[tuple[Program, Program], Replay] = {}
        self._closed = False

    # ── job.Loop ───────────────────────────────────────────────────────────────────────────────

    def steps(self, job: Job, clock: Clock, cancel: Event | None) -> Iterator[State]:
        """One item per row of the table, waited for. Raises CancelledError, NumericError."""
        with self._lock, clock.stage("prepare"):
            canvas, schedule = self._climb(_need(job, self._scale), lambda plan: self._begun(job, plan))
        total = len(job.table)
        try:
            given = job.table.init * job.start()[0]
            for row in range(total):
                check_cancelled(cancel, row, total)
                with self._lock, clock.stage("unet"):
                    canvas.enqueue_row(schedule, row, schedule.draws)
                    latent, remembered = canvas.read_state()
                    self.device.synchronize()
                _check_finite(latent, f"after step {row + 1} of {total}")
                prediction = _prediction(job.table, row, given, remembered)
                state = State(index=row, given=given, prediction=prediction, latent=latent)
                yield state
                if state.latent is not latent:
                    with self._lock:
                        canvas.set_latent(state.latent)
                given = state.latent
        finally:
            with self._lock:
                self.pool.give_back(canvas, schedule)

    def draw(self, job: Job, clock: Clock, *, decode: bool) -> Drawn:
        """All of it, with one synchronisation. Raises NumericError, MemoryLimitError, BackendError."""
        with self._lock:
            return self._climb(
                _need(job, self._scale), lambda plan: self._draw(job, plan, clock, decode=decode)
            )

    def decode(self, latent: Array) -> tuple[Array, Array]:
        """(N, C, H/8, W/8) float32 -> (N, H, W, 3) uint8 and (N,) float32."""
        pictures, _, height, width = latent.shape
        need = Need(
            batch=0, guided=False, pictures=pictures, height=height * self._scale, width=width * self._scale
        )
        with self._lock:
            return self._climb(need, lambda plan: self._decode(latent, plan))

    def close(self) -> None:
        """Free everything, nets and device too. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.device.synchronize()
            self.free_idle()
            self.pool.close()
            for net in self.nets.values():
                net.close()
            self.device.close()

    # ── the ladder ─────────────────────────────────────────────────────────────────────────────

    def free_idle(self) -> bool:
        """Free what no request uses now; whether there was anything."""
        return self.pool.free_idle()

    def _forget(self, program: Program) -> None:
        """Free the graphs that hold the addresses of a program that is about to go."""
        for pair in [pair for pair in self._replays if program in pair]:
            self._replays.pop(pair).close()

    def stream_weights(self) -> int:
        """Bytes freed by streaming the weights of every net that can."""
        self.free_idle()
        return sum(net.stream_weights() for net in self.nets.values())

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
        return self._plans.get(_need(job, self._scale), Plan())

    def _climb(self, need: Need, attempt: Callable[[Plan], Result]) -> Result:
        result, self._plans[need] = climb(attempt, self._plans.get(need, Plan()), need, self, self._log)
        return result

    # ── one attempt ────────────────────────────────────────────────────────────────────────────

    def _begun(self, job: Job, plan: Plan, *, decoder: bool = False) -> tuple[Canvas, Schedule]:
        """Buffers and bindings for a job, with its invariants, table, noise and first latent enqueued.

        `decoder`: make sure that the activations of the decoder fit as well, before any work is done.
        """
        frame, rows = self._frame(job, plan), len(job.table)
        noise = (job.pictures, *job.shape) if job.table.draws.any() else None
        texts = len(job.token_ids)
        calls = [
            ("text_encoder", {"P": texts}),
            ("unet_time", {"S": rows}),
            ("step", frame.sizes(frame.batch)),
        ]
        calls += [(net, frame.sizes(n)) for n in set(frame.calls()) for net in ("unet_context", "unet")]
        calls += [("vae_decoder", frame.sizes(frame.batch))] if decoder else []
        self.pool.reserve(calls)
        device, nets = self.device, self.nets
        with self.pool.returning_on_error() as take:
            prompts = take(texts, "text_encoder", lambda scratch: Prompts(device, nets, texts, scratch))
            schedule = take(
                (rows, noise), "unet_time", lambda scratch: Schedule(device, nets, rows, noise, scratch)
            )
            canvas = take(frame, "unet", lambda scratch: Canvas(device, nets, frame, scratch))
            self._enqueue_inputs(job, prompts, schedule, canvas)
        # Its buffers may go to another request at once: the stream keeps the order.
        self.pool.give_back(prompts)
        return canvas, schedule

    def _enqueue_inputs(self, job: Job, prompts: Prompts, schedule: Schedule, canvas: Canvas) -> None:
        start, source = job.start()
        prompts.enqueue(job)
        canvas.set_context(prompts, job.text_of_row)
        canvas.forget()
        canvas.set_latent(job.table.init * start)
        schedule.enqueue(job, job.noises(source) if schedule.draws else None)

    def _draw(self, job: Job, plan: Plan, clock: Clock, *, decode: bool) -> Drawn:
        whole = decode and plan.decoder_pictures is None and plan.tile is None
        with clock.stage("prepare"):
            canvas, schedule = self._begun(job, plan, decoder=whole)
        decoded: tuple[Array, Array] | None = None
        try:
            began = perf_counter()
            with clock.stage("enqueue"):
                replay = self._replays.setdefault((canvas, schedule), Replay(self._graphs))
                replay.run(self.device, lambda: self._enqueue_rows(job, canvas, schedule), self._log)
                if whole:
                    decoded = self._enqueue_decoder((job.pictures, *job.shape), canvas)
                latent = canvas.read_state()[0]
            with clock.stage("wait"):
                self.device.synchronize()
            replay.took(perf_counter() - began)
        finally:
            self.pool.give_back(canvas, schedule)
        _check_finite(latent, "after the last step")
        if decode and decoded is None:
            with clock.stage("vae_decoder"):
                decoded = self._decode(latent, plan)
        image, mean = decoded or (None, None)
        return Drawn(latent=latent, image=image, mean=mean, profile=canvas.profile)

    @staticmethod
    def _enqueue_rows(job: Job, canvas: Canvas, schedule: Schedule) -> None:
        for row in range(len(job.table)):
            canvas.enqueue_row(schedule, row, schedule.draws)

    def _enqueue_decoder(self, shape: tuple[int, ...], latent: Canvas | Array) -> tuple[Array, Array]:
        """Image and mean, there after `synchronize`."""
        pictures, _, height, width = shape
        self.pool.reserve([("vae_decoder", {"N": pictures, "H/8": height, "W/8": width})])
        with self.pool.returning_on_error() as take:
            decoder = take(
                ("decoder", shape),
                "vae_decoder",
                lambda scratch: Decoder(self.device, self.nets, shape, self._scale, scratch),
            )
            decoded = decoder.enqueue(latent)
        self.pool.give_back(decoder)
        return decoded

    def _decode(self, latent: Array, plan: Plan) -> tuple[Array, Array]:
        """All pictures at once, one by one, or in tiles, as the plan says."""

        def whole(part: Array) -> tuple[Array, Array]:
            image, mean = self._enqueue_decoder(part.shape, part)
            self.device.synchronize()
            return image, mean

        def picture(part: Array) -> tuple[Array, Array]:
            if plan.tile is None:
                return whole(part)
            return decode_tiled(whole, part, Tiling(size=plan.tile), self._scale)

        count = plan.decoder_pictures or len(latent)
        parts = [picture(latent[i : i + count]) for i in range(0, len(latent), count)]
        return np.concatenate([image for image, _ in parts]), np.concatenate([mean for _, mean in parts])

    def _frame(self, job: Job, plan: Plan) -> Frame:
        batch = len(job.text_of_row)
        return Frame(
            pictures=job.pictures,
            guided=job.guided,
            height=job.shape[1] * self._scale,
            width=job.shape[2] * self._scale,
            tokens=job.token_ids.shape[1],
            rows=min(plan.rows or batch, batch),
            latent_scale=self._scale,
        )


def _need(job: Job, scale: int) -> Need:
    _, height, width = job.shape
    return Need(
        batch=len(job.text_of_row),
        guided=job.guided,
        pictures=job.pictures,
        height=height * scale,
        width=width * scale,
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
