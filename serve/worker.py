"""The thread that draws with one model: takes its jobs from the queue, and their pictures share its steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from math import inf
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any, cast

from PIL import Image

from ..engines.errors import BackendError, CancelledError, LatentrtError
from ..runtime.loop.job import UNetCall
from ..runtime.loop.sharing import Ended, Failed, SharedSteps, Yielded, rows_that_gain
from ..runtime.pipeline import Pipeline, Step
from ..runtime.request.parameters import VARIES
from ..runtime.result import Result
from .jobs.admission import Queue, deadline_passed
from .jobs.bounds import Clock
from .jobs.job import Job, StoredPicture
from .jobs.pace import Pace
from .jobs.table import Jobs
from .order import Order
from .pictures.exchange import write_picture, write_preview

_LOG = logging.getLogger(__name__)
AT_ONCE = 4  # jobs that run side by side: short ones pass long ones
IDLE_S = 0.5  # between two looks at deadlines, and signs of life, when there is nothing to draw
BETWEEN_PREVIEWS_S = 0.2
FED_AFTER_S = 0.5  # of drawing: how often the pace is told
Name = tuple[str, int]  # of a generation: job, picture


@dataclass(kw_only=True)
class _Running:
    """A job whose pictures are being drawn."""

    job: Job
    order: Order
    left: set[int]
    kept: int = 0
    error: Exception | None = None
    done: int = 0  # pixel-steps
    previewed: dict[int, float] = field(default_factory=dict[int, float])


class Worker:
    """Draws the jobs of one model, in a thread of its own and with one for files.

    A picture that fails leaves the job's others; the job has failed if there is none. Whatever is none of a
    request's errors ends the thread, and all of the model's jobs with it: `alive` tells, `start` begins anew.

    Args:
        model: its name in submissions.
        pipe: draws; the worker does not close it.
        jobs: the table.
        queue: of that table.
        pace: is told how fast it goes.
        now: the table's clock.
        rows: of a call of the UNet, at most; None is measured when the worker starts.
        at_once: jobs that run side by side.
        sizes: numbers of rows that calls have; None is what the pipeline has a use for.
    """

    def __init__(
        self,
        model: str,
        pipe: Pipeline,
        jobs: Jobs,
        queue: Queue,
        pace: Pace,
        now: Clock,
        *,
        rows: int | None = None,
        at_once: int = AT_ONCE,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.model, self.pipe, self.rows = model, pipe, rows
        self._jobs, self._queue, self._pace, self._now, self._at_once = jobs, queue, pace, now, at_once
        self._sizes = sizes
        self._wake, self._ending = Event(), Event()
        self._running: dict[str, _Running] = {}
        self._lock = Lock()  # of `_running`, which the thread for files looks into
        self._fed_steps, self._fed_pixel_steps, self._fed_seconds = 0, 0, 0.0
        self._thread: Thread | None = None
        self._writer: ThreadPoolExecutor | None = None
        self.defaults: dict[str, Any] = {}  # of a request, once it is warm
        self.seen = now()  # when it last gave a sign of life
        self.turns: list[Callable[[int, float], None]] = []  # told rows and seconds of each call of the UNet
        jobs.watch(lambda job: self._wake.set())

    # ── from outside ───────────────────────────────────────────────────────────────────────────────────

    def warm_up(self) -> None:
        """Draw once, so that the first caller does not wait, and measure how many rows a call may have."""
        pictures: Any = pictures_for(self.pipe)
        least: dict[str, Any] = {"prompt": "", "num_inference_steps": 2, "seed": 0, **pictures}
        self.pipe.warmup(**pictures)
        steps = self.pipe.shared(least)
        call = next(item for item in steps if isinstance(item, UNetCall))
        if self.rows is None:
            self.rows = rows_that_gain(call)
        began = perf_counter()
        drawn: Result[Any] = cast("Any", self.pipe)(**least)
        request = drawn.request
        self.defaults = defaults_of(self.pipe)
        count = len(request.schedule())
        self._pace.feed(count, request.width * request.height * count, perf_counter() - began)
        steps.close()

    def start(self) -> None:
        """Begin to take jobs, after `warm_up`; again after the thread has died."""
        assert not self.alive
        self._thread = Thread(target=self._run, name=f"latentrt {self.model}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are being taken."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def busy(self) -> int:
        """Jobs that run."""
        return len(self._running)

    def end(self, timeout: float | None = None) -> None:
        """Take no more jobs, and wait until those that run have ended, or were cancelled."""
        self._ending.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    # ── the thread ─────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"latentrt {self.model} files")
        rows = self.rows or 1
        sizes = self.pipe.row_sizes(rows) if self._sizes is None else self._sizes
        shared: SharedSteps[Step, Result[Any]] = SharedSteps(rows, sizes)
        try:
            with self._writer, closing(shared):
                while not (self._ending.is_set() and not self._running):
                    self._turn(shared)
        except BaseException:
            _LOG.exception("the worker of %s has died", self.model)
        finally:
            self._fail_all()

    def _turn(self, shared: SharedSteps[Step, Result[Any]]) -> None:
        self.seen = self._now()
        self._take(shared)
        self._drop(shared)
        if not len(shared):
            self._wake.wait(IDLE_S)
            self._wake.clear()
            return
        began = perf_counter()
        events = shared.turn()
        seconds = perf_counter() - began
        for told in self.turns:
            told(shared.rows_of_turn, seconds)
        for event in events:
            self._told(event, shared.rows_of_turn)
        self._feed(seconds)

    def _take(self, shared: SharedSteps[Step, Result[Any]]) -> None:
        while len(self._running) < self._at_once and not self._ending.is_set():
            job = self._queue.take(self.model)
            if job is None:
                return
            order: Order = job.submission.request
            running = _Running(job=job, order=order, left=set(range(len(order.seeds))))
            with self._lock:
                self._running[job.id] = running
            for index in sorted(running.left):
                name: Name = (job.id, index)
                shared.add(name, order.draw(self.pipe, index), job.submission.priority)

    def _drop(self, shared: SharedSteps[Step, Result[Any]]) -> None:
        """End what nobody wants any more, or not in time."""
        now = self._now()
        for running in tuple(self._running.values()):
            job = running.job
            if job.stop.is_set():
                ending: Exception = CancelledError("cancelled", expected="a wanted job", fix="Send it again.")
            elif job.deadline is not None and job.deadline <= now:
                ending = deadline_passed("ran")
            else:
                continue
            for index in tuple(running.left):  # the thread for files takes out what it has written
                shared.remove((job.id, index))
            self._end(running, ending)

    def _told(self, event: Yielded[Step] | Ended[Result[Any]] | Failed, rows: int) -> None:
        name, index = cast("Name", event.name)
        running = self._running.get(name)
        if running is None:
            return
        if isinstance(event, Yielded):
            self._step(running, index, event.item, rows)
        elif isinstance(event, Ended):
            assert self._writer is not None
            self._writer.submit(self._write, running, index, event.value)
        else:
            if not isinstance(event.error, LatentrtError):
                _LOG.error("job %s, picture %s", name, index, exc_info=event.error)
            self._finish(running, index, event.error)

    def _step(self, running: _Running, index: int, step: Step, rows: int) -> None:
        job, order = running.job, running.order
        each = job.submission.work.pixel_steps // len(order.seeds) // job.submission.work.steps
        running.done += each
        self._fed_steps += 1
        self._fed_pixel_steps += each
        self._queue.progress(job.id, running.done)
        job.log.step(
            index,
            {
                "picture": index,
                "index": step.index,
                "total": step.total,
                "timestep": step.timestep,
                "rows": rows,
            },
        )
        self._preview(running, index, step)

    def _preview(self, running: _Running, index: int, step: Step) -> None:
        """A picture on the way, if one is wanted now. One that cannot be made is the last of its job."""
        wanted, now = running.order.previews, perf_counter()
        if wanted is None or (step.index + 1) % wanted.every or step.index + 1 == step.total:
            return
        if now - running.previewed.get(index, -inf) < BETWEEN_PREVIEWS_S:
            return
        running.previewed[index] = now
        try:
            (image,) = step.preview(wanted.kind)
        except LatentrtError as error:
            _LOG.warning("job %s has no previews: %s", running.job.id, error)
            running.previewed[index] = inf
            return
        sent = write_preview(image)
        media_type = sent.format.media_type
        about = {"picture": index, "step": step.index, "media_type": media_type, "b64": sent.as_base64}
        running.job.log.append("preview", about)

    def _feed(self, seconds: float) -> None:
        """Tell the pace, with all that a picture takes besides its steps."""
        self._fed_seconds += seconds
        if self._fed_seconds >= FED_AFTER_S and self._fed_steps:
            self._pace.feed(self._fed_steps, self._fed_pixel_steps, self._fed_seconds)
            self._fed_steps, self._fed_pixel_steps, self._fed_seconds = 0, 0, 0.0

    # ── ends ───────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, running: _Running, index: int, result: Result[Any]) -> None:
        """Keep a picture; in the thread for files, as a file of a megapixel takes longer than a step."""
        output, error = running.order.output, None
        try:
            sent = write_picture(
                result, format=output.format, quality=output.quality, metadata=output.metadata
            )
            stored = StoredPicture(
                index=index,
                seed=running.order.seeds[index],
                media_type=sent.format.media_type,
                data=sent.content,
                made=result.record(),
                infotext=result.infotext(),
                seconds=dict(result.seconds),
            )
            running.kept += self._jobs.keep(running.job.id, stored)
        except Exception as raised:
            if not isinstance(raised, LatentrtError):
                _LOG.exception("job %s, file of picture %s", running.job.id, index)
            error = raised
        self._finish(running, index, error)

    def _finish(self, running: _Running, index: int, error: Exception | None) -> None:
        with self._lock:
            running.left.discard(index)
            running.error = running.error or error
            last = not running.left and self._running.pop(running.job.id, None) is not None
        if not last:
            return
        if running.error is None or running.kept:
            self._jobs.complete(running.job.id)
        else:
            self._jobs.fail(running.job.id, running.error)
        self._wake.set()

    def _end(self, running: _Running, error: Exception) -> None:
        with self._lock:
            self._running.pop(running.job.id, None)
        self._jobs.fail(running.job.id, error)

    def _fail_all(self) -> None:
        """No job of this model waits for a thread that is gone."""
        gone = BackendError(
            f"the worker of {self.model} has ended", expected="a server that draws", fix="Send the job again."
        )
        for running in tuple(self._running.values()):
            self._end(running, gone)
        while (job := self._queue.take(self.model)) is not None:
            self._jobs.fail(job.id, gone)


def pictures_for(pipe: Pipeline) -> dict[str, Image.Image]:
    """Grey ones of the model's own size, where it draws nothing without: unCLIP, inpainting."""
    manifest = pipe.package.manifest
    size = manifest.defaults.width, manifest.defaults.height
    found: dict[str, Image.Image] = {}
    if VARIES.fits(manifest) or manifest.image_latents:
        found["image"] = Image.new("RGB", size, "grey")
    if manifest.image_latents:
        found["mask_image"] = Image.new("RGB", size, "white")
    return found


def defaults_of(pipe: Pipeline) -> dict[str, Any]:
    """What a request has that says nothing but its prompt."""
    request = pipe.request_of({"prompt": "", "seed": 0, **pictures_for(pipe)})
    names = ("width", "height", "num_inference_steps", "guidance_scale", "guidance_rescale")
    return {**{name: getattr(request, name) for name in names}, "sampler": request.sampler.name}
