"""What the tests of the queue share: a clock that is set, and small jobs."""

from dataclasses import dataclass

from latentrt.serve.jobs.admission import Queue
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.jobs.job import Once, StoredPicture, Submission, Work
from latentrt.serve.jobs.pace import Pace
from latentrt.serve.jobs.table import Jobs


@dataclass
class SetClock:
    time: float = 1000.0

    def __call__(self) -> float:
        return self.time


def work(steps: int = 1, input_bytes: int = 0, pictures: int = 1) -> Work:
    """100 pixel-steps for each step and picture."""
    return Work(width=10, height=10, steps=steps, pictures=pictures, input_bytes=input_bytes)


def asked(
    steps: int = 1,
    *,
    input_bytes: int = 0,
    pictures: int = 1,
    priority: int = 0,
    timeout_s: float | None = None,
    once: Once | None = None,
) -> Submission:
    return Submission(
        work=work(steps, input_bytes, pictures),
        request=["what the worker reads"],
        priority=priority,
        timeout_s=timeout_s,
        once=once,
    )


def picture(size: int, index: int = 0) -> StoredPicture:
    return StoredPicture(index=index, seed=7, media_type="image/png", data=bytes(size))


@dataclass
class Desk:
    """A table, its queue, pace and clock."""

    bounds: Bounds
    at_once: int = 1

    def __post_init__(self) -> None:
        self.clock, self.pace = SetClock(), Pace()
        self.jobs = Jobs(self.bounds, self.clock)
        self.queue = Queue(self.jobs, self.bounds, self.clock, {"": self.pace}, self.at_once)
