"""Prompt to picture: the one place that knows the order encode -> denoise -> decode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.package import Package
from ..engines.spec import TEXT_ENCODERS, Array
from .conditioning import make_conditioning
from .loop.clock import Clock
from .loop.denoise import State
from .loop.device.cuda_graphs import Graphs
from .loop.job import Drawn, Job, Loop, LoopNet
from .loop.open import LoopOptions, open_loop
from .pictures.tiling import Tiling, encode_tiled
from .pictures.write import check_pictures, to_pil
from .preview import check_finite, finished, preview
from .prompts.encode import CACHE_BYTES, TextConditioner, TextEncoder
from .prompts.tokenizer import ClipTokenizer
from .request.request import Parameters, Request, make_request
from .result import Result
from .sampling.noise import NoiseSource
from .sampling.span import make_span
from .sampling.table import Table
from .start import make_start

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

SHIPPED = {"demo": Path(__file__).resolve().parent.parent / "demo" / "package"}

StepCallback = Callable[["Pipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row of the table, done."""

    table: Table
    state: State
    _preview: Callable[[Array, str], list[Image]]

    @property
    def index(self) -> int:
        """From 0 to `total` - 1."""
        return self.state.index

    @property
    def total(self) -> int:
        """How many rows there are: the number of UNet calls."""
        return len(self.table)

    @property
    def timestep(self) -> float:
        """What the UNet was told; fractional for some schedules."""
        return float(self.table.t[self.index])

    @property
    def latent(self) -> Array:
        """(N, C, H/8, W/8) float32, the variance-preserving state after this row."""
        return self.state.latent

    @property
    def denoised(self) -> Array:
        """(N, C, H/8, W/8) float32, what the model takes the clean latent to be."""
        return self.state.denoised(self.table)

    def preview(self, kind: str = "decoder") -> list[Image]:
        """`denoised` as pictures; after the last step, the finished pictures.

        Args:
            kind: "decoder" is the model's own, at the cost of a decode; "tiny" the package's tiny
                autoencoder; "rgb" one pixel per latent cell, by a linear map, at no cost; "fast" the better
                of these two that the package has.

        Raises:
            UsageError: another kind, or one that the package does not have.
        """
        last = self.index + 1 == self.total
        return self._preview(self.latent if last else self.denoised, kind)


