"""The loop on the host: nets are called with arrays, everything between them is NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from threading import Event

import numpy as np

from ..engines.backend import Net
from ..engines.spec import DTYPES, Array
from . import guidance
from .clock import Clock
from .denoise import State, denoise, narrow
from .job import Drawn, Job, check_cancelled


class HostLoop:
    """Stateless: threads may share it."""

    def __init__(self, nets: Mapping[str, Net], resources: ExitStack) -> None:
        self.nets = nets
        self._resources = resources
        self._dtype = DTYPES[nets["unet"].spec.inputs[0].dtype]

    def steps(self, job: Job, clock: Clock, cancel: Event | None) -> Iterator[State]:
        """One item per row of the table. Raises CancelledError, NumericError."""
        with clock.stage("text_encoder"):
            context = self.nets["text_encoder"](input_ids=job.token_ids)["context"]  # (P, T, D)
        with clock.stage("invariants"):
            prompts = self.nets["unet_context"](context=context)
            rows_of = list(job.text_of_row)
            invariants = {name: keys_or_values[rows_of] for name, keys_or_values in prompts.items()}
            schedule = self.nets["unet_time"](timestep=job.table.t.astype(np.float32))
        start, source = job.start()

        def predict(latent: Array, row: int) -> Array:
            check_cancelled(cancel, row, len(job.table))
            rows = narrow(guidance.batch(latent, job.guided), self._dtype)  # (B, C, H/8, W/8)
            now = {name: rows_of_all[row : row + 1] for name, rows_of_all in schedule.items()}
            with clock.stage("unet"):
                prediction = self.nets["unet"](latent=rows, **invariants, **now)["prediction"]
            return guidance.combine(prediction, job.guidance_scale, job.guidance_rescale, job.guided)

        yield from clock.timed("update", denoise(job.table, lambda: source.draw(job.shape), predict, start))

    def draw(self, job: Job, clock: Clock, *, decode: bool) -> Drawn:
        """All of it."""
        *_, last = self.steps(job, clock, None)
        if not decode:
            return Drawn(latent=last.latent, image=None, mean=None)
        with clock.stage("vae_decoder"):
            image, mean = self.decode(last.latent)
        return Drawn(latent=last.latent, image=image, mean=mean)

    def decode(self, latent: Array) -> tuple[Array, Array]:
        """(N, C, H/8, W/8) float32 -> (N, H, W, 3) uint8 and (N,) float32."""
        decoded = self.nets["vae_decoder"](latent=narrow(latent, self._dtype))
        return decoded["image"], decoded["mean"]

    def close(self) -> None:
        """Free every net. May be called twice."""
        self._resources.close()
