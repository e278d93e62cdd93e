"""The loop on the host: nets are called with arrays, everything between them is NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from threading import Event, Lock

from ...engines.backend import HostBackend, Net
from ...engines.errors import BackendError
from ...engines.package import Package
from ...engines.spec import DTYPES, Array
from ..pictures.tiling import decode_tiled
from .denoise import State, denoise, guide, guided_batch, narrow
from .job import Clock, DenoiseJob, Drawn, check_cancelled


class HostLoop:
    """Implements `job.Loop`. Threads may share it: all that changes is which nets are open, under a lock.

    A net is opened when it is first called. `threads` are the backend's; None is one for every processor this
    process may use.
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
        """A net, opened on first use. Raises PackageError if there is none, BackendError once closed."""
        with self._lock:
            if self._closed:
                raise BackendError(
                    f"the net {name!r} was called after its pipeline was closed",
                    expected="an open pipeline",
                    fix="Call it inside the `with` block.",
                )
            if name not in self.nets:
                self._package.manifest.net(name)
                self.nets[name] = self._resources.enter_context(closing(self._open(name)))
            return self.nets[name]

    def call(self, net: str, **arrays: Array) -> dict[str, Array]:
        """Run one net once; see `job.Loop`."""
        return self.net(net)(**arrays)

    def steps(self, job: DenoiseJob, clock: Clock, cancel: Event | None) -> Iterator[State]:
        """Yield the state after every row of the table. Raises CancelledError, NumericError."""
        with clock.stage("invariants"):
            keys_and_values = self.call("unet_context", context=job.context)
            constant = {name: texts[list(job.text_of_row)] for name, texts in keys_and_values.items()}
            if job.image_latents is not None:
                constant["image_latents"] = narrow(job.image_latents, self._dtype)  # (B, C', H/8, W/8)
            schedule = self.call("unet_time", **job.schedule_inputs())
        dtype = self._package.manifest.dtype
        unet, source, each = self.net("unet"), job.noise.fork(), job.rows_per_step

        def predict(latent: Array, row: int) -> Array:
            check_cancelled(cancel, row, len(job.table))
            batch = narrow(guided_batch(latent, job.guided), self._dtype)  # (B, C, H/8, W/8)
            times = {name: rows[row * each : (row + 1) * each] for name, rows in schedule.items()}
            with clock.stage("unet"):
                prediction = unet(latent=batch, **constant, **times)["prediction"]
            return guide(prediction, job.guidance_scale, job.guidance_rescale, job.guided)

        states = denoise(job.table, lambda: source.draw(job.shape), predict, job.first, job.kept, dtype)
        yield from clock.timed("update", states)

    def draw(self, job: DenoiseJob, clock: Clock, *, decode: bool) -> Drawn:
        """Denoise and decode; see `job.Loop`."""
        *_, last = self.steps(job, clock, None)
        if not decode:
            return Drawn(latent=last.latent, image=None, mean=None)
        with clock.stage("vae_decoder"):
            image, mean = self.decode(last.latent, tile=job.tile)
        return Drawn(latent=last.latent, image=image, mean=mean)

    def decode(self, latent: Array, *, tile: int | None = None) -> tuple[Array, Array]:
        """Pictures of latents; see `job.Loop`."""

        def whole(part: Array) -> tuple[Array, Array]:
            decoded = self.call("vae_decoder", latent=narrow(part, self._dtype))
            return decoded["image"], decoded["mean"]

        if tile is None:
            return whole(latent)
        return decode_tiled(whole, latent, tile, self._package.manifest.latent_scale)

    def close(self) -> None:
        """Free every net. May be called twice."""
        with self._lock:
            self._closed = True
            self._resources.close()