class Pipeline:
    """An opened package. Safe to share between threads: nothing of it changes, and loops are."""

    def __init__(self, package: Package, text: TextConditioner, loop: Loop, backend: str) -> None:
        self.package = package
        self.backend = backend
        self._loop = loop
        self._text = text

    @classmethod
    def open(
        cls,
        model: str | Path = "demo",
        *,
        backend: str = "auto",
        threads: int | None = None,
        graphs: Graphs = "auto",
        log: Callable[[str], None] | None = None,
    ) -> Pipeline:
        """Open the shipped model ("demo") or a package folder.

        Args:
            model: name or path.
            backend: "auto" picks the best that is present; `pipe.backend` says which.
            threads: of the CPU backend; None is every processor this process may use.
            graphs: on a device, whether rows are replayed as a captured graph: "on", "off", or "auto",
                where that is faster.
            log: on a device, is told what was given up when memory was short; None prints to stderr.

        Raises:
            PackageError: no package there, or a damaged, unsafe or newer one.
            BackendError: nothing installed can execute it, or there are no engines for it.
        """
        package = Package.open(SHIPPED.get(str(model), Path(model)))
        options = LoopOptions(backend=backend, threads=threads, graphs=graphs, log=log)
        loop, description = open_loop(package, options)
        try:
            return cls.over(package, loop, description)
        except BaseException:
            loop.close()
            raise

    @classmethod
    def over(cls, package: Package, loop: Loop, backend: str, *, cache_bytes: int = CACHE_BYTES) -> Pipeline:
        """A pipeline over a loop that is open already, and is closed with it.

        Args:
            package: whose nets the loop has.
            loop: runs them.
            backend: what executes them, for people.
            cache_bytes: what encoded prompts may take; 0 encodes every prompt anew.

        Raises:
            PackageError: a tokenizer is missing or damaged.
        """
        nets = package.manifest.nets
        encoders = [
            TextEncoder(
                net=LoopNet(loop=loop, name=net, spec=nets[net].spec),
                tokenizer=ClipTokenizer.open(package.root / folder),
            )
            for net, folder in TEXT_ENCODERS.items()
            if net in nets
        ]
        return cls(package, TextConditioner(encoders, cache_bytes=cache_bytes), loop, backend)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        callback_on_step_end: StepCallback | None = None,
        cancel: Event | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result:
        """Draw pictures; the keyword arguments are those of `request.Parameters`.

        `callback_on_step_end(pipe, index, timestep, {"latents": …, "total": …, "step": …})` may return other
        latents under the same name; `total` is the number of steps, `step` a `Step`.
        `cancel` is looked at before every step.

        Raises:
            UsageError: a parameter is out of range (SamplerError for the sampler).
            NumericError: NaN or infinity in the latent or the picture, or a picture of one colour.
            CancelledError: `cancel` was set.
        """
        request = make_request(self.package.manifest, prompt, **parameters)
        clock = Clock()
        if callback_on_step_end is None and cancel is None:
            drawn = self._loop.draw(
                self.prepare(request, clock), clock, decode=request.output_type != "latent"
            )
        else:
            drawn = self._watched(request, clock, cancel, callback_on_step_end)
        images = self._finish(request, drawn)
        return Result(
            images=images, request=request, seconds=clock.seconds, producer=self._producer(drawn.profile)
        )

    def stream(
        self, prompt: str | Sequence[str], *, cancel: Event | None = None, **parameters: Unpack[Parameters]
    ) -> Iterator[Step]:
        """The same generation as an iterator, one item per step; close it to stop.

        The last step's `preview()` is the finished pictures. Raises as `__call__`.
        """
        request = make_request(self.package.manifest, prompt, **parameters)
        return self._steps(request, Clock(), cancel)

    def warmup(self, **parameters: Unpack[Parameters]) -> None:
        """Run every net once at the size and batch of these parameters, so that the next call is warm."""
        started = {"strength": 1.0} if parameters.get("image") is not None else {}
        whole: Any = {"num_inference_steps": 1, "seed": 0, **started, **parameters, "output_type": "latent"}
        latent = np.asarray(self("", **whole).images)
        check_finite(*self._loop.decode(latent, tile=parameters.get("tile")))

    def close(self) -> None:
        """Free every net. May be called twice."""
        self._loop.close()

    def __enter__(self) -> Pipeline:
        """The pipeline itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # ── a look inside, for measurements ────────────────────────────────────────────────────────

    @property
    def loop(self) -> Loop:
        """What denoises: the host's loop or a device's, with its nets."""
        return self._loop

    def prepare(self, request: Request, clock: Clock | None = None) -> Job:
        """The request as numbers: everything before the loop. Raises UsageError, NumericError."""
        clock = clock or Clock()
        manifest, source = self.package.manifest, NoiseSource(request.seeds, request.rng)
        table = make_span(request)
        with clock.stage("text_encoder"):
            conditions = make_conditioning(request, manifest, self._text, source, self._loop.call)
        for text, dropped in conditions.dropped.items():
            warnings.warn(f"the prompt {text[:40]!r}… is too long; dropped: {dropped!r}", stacklevel=4)
        encode = partial(self._encode, clock, tile=request.tile)
        start = make_start(request, manifest, table, source, encode)
        return Job(
            context=conditions.context,
            text_of_row=conditions.text_of_row,
            vectors=conditions.vectors,
            table=table,
            guided=request.guided,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            first=start.first,
            noise=source,
            image_latents=start.image_latents,
            kept=start.kept,
            tile=request.tile,
        )

    # ── the stages ─────────────────────────────────────────────────────────────────────────────

    def _encode(self, clock: Clock, image: Array, mask: Array, *, tile: int | None) -> tuple[Array, ...]:
        """(N, H, W, 3) and (N, H, W, 1) uint8 -> mean, and std if there is a posterior, (N, C, H/8, W/8)."""

        def whole(image: Array, mask: Array) -> tuple[Array, ...]:
            return tuple(self._loop.call("vae_encoder", image=image, mask=mask).values())

        with clock.stage("vae_encoder"):
            if tile is None:
                return whole(image, mask)
            return encode_tiled(whole, image, mask, Tiling(size=tile), self.package.manifest.latent_scale)

    def _steps(self, request: Request, clock: Clock, cancel: Event | None) -> Iterator[Step]:
        job = self.prepare(request, clock)
        show = partial(preview, manifest=self.package.manifest, loop=self._loop, request=request)
        for state in self._loop.steps(job, clock, cancel):
            yield Step(table=job.table, state=state, _preview=show)

    def _watched(
        self, request: Request, clock: Clock, cancel: Event | None, callback: StepCallback | None
    ) -> Drawn:
        """Step by step, with whoever looks on."""
        latent, profile = None, ""
        for step in self._steps(request, clock, cancel):
            if callback is not None:
                # A copy: what a callback does to it counts only if it is returned.
                values = {"latents": np.array(step.latent), "total": step.total, "step": step}
                answer = callback(self, step.index, step.timestep, values) or {}
                if "latents" in answer:
                    step.state.replace(answer["latents"])
            latent, profile = step.latent, step.state.profile
        assert latent is not None  # a table has at least one row
        if request.output_type == "latent":
            return Drawn(latent=latent, image=None, mean=None, profile=profile)
        with clock.stage("vae_decoder"):
            image, mean = self._loop.decode(latent, tile=request.tile)
        return Drawn(latent=latent, image=image, mean=mean, profile=profile)

    @staticmethod
    def _finish(request: Request, drawn: Drawn) -> list[Image] | Array:
        if drawn.image is None or drawn.mean is None:
            return drawn.latent
        images = check_finite(drawn.image, drawn.mean)
        check_pictures(images)
        images = finished(images, request)
        return images if request.output_type == "np" else [to_pil(image) for image in images]

    def _producer(self, profile: str) -> dict[str, str]:
        said = {"profile": profile} if profile else {}
        return {
            "model": self.package.manifest.name,
            "backend": self.backend,
            "latentrt": version("latentrt"),
            **said,
        }
