"""What the server counts, as Prometheus reads it: a registry of its own, fed by jobs and workers.

What the server counts by itself is read when somebody asks. Labels have few values, whatever strangers send:
names of models, ends of jobs, types of errors, bounds, routes. So memory is the same after a year.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..engines.installed import latentrt_version
from .jobs.job import Job
from .server import Server

PATH = "/metrics"
ENDS = ("completed", "failed", "cancelled")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
OTHER = "other"  # methods and paths that there are none of
_JOB_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300, 600)
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """Counts what happens to a server's jobs from now on. Any thread may call.

    Args:
        server: whose table and workers are watched.
    """

    def __init__(self, server: Server) -> None:
        self._registry = made = CollectorRegistry()
        self._requests = Counter(
            "latentrt_requests", "Jobs that have ended.", ("outcome", "model"), registry=made
        )
        self._duration = Histogram(
            "latentrt_request_duration_seconds",
            "From a job's arrival to its end.",
            ("outcome",),
            buckets=_JOB_SECONDS,
            registry=made,
        )
        self._queued = Histogram(
            "latentrt_queue_duration_seconds",
            "From a job's arrival to its start.",
            buckets=_JOB_SECONDS,
            registry=made,
        )
        self._failed = Counter("latentrt_failed", "Failed jobs.", ("type",), registry=made)
        self._cancelled = Counter("latentrt_cancelled", "Cancelled jobs.", ("reason",), registry=made)
        self._pictures = Counter("latentrt_pictures", "Finished pictures.", ("model",), registry=made)
        self._rows = Histogram(
            "latentrt_unet_rows",
            "Rows of a call of the UNet.",
            ("model",),
            buckets=_ROWS,
            registry=made,
        )
        self._steps = Histogram(
            "latentrt_step_seconds",
            "A worker's turn that calls the UNet, with what else it does.",
            ("model",),
            buckets=_STEP_SECONDS,
            registry=made,
        )
        self._http = Counter(
            "latentrt_http_requests",
            "Answers that have begun. The guard's own refusals are not among them.",
            ("method", "route", "status"),
            registry=made,
        )
        version = Gauge("latentrt_build_info", "Always 1.", ("version",), registry=made)
        version.labels(latentrt_version()).set(1)
        made.register(_Now(server))
        ProcessCollector(registry=made)
        self._watch(server)

    def _watch(self, server: Server) -> None:
        for outcome in ENDS:  # a series that is not there has no rate
            self._duration.labels(outcome)
            for model in server.models:
                self._requests.labels(outcome, model)
        server.jobs.watch(self._changed)
        for model, worker in server.workers.items():
            self._pictures.labels(model)
            worker.turns.append(partial(self._turned, model))

    def _changed(self, job: Job) -> None:
        """Count a job that has started or ended."""
        if job.ended is None:
            if job.started is not None:
                self._queued.observe(job.started - job.created)
            return
        self._requests.labels(job.state, job.submission.model).inc()
        self._duration.labels(job.state).observe(job.ended - job.created)
        self._pictures.labels(job.submission.model).inc(len(job.pictures))
        if job.state == "cancelled":
            self._cancelled.labels(job.cancel_reason).inc()
        if job.error is not None:
            self._failed.labels(job.error.type).inc()

    def _turned(self, model: str, rows: int, seconds: float) -> None:
        if rows:
            self._rows.labels(model).observe(rows)
            self._steps.labels(model).observe(seconds)

    def answered(self, method: str, route: str | None, status: int) -> None:
        """Count an answer of HTTP. `route` is the pattern that its path has met, None if there is none."""
        known = method if method in METHODS else OTHER
        self._http.labels(known, OTHER if route is None else route, str(status)).inc()

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """All of it, in the form that an Accept header asks for, and the name of that form."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


class _Now(Collector):
    """What the server knows of this moment, and what it counts by itself."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Read it."""
        server = self._server
        counts, load = server.jobs.counts(), server.queue.load
        yield _gauge("requests_waiting", "Jobs in the queue.", counts.queued)
        yield _gauge("requests_running", "Jobs that are being drawn.", counts.running)
        yield _gauge("pixel_steps", "Width x height x steps x pictures of these jobs.", load.pixel_steps)
        about = "Measured: how long a pixel of a step takes, at the model's own size."
        paces = GaugeMetricFamily("latentrt_seconds_per_pixel_step", about, labels=["model"])
        for model, pace in server.paces.items():
            seconds = pace.seconds_per_pixel_step
            paces.add_metric([model], math.nan if seconds is None else seconds)
        yield paces
        yield _gauge("ready", "1 where new jobs are taken.", float(server.health == "ready"))
        kept = GaugeMetricFamily("latentrt_bytes", "What is kept in memory.", labels=["kind"])
        kept.add_metric(["results"], server.jobs.kept_bytes)
        kept.add_metric(["input"], load.input_bytes)
        yield kept
        rejected = CounterMetricFamily("latentrt_rejected", "Jobs that were not accepted.", labels=["bound"])
        for bound, count in sorted(server.queue.refused.items()):
            rejected.add_metric([bound], count)
        yield rejected
        restarts = CounterMetricFamily(
            "latentrt_worker_restarts", "Workers that had died and were started again.", labels=["model"]
        )
        alive = GaugeMetricFamily("latentrt_worker_alive", "1 where a worker draws.", labels=["model"])
        for model, worker in server.workers.items():
            restarts.add_metric([model], server.restarts[model])
            alive.add_metric([model], float(worker.alive))
        yield restarts
        yield alive


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"latentrt_{name}", about, value=value)
