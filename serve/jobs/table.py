"""The table of all jobs: who owns them, what state each is in, and how long what they made is kept.

::

    queued ── start ──> running ── complete ──> completed
       │                   ├────── fail ──────> failed
       │                   └────── fail(CancelledError), after `cancel` has set `job.stop` ──> cancelled
       ├── fail ──> failed
       └── cancel ──> cancelled

A job ends once: whatever wants to end it later changes nothing. An ended one is kept for `result_seconds`, or
until its pictures must give room; then it is known to be gone for as long again, and then it is unknown.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ...engines.errors import CancelledError, MemoryLimitError
from .bounds import Bounds, Clock
from .events import EventLog, Terminal
from .failure import Failure
from .job import Job, Once, StoredPicture, Submission
from .refusals import GoneError, IdempotencyMismatchError, UnknownJobError, UnknownPictureError

Watcher = Callable[[Job], None]


@dataclass(frozen=True, kw_only=True)
class JobCounts:
    """All jobs since the start: accepted = completed + failed + cancelled + queued + running."""

    accepted: int
    completed: int
    failed: int
    cancelled: int
    queued: int
    running: int


@dataclass(frozen=True, kw_only=True)
class _Gone:
    owner: str
    since: float


class Jobs:
    """The table. Any thread may call; no call waits for anything but `lock`, and none takes long.

    Args:
        bounds: how long and how much is kept.
        now: a clock.
    """

    def __init__(self, bounds: Bounds, now: Clock) -> None:
        self._bounds, self._now = bounds, now
        self.lock = threading.RLock()  # also the queue's: a job waits there exactly if it is queued here
        self._there: dict[str, Job] = {}  # queued and running
        self._ended: dict[str, Job] = {}  # in the order of their ends
        self._gone: dict[str, _Gone] = {}  # in that of their going
        self._fetched: dict[str, None] = {}  # those of _ended that have pictures: the longest unused first
        self._unfetched: dict[str, None] = {}  # and those that nobody has fetched
        self._once: dict[tuple[str, str], tuple[str, str]] = {}  # owner, key -> body, id
        self._counts = Counter[str]()  # accepted, and ended by state
        self._bytes = 0
        self._watchers: list[Watcher] = []

    def watch(self, watcher: Watcher) -> None:
        """Call `watcher` with every job that is added, starts or ends, under the lock and in this order.

        It must not raise, and take no lock that a caller of the table holds.
        """
        self._watchers.append(watcher)

    # ── a job's way ─────────────────────────────────────────────────────────────────────────────────────

    def add(self, owner: str, submission: Submission) -> Job:
        """A new job, queued. Whether there is room is the queue's question.

        Raises:
            IdempotencyMismatchError: the submission's key has another body, or is in use.
        """
        with self.lock:
            self._sweep()
            if submission.once and self.find(owner, submission.once):
                raise _mismatch("an idempotency key that has a job")
            now, timeout = self._now(), submission.timeout_s
            job = Job(
                id=secrets.token_hex(16),
                owner=owner,
                submission=submission,
                created=now,
                deadline=None if timeout is None else now + timeout,
                log=EventLog(self._bounds, self._now, submission.work.pictures),
                stop=threading.Event(),
            )
            if submission.once:
                self._once[owner, submission.once.key] = submission.once.body, job.id
            self._counts["accepted"] += 1
            return self._put(job)

    def find(self, owner: str, once: Once) -> Job | None:
        """The owner's job of that key, whatever its state is; None if there is none or it is gone.

        Raises:
            IdempotencyMismatchError: it is for another body.
        """
        with self.lock:
            self._sweep()
            if (known := self._once.get((owner, once.key))) is None:
                return None
            body, name = known
            if body != once.body:
                raise _mismatch("an idempotency key of another request")
            return self._there.get(name) or self._ended[name]

    def start(self, name: str) -> Job | None:
        """A queued job, running from now on; None if it is not queued."""
        with self.lock:
            job = self._there.get(name)
            if job is None or job.state != "queued":
                return None
            started = self._put(replace(job, state="running", started=self._now()))
            job.log.append("started", {})
            return started

    def keep(self, name: str, picture: StoredPicture) -> bool:
        """Keep a picture of a running job; False if it does not run.

        Raises:
            MemoryLimitError: all running jobs' pictures are more than may be kept.
        """
        with self.lock:
            self._sweep()
            job = self._there.get(name)
            if job is None or job.state != "running":
                return False
            self._make_room(len(picture.data))
            self._bytes += len(picture.data)
            self._there[name] = replace(job, pictures=(*job.pictures, picture))
            job.log.append("image", picture.record())
            return True

    def complete(self, name: str) -> bool:
        """End a running job with the pictures that were kept; False if it does not run."""
        with self.lock:
            job = self._there.get(name)
            if job is None or job.state != "running":
                return False
            self._end(job, "completed")
            return True

    def fail(self, name: str, error: BaseException) -> bool:
        """End a job: as cancelled after a CancelledError, else as failed; False if it has ended before."""
        with self.lock:
            if (job := self._there.get(name)) is None:
                return False
            if isinstance(error, CancelledError):
                self._end(job, "cancelled", cancel_reason=job.cancel_reason or "stopped")
            else:
                self._end(job, "failed", error=Failure.of(error))
            return True

    def cancel(self, name: str, owner: str, reason: str = "request") -> Job:
        """Want no more of a job: one that waits ends here, one that runs when its worker sees `job.stop`.

        Raises:
            UnknownJobError, GoneError: as `get`.
        """
        with self.lock:
            return self._cancel(self.get(name, owner), reason)

    def cancel_all(self, reason: str) -> None:
        """Cancel everybody's jobs, as at the end of a shutdown's grace."""
        with self.lock:
            for job in reversed(list(self._there.values())):  # nobody moves up for nothing
                self._cancel(job, reason)

    def fail_all(self, error: BaseException) -> None:
        """End everybody's jobs as failed, as after the death of their worker."""
        with self.lock:
            for name in reversed(list(self._there)):
                self.fail(name, error)

    # ── what others see ─────────────────────────────────────────────────────────────────────────────────

    def get(self, name: str, owner: str) -> Job:
        """A job of that owner.

        Raises:
            GoneError: it has ended, and is not kept any more.
            UnknownJobError: there is none, or it is another's.
        """
        with self.lock:
            self._sweep()
            job = self._there.get(name) or self._ended.get(name)
            if job is not None and job.owner == owner:
                return job
            if (gone := self._gone.get(name)) is not None and gone.owner == owner:
                raise GoneError(
                    "a job whose pictures are gone",
                    expected=f"one that ended in the last {self._bounds.result_seconds:g} s, or fewer",
                    fix="Send the request again; with the same seed it gives the same pictures.",
                )
            raise UnknownJobError()

    def picture(self, name: str, owner: str, index: int) -> StoredPicture:
        """A job's picture, which may from now on give room to those that nobody has fetched.

        Raises:
            UnknownPictureError: the job has none of that index (yet).
            UnknownJobError, GoneError: as `get`.
        """
        with self.lock:
            job = self.get(name, owner)
            found = next((one for one in job.pictures if one.index == index), None)
            if found is None:
                raise UnknownPictureError(
                    f"picture {index} of a job that is {job.state} and has {len(job.pictures)}",
                    expected="one of those that its record lists",
                    fix="Wait for the job's `image` event.",
                )
            if name in self._ended:
                self._unfetched.pop(name, None)
                self._fetched.pop(name, None)
                self._fetched[name] = None
            return found

    def owned(self, owner: str, limit: int) -> tuple[Job, ...]:
        """An owner's jobs that are there or kept, the newest first."""
        with self.lock:
            self._sweep()
            own = [job for job in chain(self._ended.values(), self._there.values()) if job.owner == owner]
            return tuple(sorted(own, key=lambda job: job.created, reverse=True)[:limit])

    def counts(self) -> JobCounts:
        """How many there were and are."""
        with self.lock:
            there = Counter(job.state for job in self._there.values())
            return JobCounts(
                accepted=self._counts["accepted"],
                completed=self._counts["completed"],
                failed=self._counts["failed"],
                cancelled=self._counts["cancelled"],
                queued=there["queued"],
                running=there["running"],
            )

    @property
    def kept_bytes(self) -> int:
        """The size of all pictures, also of running jobs."""
        with self.lock:
            self._sweep()
            return self._bytes

    @property
    def records(self) -> int:
        """How many jobs have ended and are known."""
        with self.lock:
            self._sweep()
            return len(self._ended) + len(self._gone)

    # ── inside, under the lock ──────────────────────────────────────────────────────────────────────────

    def _put(self, job: Job) -> Job:
        self._there[job.id] = job
        for watcher in self._watchers:
            watcher(job)
        return job

    def _cancel(self, job: Job, reason: str) -> Job:
        if job.id not in self._there or job.cancel_reason is not None:
            return job
        wanted = self._there[job.id] = replace(job, cancel_reason=reason)
        if job.state == "queued":
            return self._end(wanted, "cancelled")
        job.stop.set()
        return wanted

    def _end(self, job: Job, state: Terminal, **changes: Any) -> Job:
        submission = replace(job.submission, request=None)  # pictures to start from are large
        ended = replace(job, state=state, ended=self._now(), submission=submission, **changes)
        del self._there[job.id]
        self._ended[job.id] = ended
        if ended.pictures:
            self._unfetched[job.id] = None
        self._counts[state] += 1
        job.stop.set()  # for a worker that does not know yet
        job.log.append(state, ended.outcome)
        for watcher in self._watchers:
            watcher(ended)
        return ended

    def _sweep(self) -> None:
        """Let go of what is old, and of records beyond their number."""
        now, kept = self._now(), self._bounds.result_seconds
        while self._ended and (until := _ended_at(next(iter(self._ended.values()))) + kept) <= now:
            self._drop(next(iter(self._ended)), since=until)
        while self._gone and next(iter(self._gone.values())).since + kept <= now:
            del self._gone[next(iter(self._gone))]
        while len(self._ended) + len(self._gone) > self._bounds.records:
            if not self._gone:
                self._drop(next(iter(self._ended)), since=now)
            del self._gone[next(iter(self._gone))]

    def _drop(self, name: str, since: float) -> None:
        """Let a tombstone stand for an ended job."""
        job = self._ended.pop(name)
        self._fetched.pop(name, None)
        self._unfetched.pop(name, None)
        self._bytes -= job.picture_bytes
        if job.submission.once:
            del self._once[job.owner, job.submission.once.key]
        self._gone[name] = _Gone(owner=job.owner, since=since)

    def _make_room(self, size: int) -> None:
        bound = self._bounds.result_bytes
        running = sum(job.picture_bytes for job in self._there.values())
        if running + size > bound:
            raise MemoryLimitError(
                f"{running + size} bytes of pictures of running jobs",
                expected=f"at most {bound}",
                fix="Ask for fewer or smaller pictures, or try again when other jobs have ended.",
            )
        while self._bytes + size > bound:
            self._drop(next(chain(self._fetched, self._unfetched)), since=self._now())


def _ended_at(job: Job) -> float:
    assert job.ended is not None
    return job.ended


def _mismatch(found: str) -> IdempotencyMismatchError:
    return IdempotencyMismatchError(
        found,
        expected="a new key for each new request",
        fix="Send the same body again to get its job, or choose another key.",
    )
