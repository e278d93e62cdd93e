"""The loop on the host: nets are called with arrays, everything between them is NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from threading import Event, Lock

from ...engines.backend import HostBackend, Net
from ...engines.errors import BackendError
from ...engines.package import Package
from ...engines.spec import DTYPES, Array
from ..pictures.tiling import Tiling, decode_tiled
from . import guidance
from .clock import Clock
from .denoise import State, denoise, narrow
from .job import DenoiseJob, Drawn, check_cancelled


class HostLoop:
    """Threads may share it: nothing changes but which nets are open, and that under a lock.

    Args:
        package: where nets are opened from, each when it is first called.
        backend: opens them.
        threads: of the backend; None is every processor this process may use.
    """

    def __init__(self, package: Package, backend: HostBackend, threads: int | None) -> None:
        self.nets: dict[str, Net] = {}
        self._package = package
        self._open = partial(backend.open_net, package, threads=threads)
        self._resources = ExitStack()
        self._lock = Lock()
        self._closed = False
        self._dtype = DTYPES[package.manifest.net("unet").spec.inputs[0].dtype]

    def net(self, name: str) -> Net:
        """A net, opened if it was not yet. Raises PackageError if there is none, BackendError once closed."""
        with self._lock:
            if self._closed:
                raise BackendError(
                    f"the net {name!r} was called after its pipeline was closed",
                    expected="an open pipeline",
                    fix="Call it inside the `with` block.",
                )
            if name not in self.nets:
                self._package.manifest.net(name)
                self.nets[name] = self._resources.enter_context(self._open(name))
            return self.nets[name]

    def call(self, net: str, **arrays: Array) -> dict[str, Array]:
        """Run one net once."""
        return self.net(net)(**arrays)

    def steps(self, job: DenoiseJob, clock: Clock, cancel: Event | None) -> Iterator[State]:
        """One item per row of the table. Raises CancelledError, NumericError."""
        with clock.stage("invariants"):
            prompts = self.call("unet_context", context=job.context)
            rows_of = list(job.text_of_row)
            constant = {name: keys_or_values[rows_of] for name, keys_or_values in prompts.items()}
            if job.image_latents is not None:
                constant["image_latents"] = narrow(job.image_latents, self._dtype)  # (B, C', H/8, W/8)
            schedule = self.call("unet_time", **job.schedule_inputs())
        unet, each, source = self.net("unet"), job.rows_per_step, job.noise.fork()

        def predict(latent: Array, row: int) -> Array:
            check_cancelled(cancel, row, len(job.table))
            rows = narrow(guidance.batch(latent, job.guided), self._dtype)  # (B, C, H/8, W/8)
            now = {name: of_all[row * each : (row + 1) * each] for name, of_all in schedule.items()}
            with clock.stage("unet"):
                prediction = unet(latent=rows, **constant, **now)["prediction"]
            return guidance.combine(prediction, job.guidance_scale, job.guidance_rescale, job.guided)

        rows = denoise(job.table, lambda: source.draw(job.shape), predict, job.first, job.kept)
        yield from clock.timed("update", rows)

    def draw(self, job: DenoiseJob, clock: Clock, *, decode: bool) -> Drawn:
        """All of it."""
        *_, last = self.steps(job, clock, None)
        if not decode:
            return Drawn(latent=last.latent, image=None, mean=None)
        with clock.stage("vae_decoder"):
            image, mean = self.decode(last.latent, tile=job.tile)
        return Drawn(latent=last.latent, image=image, mean=mean)

    def decode(self, latent: Array, *, tile: int | None = None) -> tuple[Array, Array]:
        """(N, C, H/8, W/8) float32 -> (N, H, W, 3) uint8 and (N,) float32."""

        def whole(part: Array) -> tuple[Array, Array]:
            decoded = self.call("vae_decoder", latent=narrow(part, self._dtype))
            return decoded["image"], decoded["mean"]

        if tile is None:
            return whole(latent)
        return decode_tiled(whole, latent, Tiling(size=tile), self._package.manifest.latent_scale)

    def close(self) -> None:
        """Free every net. May be called twice."""
        with self._lock:
            self._closed = True
            self._resources.close()
