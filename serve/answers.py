"""What an error is in HTTP: one table for all APIs, which say it in their own forms.

Permanent errors are told not to be tried again: OpenAI's client repeats 408, 409, 429 and everything from 500
on by itself, which would draw a picture three times in vain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..engines.errors import LatentrtError
from .jobs.failure import Failure, type_of
from .jobs.refusals import RefusedError

# An error's type, or that of the class it is made of -> status, and OpenAI's word for it.
_STATUSES: dict[str, tuple[int, str]] = {
    "unknown_job": (404, "not_found"),
    "unknown_picture": (404, "not_found"),
    "unknown_model": (404, "model_not_found"),
    "gone": (410, "gone"),
    "idempotency_mismatch": (422, "idempotency_mismatch"),
    "never_in_time": (400, "deadline"),
    "field": (422, "invalid_type"),
    "unsupported": (501, "not_implemented"),
    "too_large": (413, "too_large"),
    "picture_too_large": (413, "too_large"),
    "usage": (400, "invalid_value"),
    "adapter": (400, "invalid_value"),
    "checkpoint": (400, "invalid_value"),
    "refused": (429, "rate_limit_exceeded"),
    "deadline": (504, "deadline"),
    "cancelled": (503, "cancelled"),
    "memory_limit": (503, "out_of_memory"),
    "storage": (503, "storage"),
    "numeric": (500, "numeric"),
    "latentrt": (500, "server_error"),
    "internal": (500, "server_error"),
}
_LATER = 30  # seconds, for what may pass and says no time of its own


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An error as HTTP has it.

    Attributes:
        status: of HTTP.
        code: OpenAI's word for it.
        failure: what is told.
        retry_after_s: when to come again; None where that is in vain.
    """

    status: int
    code: str
    failure: Failure
    retry_after_s: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What clients that try again by themselves look at."""
        if self.retry_after_s is None:
            return {"x-should-retry": "false"} if self.status >= 409 else {}
        return {"retry-after": str(self.retry_after_s)}

    @property
    def message(self) -> str:
        """In one text."""
        told = self.failure
        return f"{told.found}; expected {told.expected}. {told.fix}"


def told_as(text: str, names: Mapping[str, str]) -> str:
    """A text with the names that an API has for our parameters; what is quoted was sent, and stays."""
    ours = "|".join(names)
    return re.sub(rf"(?<!['\w])(?:{ours})(?!['\w])", lambda found: names[found[0]], text)


ErrorForm = Callable[[Answer], dict[str, Any]]


def answer_to(error: BaseException) -> Answer:
    """The answer to an error of a request; of one that is none of ours nothing is told."""
    failure = Failure.of(error)
    if isinstance(error, RefusedError):
        status = 503 if error.bound == "draining" else 429
        return Answer(status=status, code=error.bound, failure=failure, retry_after_s=error.retry_after_s)
    kinds = [type_of(kind) for kind in type(error).__mro__ if issubclass(kind, LatentrtError)]
    return _answer([*kinds, "internal"], failure)


def answer_to_failure(failure: Failure) -> Answer:
    """The answer to who waits for a job that failed."""
    return _answer([failure.type, "internal"], failure)


def _answer(kinds: list[str], failure: Failure) -> Answer:
    status, code = next(_STATUSES[kind] for kind in kinds if kind in _STATUSES)
    return Answer(
        status=status,
        code=code,
        failure=failure,
        retry_after_s=_LATER if failure.retryable and status == 503 else None,
    )
