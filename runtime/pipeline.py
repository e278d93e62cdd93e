"""Prompt to picture: the one place that knows the order encode -> denoise -> decode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.errors import NumericError
from ..engines.package import Package
from ..engines.spec import Array
from .clock import Clock
from .denoise import State
from .job import Drawn, Job, Loop
from .loops import LoopOptions, open_loop
from .picture import check_pictures, to_pil
from .replay import Graphs
from .request import Parameters, Request, latent_shape, make_request
from .result import Result
from .samplers import make_table
from .table import Table
from .tokenizer import ClipTokenizer

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
    _decode: Callable[[Array], Array]

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

    def preview(self) -> list[Image]:
        """`denoised` as pictures, through the full decoder; after the last step, the finished pictures."""
        last = self.index + 1 == self.total
        return [to_pil(image) for image in self._decode(self.latent if last else self.denoised)]


class Pipeline:
    """An opened package. Safe to share between threads: nothing of it changes, and loops are."""

    def __init__(self, package: Package, tokenizer: ClipTokenizer, loop: Loop, backend: str) -> None:
        self.package = package
        self.backend = backend
        self._loop = loop
        self._tokenizer = tokenizer

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
        tokenizer = ClipTokenizer.open(package.root / "tokenizer")
        options = LoopOptions(backend=backend, threads=threads, graphs=graphs, log=log)
        loop, description = open_loop(package, options)
        return cls(package, tokenizer, loop, description)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        callback_on_step_end: StepCallback | None = None,
        cancel: Event | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result:
        """Draw pictures; the keyword arguments are those of `request.Parameters`.

        `callback_on_step_end(pipe, index, timestep, {"latents": …, "total": …})` may return other latents
        under the same name; `total` is the number of steps.
        `cancel` is looked at before every step.

        Raises:
            UsageError: a parameter is out of range (SamplerError for the sampler).
            NumericError: NaN or infinity in the latent or the picture, or a picture of one colour.
            CancelledError: `cancel` was set.
        """
        request = make_request(self.package.manifest, prompt, **parameters)
        clock = Clock()
        if callback_on_step_end is None and cancel is None:
            drawn = self._loop.draw(self._job(request), clock, decode=request.output_type != "latent")
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
        latent = self(
            "", **{"num_inference_steps": 1, "seed": 0, **parameters, "output_type": "latent"}
        ).images
        self._decode(np.asarray(latent))

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

    # ── the stages ─────────────────────────────────────────────────────────────────────────────

    def _job(self, request: Request) -> Job:
        """The request as numbers."""
        texts = (*(request.negative_prompts if request.guided else ()), *request.prompts)
        unique = list(dict.fromkeys(texts))
        tokens = self._tokenizer.encode(unique, length=self.package.manifest.max_tokens)
        for text, dropped in zip(unique, tokens.dropped, strict=True):
            if dropped:
                warnings.warn(f"the prompt {text[:40]!r}… is too long; dropped: {dropped!r}", stacklevel=4)
        return Job(
            token_ids=tokens.ids,
            text_of_row=tuple(unique.index(text) for text in texts),
            table=make_table(request.sampler, request.num_inference_steps),
            guided=request.guided,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            seeds=tuple(request.seeds),
            rng=request.rng,
            latents=request.latents,
            shape=latent_shape(self.package.manifest, request.height, request.width),
        )

    def _steps(self, request: Request, clock: Clock, cancel: Event | None) -> Iterator[Step]:
        job = self._job(request)
        for state in self._loop.steps(job, clock, cancel):
            yield Step(table=job.table, state=state, _decode=self._decode)

    def _watched(
        self, request: Request, clock: Clock, cancel: Event | None, callback: StepCallback | None
    ) -> Drawn:
        """Step by step, with whoever looks on."""
        latent, profile = None, ""
        for step in self._steps(request, clock, cancel):
            if callback is not None:
                values = {"latents": step.latent, "total": step.total}
                answer = callback(self, step.index, step.timestep, values)
                step.state.replace((answer or {}).get("latents", step.latent))
            latent, profile = step.latent, step.state.profile
        assert latent is not None  # a table has at least one row
        if request.output_type == "latent":
            return Drawn(latent=latent, image=None, mean=None, profile=profile)
        with clock.stage("vae_decoder"):
            image, mean = self._loop.decode(latent)
        return Drawn(latent=latent, image=image, mean=mean, profile=profile)

    def _decode(self, latent: Array) -> Array:
        """(N, C, H/8, W/8) -> (N, H, W, 3) uint8."""
        return _finite(*self._loop.decode(latent))

    @staticmethod
    def _finish(request: Request, drawn: Drawn) -> list[Image] | Array:
        if drawn.image is None or drawn.mean is None:
            return drawn.latent
        images = _finite(drawn.image, drawn.mean)
        check_pictures(images)
        return images if request.output_type == "np" else [to_pil(image) for image in images]

    def _producer(self, profile: str) -> dict[str, str]:
        said = {"profile": profile} if profile else {}
        return {
            "model": self.package.manifest.name,
            "backend": self.backend,
            "latentrt": version("latentrt"),
            **said,
        }


def _finite(image: Array, mean: Array) -> Array:
    """The image; its mean, taken before clamping, shows what uint8 cannot."""
    if not np.isfinite(mean).all():
        raise NumericError(
            "the decoded picture is not finite",
            expected="finite numbers",
            fix="An fp16 package may overflow: export it again with --dtype fp32.",
        )
    return image
