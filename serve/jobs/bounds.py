"""What the server keeps and takes at most: one table of numbers, whose defaults are here alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]
"""Seconds since some beginning; it never runs backwards."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much there may be of everything that strangers can make more of.

    Args:
        jobs: waiting and running.
        input_bytes: of the requests of those jobs.
        pixel_steps: width x height x steps x pictures of those jobs.
        request_pixels, request_steps, request_pictures: of one request.
        owner_share: of each of these three, the share that one owner may have (0 to 1).
        retry_after_s: the least and the most that a refused caller is told to wait.
        result_seconds: how long a job that has ended is kept; then it is known to be gone for as long again.
        result_bytes: of all pictures that are kept.
        records: of jobs that have ended or are gone.
        events: the last of each job.
        steps_per_second: events of steps, for each job (of as many pictures at most).
    """

    jobs: int = 64
    input_bytes: int = 256 * 2**20
    pixel_steps: int = 20 * 10**9
    request_pixels: int = 4 * 2**20
    request_steps: int = 150
    request_pictures: int = 10
    owner_share: float = 0.5
    retry_after_s: tuple[int, int] = (1, 120)
    result_seconds: float = 600
    result_bytes: int = 512 * 2**20
    records: int = 4096
    events: int = 256
    steps_per_second: int = 20
