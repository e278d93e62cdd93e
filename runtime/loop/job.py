"""A request as numbers: all that a denoising loop needs, whether it runs on the host or on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import Protocol

import numpy as np

from ...engines.errors import CancelledError
from ...engines.spec import Array, NetSpec
from ..sampling.noise import NoiseSource
from ..sampling.table import Table
from .clock import Clock
from .denoise import Kept, State


@dataclass(frozen=True, kw_only=True)
class Job:
    """N pictures, S rows of the table, B rows of a UNet call (2N with guidance, else N).

    Attributes:
        context: (P, T, D) of the text encoders' dtype, every different text once.
        text_of_row: (B,) which text each UNet row has, unconditional rows first.
        vectors: (B, width) float32 by name (`spec.VECTORS`): what joins the time embedding.
        image_latents: (B, C', H/8, W/8) float32, what an inpainting UNet sees behind the latent.
        first: (N, C, H/8, W/8) float32, the variance-preserving state that enters the first row.
        noise: draws what rows add; each attempt at the job works on a fork of it.
        kept: what is put back outside the mask after every row.
        tile: side in pixels of the tiles in which the decoder runs; None is all at once.
    """

    context: Array
    text_of_row: tuple[int, ...]
    table: Table
    guided: bool
    guidance_scale: float
    guidance_rescale: float
    first: Array
    noise: NoiseSource
    vectors: Mapping[str, Array] = field(default_factory=dict[str, Array])
    image_latents: Array | None = None
    kept: Kept | None = None
    tile: int | None = None

    @property
    def pictures(self) -> int:
        """N."""
        return len(self.first)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent, (C, H/8, W/8)."""
        return self.first.shape[1:]

    @property
    def rows_per_step(self) -> int:
        """Time invariants of a step: one for all UNet rows, or with vectors one for each."""
        return len(self.text_of_row) if self.vectors else 1

    def schedule_inputs(self) -> dict[str, Array]:
        """What `unet_time` is called with: (S, …) float32, the rows of a step together."""
        steps, each = len(self.table), self.rows_per_step
        timesteps = np.repeat(self.table.t.astype(np.float32), each)
        tiled = {name: np.tile(rows, (steps, 1)) for name, rows in self.vectors.items()}
        return {"timestep": timesteps, **tiled}

    def noises(self) -> Array:
        """(S, N, C, H/8, W/8) float32: what each row draws, zero where it draws nothing."""
        noises = np.zeros((len(self.table), self.pictures, *self.shape), np.float32)
        source = self.noise.fork()
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
    """Calls nets, denoises and decodes, on the host (`host_loop.py`) or on a device (`device_loop.py`)."""

    def call(self, net: str, **arrays: Array) -> dict[str, Array]:
        """Run a net that stands outside the loop once. Raises PackageError if the package has none."""
        ...

    def steps(self, job: Job, clock: Clock, cancel: Event | None) -> Iterator[State]:
        """One item per row of the table."""
        ...

    def draw(self, job: Job, clock: Clock, *, decode: bool) -> Drawn:
        """All of it, with nobody looking on."""
        ...

    def decode(self, latent: Array, *, tile: int | None = None) -> tuple[Array, Array]:
        """(N, C, H/8, W/8) float32 -> (N, H, W, 3) uint8 and (N,) float32, the mean before clamping."""
        ...

    def close(self) -> None:
        """Free everything. May be called twice."""
        ...


class JobRecorder:
    """A loop that keeps the job it is to draw; the nets that prepare it are run by another loop."""

    job: Job

    def __init__(self, loop: Loop) -> None:
        self.call, self.steps, self.decode, self.close = loop.call, loop.steps, loop.decode, loop.close

    def draw(self, job: Job, clock: Clock, *, decode: bool) -> Drawn:
        """Keep the job."""
        self.job = job
        return Drawn(latent=job.first, image=None, mean=None)


@dataclass(frozen=True, kw_only=True)
class LoopNet:
    """A net of a loop as something to call; `spec` is its boundary."""

    loop: Loop
    name: str
    spec: NetSpec

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run it once."""
        return self.loop.call(self.name, **arrays)


def check_cancelled(cancel: Event | None, row: int, rows: int) -> None:
    """Raise CancelledError if the caller asked to stop before row `row`."""
    if cancel is not None and cancel.is_set():
        raise CancelledError(
            f"cancelled before step {row + 1} of {rows}",
            expected="an unset cancel event",
            fix="Call again to start over.",
        )
