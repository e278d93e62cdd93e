"""Who asks for what, and when: kinds of requests in fixed shares, which arrive as a Poisson process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.package import Manifest
from ..case import Case

# Of twelve requests so many have this sampler, so many of the case's steps, guidance, and side lengths.
_MIX: tuple[tuple[int, str, float, bool, float], ...] = (
    (4, "dpmpp_2m", 1.0, True, 1.0),
    (2, "euler", 1.0, True, 1.0),
    (2, "euler_a", 1.5, True, 1.0),
    (1, "ddim", 2.5, True, 1.0),
    (2, "euler", 0.5, False, 1.0),
    (1, "dpmpp_2m", 1.0, True, 0.5),
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Requests that differ in their prompts and seeds alone, and so may be one batch.

    Attributes:
        share: of all requests (0 to 1).
        sampler: one that calls the UNet once a step.
        steps: of each picture.
        guidance_scale: 1 is off.
        width, height: pixels.
    """

    share: float
    sampler: str
    steps: int
    guidance_scale: float
    width: int
    height: int

    @property
    def rows(self) -> int:
        """How many of the UNet a picture takes."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def pixels(self) -> int:
        """How many a picture has."""
        return self.width * self.height

    def parameters(self) -> dict[str, Any]:
        """For `Pipeline.shared`, besides prompt and seed."""
        return {
            "sampler": self.sampler,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "width": self.width,
            "height": self.height,
        }

    def to_json(self) -> dict[str, Any]:
        """What tells its rows of a document from those of others."""
        names = ("width", "height", "guidance_scale", "steps", "sampler")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture that somebody wants.

    Attributes:
        number: in the order of arrival, from 0; also the seed of its noise.
        kind: of it.
        due: seconds from the beginning until it arrives; its latency counts from then.
    """

    number: int
    kind: Kind
    due: float


def mix_of(case: Case, manifest: Manifest) -> tuple[Kind, ...]:
    """The kinds of requests: the first and most are of the case's size, steps and guidance."""
    whole, least = sum(parts for parts, *_ in _MIX), manifest.size_multiple

    def side(pixels: int, part: float) -> int:
        return pixels if part == 1 else max(least, round(pixels * part / least) * least)

    return tuple(
        Kind(
            share=parts / whole,
            sampler=sampler,
            steps=max(1, round(case.steps * of_steps)),
            guidance_scale=case.guidance_scale if guided else 1.0,
            width=side(case.width, of_size),
            height=side(case.height, of_size),
        )
        for parts, sampler, of_steps, guided, of_size in _MIX
    )


def arrivals(kinds: Sequence[Kind], per_s: float, seed: int) -> Iterator[Request]:
    """Requests without end, whose gaps are exponential: one second has `per_s` of them on average.

    Another rate with the same seed has the same requests, at other times.
    """
    random, due, number = np.random.default_rng(seed), 0.0, 0
    shares = [kind.share for kind in kinds]
    while True:
        due += random.exponential() / per_s
        kind = kinds[random.choice(len(kinds), p=shares)]
        yield Request(number=number, kind=kind, due=due)
        number += 1
