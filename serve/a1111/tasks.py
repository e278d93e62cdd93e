"""Who waits for pictures through AUTOMATIC1111's API, and how far they are, which clients ask meanwhile.

That program draws one request after the other and tells of the one it is at. Here every caller has tasks of
its own, and the current one is the oldest of them that runs, or else waits: progress, interrupt and skip mean
that one. A task is there exactly as long as its request is being answered, so nothing stays behind.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..jobs.events import Snapshot
from ..jobs.job import Job
from ..jobs.refusals import GoneError, UnknownJobError
from ..server import Server

_KNOWN = 1000  # tasks that have ended and are still known to have
_LEAST = 0.01  # of progress, as clients take 0 for idle
_PER_PICTURE = 10_000  # numbers of previews of one picture


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request that is being answered. `name` is the client's own, or made of its job's id."""

    name: str
    owner: str
    job: str


@dataclass(kw_only=True)
class Desk:
    """What is kept between requests: used from asyncio's thread alone.

    Attributes:
        chosen: the model that a caller has chosen through `options`.
    """

    chosen: dict[str, str] = field(default_factory=dict[str, str])
    _tasks: dict[str, Task] = field(default_factory=dict[str, Task])  # by job, the oldest first
    _ended: deque[tuple[str, str]] = field(default_factory=lambda: deque[tuple[str, str]](maxlen=_KNOWN))

    @contextmanager
    def waiting(self, owner: str, job: str, name: str | None) -> Generator[Task]:
        """A task that is there until the block is left."""
        task = Task(name=name or f"task({job[:15]})", owner=owner, job=job)
        self._tasks[job] = task
        try:
            yield task
        finally:
            del self._tasks[job]
            self._ended.append((owner, task.name))

    def of(self, owner: str) -> tuple[Task, ...]:
        """An owner's tasks, the oldest first."""
        return tuple(task for task in self._tasks.values() if task.owner == owner)

    def current(self, server: Server, owner: str) -> Job | None:
        """The job of the one that runs, or else waits; None if the owner has none."""
        jobs = [job for task in self.of(owner) if (job := job_of(server, task)) is not None]
        return next((job for job in jobs if job.state == "running"), next(iter(jobs), None))

    def find(self, owner: str, name: str) -> Task | None:
        """The newest task of that name."""
        return next((task for task in reversed(self.of(owner)) if task.name == name), None)

    def has_ended(self, owner: str, name: str) -> bool:
        """Whether there was a task of that name not long ago."""
        return (owner, name) in self._ended


def job_of(server: Server, task: Task) -> Job | None:
    """A task's job as it is now; None if it has ended."""
    try:
        job = server.jobs.get(task.job, task.owner)
    except (GoneError, UnknownJobError):
        return None
    return job if job.ended is None else None


# ── how far ────────────────────────────────────────────────────────────────────────────────────────


def progress_of(server: Server, job: Job | None, *, picture: bool) -> dict[str, Any]:
    """What GET progress says of a job, and of none: then all is zero, which clients wait for."""
    if job is None:
        return {
            "progress": 0.0,
            "eta_relative": 0.0,
            "state": _state("", 0, "0", 0, (0, 0)),
            "current_image": None,
            "textinfo": None,
        }
    told, share = job.log.told, _share(server, job)
    stamp = stamp_of(job)
    count = job.submission.work.pictures
    return {
        "progress": share,
        "eta_relative": _eta(server, job, share) or 0.0,
        "state": _state("txt2img", count, stamp, len(told.images), _step(told)),
        "current_image": told.preview["b64"] if picture and told.preview else None,
        "textinfo": "Waiting..." if job.state == "queued" else None,
    }


def _state(job: str, count: int, stamp: str, number: int, step: tuple[int, int]) -> dict[str, Any]:
    return {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": job,
        "job_count": count,
        "job_timestamp": stamp,
        "job_no": number,
        "sampling_step": step[0],
        "sampling_steps": step[1],
    }


def task_progress(
    server: Server, desk: Desk, owner: str, name: str, *, seen: int, picture: bool
) -> dict[str, Any]:
    """What POST /internal/progress says of a task. `seen` is the number of the last preview that it gave."""
    task = desk.find(owner, name)
    job = None if task is None else job_of(server, task)
    answer: dict[str, Any] = {
        "active": job is not None and job.state == "running",
        "queued": job is not None and job.state == "queued",
        "completed": task is None and desk.has_ended(owner, name),
        "progress": None,
        "eta": None,
        "live_preview": None,
        "id_live_preview": -1,
        "textinfo": None,
    }
    if job is None:
        return answer | {"textinfo": None if answer["completed"] else "Waiting..."}
    if job.state == "queued":
        place = server.queue.place(job.id)
        return answer | {"textinfo": f"In queue: {place.position}" if place else "Waiting..."}
    told, share = job.log.told, _share(server, job)
    answer |= {"progress": share, "eta": _eta(server, job, share), "id_live_preview": seen}
    if picture and (preview := told.preview) is not None:
        number = preview["picture"] * _PER_PICTURE + preview["step"] + 1
        if number != seen:
            url = f"data:{preview['media_type']};base64,{preview['b64']}"
            answer |= {"live_preview": url, "id_live_preview": number}
    return answer


def stamp_of(job: Job) -> str:
    """When a job was made, as its clients are told."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(job.created))


def _share(server: Server, job: Job) -> float:
    return max(_LEAST, server.queue.share_done(job.id))


def _eta(server: Server, job: Job, share: float) -> float | None:
    """Seconds that a running job may still take; those of a waiting one where a pace is known."""
    if job.state == "queued":
        place = server.queue.place(job.id)
        return place.eta_s if place else None
    if job.started is None or share <= _LEAST:
        return None
    passed = server.now() - job.started
    return max(0.0, passed / share - passed)


def _step(told: Snapshot) -> tuple[int, int]:
    """The step that its pictures are at, and of how many: that of the one that is farthest behind."""
    steps = [(step["index"] + 1, step["total"]) for step in told.steps.values()]
    return min(steps, default=(0, 0))
