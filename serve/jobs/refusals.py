"""What the server does not do for a caller, each with a type of its own: every API says it in its way."""

from __future__ import annotations

from ...engines.errors import LatentrtError, UsageError


class UnknownJobError(UsageError):
    """No job of that id is the caller's; whether it is another's is not told."""

    def __init__(
        self,
        found: str = "unknown job",
        *,
        expected: str = "the id of a job of yours",
        fix: str = "Take the id from the answer that accepted the job.",
    ) -> None:
        super().__init__(found, expected=expected, fix=fix)


class UnknownPictureError(UsageError):
    """The job has no such picture, or not yet."""


class GoneError(UsageError):
    """A job of the caller's that was there, and whose pictures are kept no longer."""


class IdempotencyKeyError(UsageError):
    """A key that no header can have."""


class IdempotencyMismatchError(UsageError):
    """The same key for another body."""


class TooLargeError(UsageError):
    """A job that would be refused by an empty queue too."""


class NeverInTimeError(UsageError):
    """A deadline that an empty server would miss too."""


class FieldError(UsageError):
    """A field of another kind than the API has, or one whose mere presence asks for what is not there."""


class UnsupportedError(UsageError):
    """A service of an API that this server does not offer."""


class DeadlineError(LatentrtError):
    """A job was not done in the time that its caller gave it."""


class RefusedError(LatentrtError):
    """No job now: later it may be accepted.

    Args:
        bound: which one is reached: `jobs`, `input_bytes`, `pixel_steps`, one of these after `owner_`,
            `deadline`, or `draining`.
        retry_after_s: when to try again.
    """

    def __init__(self, found: str, *, expected: str, fix: str, bound: str, retry_after_s: int) -> None:
        super().__init__(found, expected=expected, fix=fix)
        self.bound = bound
        self.retry_after_s = retry_after_s
