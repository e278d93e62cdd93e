"""Prompt to picture: the one place that knows the order encode -> denoise -> decode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.backend import Net, choose_backend
from ..engines.errors import CancelledError, NumericError, PackageError
from ..engines.package import Package
from ..engines.spec import DTYPES, Array
from . import guidance
from .clock import Clock
from .denoise import State, denoise, narrow
from .noise import NoiseSource
from .picture import check_pictures, to_pil
from .request import Parameters, Request, latent_shape, make_request
from .result import Result
from .samplers import make_table
from .table import Table
from .tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

SHIPPED = {"demo": Path(__file__).resolve().parent.parent / "demo" / "package"}
_LOOP_NETS = ("text_encoder", "unet_context", "unet_time", "unet", "vae_decoder")

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
    """An opened package. Safe to share between threads: requests and tables are immutable, nets stateless."""

    def __init__(
        self,
        package: Package,
        tokenizer: ClipTokenizer,
        nets: Mapping[str, Net],
        resources: ExitStack,
        backend: str,
    ) -> None:
        self.package = package
        self.backend = backend
        self._nets = nets
        self._resources = resources
        self._tokenizer = tokenizer
        self._dtype = DTYPES[nets["unet"].spec.inputs[0].dtype]

    @classmethod
    def open(
        cls, model: str | Path = "demo", *, backend: str = "auto", threads: int | None = None
    ) -> Pipeline:
        """Open the shipped model ("demo") or a package folder.

        Args:
            model: name or path.
            backend: "auto" picks the best that is present; `pipe.backend` says which.
            threads: of the CPU backend; None is every processor this process may use.

        Raises:
            PackageError: no package there, or a damaged, unsafe or newer one.
            BackendError: nothing installed can execute it.
        """
        package = Package.open(SHIPPED.get(str(model), Path(model)))
        if missing := set(_LOOP_NETS) - set(package.manifest.nets):
            raise PackageError(
                f"{package.root} has no {', '.join(sorted(missing))}",
                expected=f"the nets {', '.join(_LOOP_NETS)}",
                fix="Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE.",
            )
        tokenizer = ClipTokenizer.open(package.root / "tokenizer")
        _, engine = choose_backend(backend)
        with ExitStack() as stack:
            nets = {
                name: stack.enter_context(engine.open_net(package, name, threads=threads))
                for name in _LOOP_NETS
            }
            return cls(package, tokenizer, nets, stack.pop_all(), engine.describe())

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
        latent: Array | None = None
        for step in self._steps(request, clock, cancel):
            if callback_on_step_end is not None:
                values = {"latents": step.latent, "total": step.total}
                answer = callback_on_step_end(self, step.index, step.timestep, values)
                step.state.replace((answer or {}).get("latents", step.latent))
            latent = step.latent
        assert latent is not None  # a table has at least one row
        with clock.stage("vae_decoder"):
            images = self._finish(request, latent)
        return Result(images=images, request=request, seconds=clock.seconds, producer=self._producer())

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
        self._resources.close()

    def __enter__(self) -> Pipeline:
        """The pipeline itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # ── the stages ─────────────────────────────────────────────────────────────────────────────

    def _steps(self, request: Request, clock: Clock, cancel: Event | None) -> Iterator[Step]:
        table = make_table(request.sampler, request.num_inference_steps)
        with clock.stage("text_encoder"):
            context, row_of = self._encode(request)
        with clock.stage("invariants"):
            prompts = self._nets["unet_context"](context=context)
            invariants = {name: keys_or_values[row_of] for name, keys_or_values in prompts.items()}
            schedule = self._nets["unet_time"](timestep=table.t.astype(np.float32))
        source = NoiseSource(request.seeds, request.rng)
        shape = latent_shape(self.package.manifest, request.height, request.width)
        start = source.draw(shape) if request.latents is None else request.latents

        def predict(latent: Array, row: int) -> Array:
            if cancel is not None and cancel.is_set():
                raise CancelledError(
                    f"cancelled before step {row + 1} of {len(table)}",
                    expected="an unset cancel event",
                    fix="Call again to start over.",
                )
            rows = narrow(guidance.batch(latent, request.guided), self._dtype)  # (B, C, H/8, W/8)
            now = {name: rows_of_all[row : row + 1] for name, rows_of_all in schedule.items()}
            with clock.stage("unet"):
                prediction = self._nets["unet"](latent=rows, **invariants, **now)["prediction"]
            return guidance.combine(
                prediction, request.guidance_scale, request.guidance_rescale, request.guided
            )

        loop = denoise(table, lambda: source.draw(shape), predict, start)
        for state in clock.timed("update", loop):
            yield Step(table=table, state=state, _decode=self._decode)

    def _encode(self, request: Request) -> tuple[Array, list[int]]:
        """The context of every different text (P, T, D), and which of them each UNet row (B) has."""
        texts = (*(request.negative_prompts if request.guided else ()), *request.prompts)
        unique = list(dict.fromkeys(texts))
        tokens = self._tokenizer.encode(unique, length=self.package.manifest.max_tokens)
        for text, dropped in zip(unique, tokens.dropped, strict=True):
            if dropped:
                warnings.warn(f"the prompt {text[:40]!r}… is too long; dropped: {dropped!r}", stacklevel=4)
        context = self._nets["text_encoder"](input_ids=tokens.ids)["context"]
        return context, [unique.index(text) for text in texts]

    def _decode(self, latent: Array) -> Array:
        """(N, C, H/8, W/8) -> (N, H, W, 3) uint8."""
        decoded = self._nets["vae_decoder"](latent=narrow(latent, self._dtype))
        if not np.isfinite(decoded["mean"]).all():
            raise NumericError(
                "the decoded picture is not finite",
                expected="finite numbers",
                fix="An fp16 package may overflow: export it again with --dtype fp32.",
            )
        return decoded["image"]

    def _finish(self, request: Request, latent: Array) -> list[Image] | Array:
        if request.output_type == "latent":
            return latent
        images = self._decode(latent)  # (N, H, W, 3) uint8
        check_pictures(images)
        return images if request.output_type == "np" else [to_pil(image) for image in images]

    def _producer(self) -> dict[str, str]:
        return {
            "model": self.package.manifest.name,
            "backend": self.backend,
            "latentrt": version("latentrt"),
        }
