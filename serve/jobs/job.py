"""A job: what is asked for, and how far it is."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from .events import EventLog
from .failure import Failure
from .refusals import IdempotencyKeyError

State = Literal["queued", "running", "completed", "failed", "cancelled"]
KEY_LENGTH = 255
ANYONE = "anyone"  # the owner where there are no keys, and on open paths


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a job is: `width` x `height` pixels, `steps` of each of its `pictures`, bytes of its input."""

    width: int
    height: int
    steps: int
    pictures: int = 1
    input_bytes: int = 0

    @property
    def pixel_steps(self) -> int:
        """What its time grows with."""
        return self.width * self.height * self.steps * self.pictures


@dataclass(frozen=True, kw_only=True)
class Once:
    """A caller's promise: what has this key is one job, however often it arrives.

    Args:
        key: of the caller's own choice, 1 to 255 printable characters of ASCII.
        body: a hash of the request.

    Raises:
        IdempotencyKeyError: another key.
    """

    key: str
    body: str

    def __post_init__(self) -> None:
        """Check the key."""
        if not (0 < len(self.key) <= KEY_LENGTH and self.key.isascii() and self.key.isprintable()):
            raise IdempotencyKeyError(
                f"an idempotency key of {len(self.key)} characters, or with one that is not printable ASCII",
                expected=f"1 to {KEY_LENGTH} printable characters",
                fix="Send a random UUID.",
            )


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a caller hands in.

    Args:
        work: how much it is.
        model: the name of the one that is to draw.
        request: for the worker; nobody else looks into it, and it is dropped when the job ends.
        priority: higher ones start first.
        timeout_s: from now until the job is of no use; None for never.
        once: so that sending it twice makes one job.
    """

    work: Work
    model: str = ""
    request: Any = None
    priority: int = 0
    timeout_s: float | None = None
    once: Once | None = None


@dataclass(frozen=True, kw_only=True)
class StoredPicture:
    """A finished picture, as a file's bytes.

    Args:
        index: counts the job's pictures from 0.
        seed: it was drawn with.
        media_type: of the file.
        data: the file.
        made: how it was made, as `Result.record` has it.
        infotext: the same as AUTOMATIC1111 writes it.
        seconds: by stage.
    """

    index: int
    seed: int
    media_type: str
    data: bytes
    made: Mapping[str, Any] = field(default_factory=dict[str, Any])
    infotext: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])

    @cached_property
    def sha256(self) -> str:
        """The hash of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def record(self) -> dict[str, object]:
        """All but the bytes, as JSON takes it."""
        size = len(self.data)
        return {
            "index": self.index,
            "seed": self.seed,
            "media_type": self.media_type,
            "bytes": size,
            "sha256": self.sha256,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A job as it is at one moment: the table replaces it when it changes.

    Args:
        id: 32 hexadecimal digits that nobody can guess.
        owner: who may see it.
        submission: what was handed in; without its request once the job has ended.
        created: by the table's clock, as `started`, `ended` and `deadline`.
        log: what happens to it.
        stop: set when nobody wants more of it; the worker looks at it between steps.
        pictures: those that are finished, also of a job that failed or was cancelled later.
        error: why it has failed.
        cancel_reason: who wanted it to end: `request`, `disconnect`, `shutdown`, …
    """

    id: str
    owner: str
    submission: Submission
    created: float
    deadline: float | None
    log: EventLog
    stop: threading.Event
    state: State = "queued"
    started: float | None = None
    ended: float | None = None
    pictures: tuple[StoredPicture, ...] = ()
    error: Failure | None = None
    cancel_reason: str | None = None

    @property
    def picture_bytes(self) -> int:
        """How much its pictures take."""
        return sum(len(one.data) for one in self.pictures)

    @property
    def outcome(self) -> dict[str, object]:
        """The data of its last event."""
        told: dict[str, object] = {"images": [one.record() for one in self.pictures]}
        if self.error is not None:
            told["error"] = self.error.record()
        return {**told, "reason": self.cancel_reason} if self.state == "cancelled" else told
