"""What the worker is asked for: pictures of one model, each a generation of its own."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..runtime.loop.calls import Pause
from ..runtime.loop.job import UNetCall
from ..runtime.pipeline import Pipeline, Step
from ..runtime.request.request import Request
from ..runtime.result import Result
from ..runtime.second_pass import check_second, draw_larger
from .jobs.bounds import Bounds
from .jobs.job import Work
from .jobs.refusals import TooLargeError

_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Output:
    """How pictures leave: a name of `pictures.FORMATS`, a quality, and whether files tell how."""

    format: str = "png"
    quality: int | None = None
    metadata: bool = True


@dataclass(frozen=True, kw_only=True)
class Previews:
    """Pictures on the way: after every so many steps, made as `Step.preview` makes that kind."""

    every: int = 1
    kind: Literal["fast", "decoder"] = "fast"


@dataclass(frozen=True, kw_only=True)
class Order:
    """One prompt, one or several seeds.

    Args:
        model: the name of the one that draws.
        values: "prompt" and parameters, as `Pipeline.shared` has them, without the seed.
        seeds: one for each picture.
        output: of the finished pictures.
        previews: None for none.
        input_bytes: of the pictures it came with.
        enlarged: what a second pass has other values of, `height`, `width` and `strength` among them: it goes
            on from the first one's latent. None for one pass.
    """

    model: str
    values: Mapping[str, Any]
    seeds: tuple[int, ...]
    output: Output = field(default_factory=Output)
    previews: Previews | None = None
    input_bytes: int = 0
    enlarged: Mapping[str, Any] | None = None

    def of_picture(self, index: int) -> dict[str, Any]:
        """What `Pipeline.shared` takes for one of the pictures."""
        return {**self.values, "seed": self.seeds[index], "output_type": "pil"}

    def passes(self, pipe: Pipeline) -> tuple[Request, ...]:
        """What is drawn of each picture, one after the other, checked. Raises as `Pipeline.request_of`."""
        values = self.of_picture(0)
        first = pipe.request_of(values)
        return (first,) if self.enlarged is None else (first, check_second(pipe, values, self.enlarged))

    def draw(self, pipe: Pipeline, index: int) -> Generator[UNetCall | Pause | Step, None, Result[Any]]:
        """The generation of one of the pictures, as `SharedSteps.add` takes it."""
        values = self.of_picture(index)
        return pipe.shared(values) if self.enlarged is None else draw_larger(pipe, values, self.enlarged)


def seeds_of(first: int | None, count: int) -> tuple[int, ...]:
    """Seeds that count up from the first, as AUTOMATIC1111 and `num_images_per_prompt` do; None is random."""
    begin = secrets.randbelow(_SEEDS) if first is None or first == -1 else first
    return tuple((begin + index) % 2**64 for index in range(count))


def check_work(work: Work, bounds: Bounds) -> Work:
    """The work of one request, if a server draws as much.

    Raises:
        TooLargeError: more pixels, steps or pictures than it does.
    """
    for found, most, words in (
        (work.width * work.height, bounds.request_pixels, "pixels a picture"),
        (work.steps, bounds.request_steps, "steps"),
        (work.pictures, bounds.request_pictures, "pictures"),
    ):
        if found > most:
            raise TooLargeError(
                f"a request of {found} {words}",
                expected=f"at most {most}",
                fix="Ask for fewer or smaller pictures or fewer steps, or send smaller pictures.",
            )
    return work
