"""A request as numbers: all that a denoising loop needs, whether it runs on the host or on a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event
from typing import Protocol

import numpy as np

from ..engines.errors import CancelledError
from ..engines.spec import Array
from .clock import Clock
from .denoise import State
from .noise import NoiseSource
from .table import Table


@dataclass(frozen=True, kw_only=True)
class Job:
    """N pictures, S rows of the table, B rows of a UNet call (2N with guidance, else N).

    Attributes:
        token_ids: (P, T) int32, every different text once.
        text_of_row: (B,) which text each UNet row has, unconditional rows first.
        latents: (N, C, H/8, W/8) float32 unit noise to start from, in place of the seeds' own.
        shape: of one latent, (C, H/8, W/8).
    """

    token_ids: Array
    text_of_row: tuple[int, ...]
    table: Table
    guided: bool
    guidance_scale: float
    guidance_rescale: float
    seeds: tuple[int, ...]
    rng: str
    latents: Array | None
    shape: tuple[int, ...]

    @property
    def pictures(self) -> int:
        """N."""
        return len(self.seeds)

    def start(self) -> tuple[Array, NoiseSource]:
        """(N, C, H/8, W/8) float32 unit noise, and the generators behind it, ready for the next draw."""
        source = NoiseSource(self.seeds, self.rng)
        return (source.draw(self.shape) if self.latents is None else self.latents), source

    def noises(self, source: NoiseSource) -> Array:
        """(S, N, C, H/8, W/8) float32: what each row draws, zero where it draws nothing."""
        noises = np.zeros((len(self.table), self.pictures, *self.shape), np.float32)
        for row in np.flatnonzero(self.table.draws):
            noises[row] = source.draw(self.shape)
        return noises


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a job became: latent (N, C, H/8, W/8) float32; image (N, H, W, 3) uint8 and mean (N,) if asked.

    `profile` is what the UNet's engine was optimised for, for people; "" on the host.
    """

    latent: Array
    image: Array | None
    mean: Array | None
    profile: str = ""


class Loop(Protocol):
    """Text encoder, denoising and decoder, on the host (`host_loop.py`) or on a device (`device_loop.py`)."""

    def steps(self, job: Job, clock: Clock, cancel: Event | None) -> Iterator[State]:
        """One item per row of the table."""
        ...

    def draw(self, job: Job, clock: Clock, *, decode: bool) -> Drawn:
        """All of it, with nobody looking on."""
        ...

    def decode(self, latent: Array) -> tuple[Array, Array]:
        """(N, C, H/8, W/8) float32 -> (N, H, W, 3) uint8 and (N,) float32, the mean before clamping."""
        ...

    def close(self) -> None:
        """Free everything. May be called twice."""
        ...


def check_cancelled(cancel: Event | None, row: int, rows: int) -> None:
    """Raise CancelledError if the caller asked to stop before row `row`."""
    if cancel is not None and cancel.is_set():
        raise CancelledError(
            f"cancelled before step {row + 1} of {rows}",
            expected="an unset cancel event",
            fix="Call again to start over.",
        )
