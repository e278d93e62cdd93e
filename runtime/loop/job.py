"""A request as numbers, and what carries it out: the boundary of the loops on the host and on a device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np

from ...engines.errors import CancelledError, UsageError
from ...engines.package import Manifest, Package
from ...engines.spec import IMAGE_KEYS, Array
from ..pictures.windows import Window, Windows
from ..sampling.noise import NoiseSource
from ..sampling.table import Table

Item = TypeVar("Item")

# Every loop needs these nets. Others of a package are for some requests only.
REQUIRED = ("unet_context", "unet_time", "unet", "vae_decoder")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A picture that stays as it is outside a mask (RePaint, arXiv 2201.09865, step 8; no resampling).

    Attributes:
        latent: (N, C, h, w) float32, clean.
        noise: (N, C, h, w) float32 unit noise, that of the first state.
        mask: (N, 1, h, w) float32, 1 where the picture is repainted.
    """

    latent: Array
    noise: Array
    mask: Array

    def put_back(self, y: Array, signal: float, noise: float) -> Array:
        """`y` inside the mask; outside, the kept latent at the same noise."""
        return (1 - self.mask) * (signal * self.latent + noise * self.noise) + self.mask * y


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One of the pictures that a Union reads together, or one for each picture that is drawn.

    Attributes:
        control_type: what it is, a number below the net's types.
        hint, hint_of_row: as in `ControlJob`.
        strength: what it is multiplied with before the net.
        on: (S,) whether it is read.
    """

    control_type: int
    hint: Array
    hint_of_row: tuple[int, ...]
    strength: float
    on: Array


@dataclass(frozen=True, kw_only=True)
class ControlJob:
    """What a ControlNet adds to a job of S rows of the table and B UNet rows.

    Attributes:
        manifest: of its package.
        loop: runs its nets.
        hint: (K, 3, H, W) float32, RGB from 0 to 1, every different picture once; of a Union its first
            condition's.
        hint_of_row: (B,) the index of each UNet row's.
        scales: (S, B, R) float32, what each of its R outputs is multiplied with; zeros where it is off.
        conditions: of a Union, all that it reads; of others none.
    """

    manifest: Manifest
    loop: Loop
    hint: Array
    hint_of_row: tuple[int, ...]
    scales: Array
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeatureJob:
    """What a T2I-Adapter adds to a job of S rows of the table and B UNet rows.

    Attributes:
        call: runs its net, as `Loop.call`.
        hint: (K, 1 or 3, H, W) float32, from 0 to 1, every different picture once.
        hint_of_row: (B,) the index of each UNet row's.
        strength: what its maps are multiplied with.
        on: (S,) bool, the rows that they are added in.
    """

    call: Callable[..., dict[str, Array]]
    hint: Array
    hint_of_row: tuple[int, ...]
    strength: float
    on: Array


@dataclass(frozen=True, kw_only=True)
class ImagePromptJob:
    """What the UNet attends to besides the text: G groups of image tokens.

    Attributes:
        inputs: keys (B, G, heads, width, I) and values (B, G, heads, I, width) float32, by the names of the
            UNet's inputs.
        masks: (G, H, W) float32, 1 where each group counts and 0 elsewhere.
        on: (S, G) bool, the rows of the table that each is in.
    """

    inputs: Mapping[str, Array]
    masks: Array
    on: Array

    @property
    def groups(self) -> int:
        """G."""
        return len(self.masks)

    @property
    def tokens(self) -> int:
        """I, of a group."""
        return max(
            (keys.shape[-1] for name, keys in self.inputs.items() if name.startswith(IMAGE_KEYS)), default=1
        )


@dataclass(frozen=True, kw_only=True)
class SteeringJob:
    """What controls add to a job: nets that are called in every step, and what stays the same in all."""

    controlnets: tuple[ControlJob, ...] = ()
    features: tuple[FeatureJob, ...] = ()
    image_prompt: ImagePromptJob | None = None

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.controlnets or self.features or self.image_prompt)

    def within(self, window: Window, width: int) -> SteeringJob:
        """The same for a window of a latent of that width: with that part of all pictures."""

        def part(pictures: Array) -> Array:
            return window.of(pictures, pictures.shape[-1] // width)

        prompt = self.image_prompt
        return SteeringJob(
            controlnets=tuple(
                replace(
                    one,
                    hint=part(one.hint),
                    conditions=tuple(replace(each, hint=part(each.hint)) for each in one.conditions),
                )
                for one in self.controlnets
            ),
            features=tuple(replace(one, hint=part(one.hint)) for one in self.features),
            image_prompt=None if prompt is None else replace(prompt, masks=part(prompt.masks)),
        )


@dataclass(frozen=True, kw_only=True)
class DenoiseJob:
    """N pictures to denoise, with S rows of the table and B UNet rows a step (2N with guidance, else N).

    Attributes:
        context: (P, T, D) in the text encoders' dtype, every different text once.
        text_of_row: (B,) the index of each UNet row's text, unconditional rows first.
        table: the rows that are run.
        guided: whether half of the UNet rows are unconditional.
        guidance_scales: (S,) float32, of each row of the table. At 1 the unconditional rows are of no use,
            and the host leaves them out.
        guidance_rescale: see `denoise.guide`.
        first: (N, C, H/8, W/8) float32, the variance-preserving state that enters the first row.
        noise: draws the noise that rows add; each attempt at the job works on a fork of it.
        vectors: (B, width) float32 by name (`spec.VECTORS`), added to the time embedding.
        image_latents: (B, C', H/8, W/8) float32, channels that an inpainting UNet sees behind the latent.
        kept: what is put back outside the mask after every row.
        tile: side in pixels of the tiles in which the decoder runs; None decodes all at once.
        windows: those in which the UNet sees the latent; None is all of it at once.
        steering: what controls add to it.
    """

    context: Array
    text_of_row: tuple[int, ...]
    table: Table
    guided: bool
    guidance_scales: Array
    guidance_rescale: float
    first: Array
    noise: NoiseSource
    vectors: Mapping[str, Array] = field(default_factory=dict[str, Array])
    image_latents: Array | None = None
    kept: Kept | None = None
    tile: int | None = None
    windows: Windows | None = None
    steering: SteeringJob = field(default_factory=SteeringJob)

    def within(self, window: Window) -> DenoiseJob:
        """The job of a window of the latent, as far as its controls are concerned."""
        return replace(
            self,
            first=window.of(self.first),
            image_latents=None,
            kept=None,
            windows=None,
            steering=self.steering.within(window, self.first.shape[-1]),
        )

    def guided_at(self, row: int) -> bool:
        """Whether a row of the table needs the unconditional rows of the UNet."""
        return self.guided and float(self.guidance_scales[row]) != 1

    @property
    def pictures(self) -> int:
        """N."""
        return len(self.first)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one latent, (C, H/8, W/8)."""
        return self.first.shape[1:]

    @property
    def rows_per_step(self) -> int:
        """How many rows of `unet_time` a step has: one for all UNet rows; with vectors, one for each."""
        return len(self.text_of_row) if self.vectors else 1

    def schedule_inputs(self) -> dict[str, Array]:
        """The inputs of `unet_time`: (S, …) float32, the rows of a step side by side."""
        steps, each = len(self.table), self.rows_per_step
        timesteps = np.repeat(self.table.t.astype(np.float32), each)
        tiled = {name: np.tile(rows, (steps, 1)) for name, rows in self.vectors.items()}
        return {"timestep": timesteps, **tiled}

    def noises(self) -> Array:
        """(S, N, C, H/8, W/8) float32: the noise of each row, zero where it draws none."""
        noises = np.zeros((len(self.table), self.pictures, *self.shape), np.float32)
        source = self.noise.fork()
        for row in np.flatnonzero(self.table.draws):
            noises[row] = source.draw(self.shape)
        return noises


@dataclass(kw_only=True)
class State:
    """The loop after one row of the table. Arrays are (N, C, H/8, W/8) float32, variance-preserving.

    Attributes:
        index: of the row.
        unet_input: the state that the UNet saw.
        prediction: its output after guidance.
        latent: the state after the row; what the loop goes on with.
        profile: the profile that the UNet's engine runs with; "" on the host.
    """

    index: int
    unet_input: Array
    prediction: Array
    latent: Array
    profile: str = ""

    def replace(self, latent: Array) -> None:
        """Let the loop go on with another latent. Raises UsageError for another shape."""
        replacement = np.asarray(latent, np.float32)
        if replacement.shape != self.latent.shape:
            raise UsageError(
                f"latents of shape {replacement.shape} from a callback",
                expected=f"{self.latent.shape}",
                fix="Return the latents with the shape they came in.",
            )
        self.latent = replacement

    def denoised(self, table: Table) -> Array:
        """The clean latent x0 that the prediction stands for, solved from y = alpha * x0 + sigma * eps."""
        alpha_bar = float(table.alpha_bar[self.index])
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        y, m = self.unet_input, self.prediction
        if table.prediction_type == "epsilon":
            return (y - sigma * m) / alpha
        return alpha * y - sigma * m if table.prediction_type == "v_prediction" else m


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The result of a job.

    Attributes:
        latent: (N, C, H/8, W/8) float32, after the last row.
        image: (N, H, W, 3) uint8; None if it was not to be decoded.
        mean: (N,) float32, each picture's mean before clamping; None if it was not to be decoded.
        profile: the profile that the UNet's engine ran with, for people; "" on the host.
    """

    latent: Array
    image: Array | None
    mean: Array | None
    profile: str = ""


class Clock:
    """Adds up the seconds of a generation's stages. A stage inside another counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds counted already for stages inside the one that is running

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Count the block's time for `name`."""
        outer, self._inner, began = self._inner, 0.0, perf_counter()
        try:
            yield
        finally:
            spent = perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
            self._inner = outer + spent

    def timed(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items. The time to make each counts for `name`; the consumer's time does not."""
        while True:
            with self.stage(name):
                item = next(items, None)
            if item is None:
                return
            yield item


Run = Callable[..., Mapping[str, Array]]  # (**inputs) -> the outputs of a net


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetCall:
    """A call that is to be answered before its job goes on.

    Attributes:
        run: the UNet; calls with an equal one have the same weights.
        inputs: by name, (B, …) each; of older packages some with one row for all.
        clock: of the job, charged with what the call takes.
        check: raises CancelledError where the job is to end before this call.
    """

    run: Run
    inputs: Mapping[str, Array]
    clock: Clock
    check: Callable[[], None] = lambda: None
    _answers: list[Array] = field(default_factory=list[Array])

    @property
    def rows(self) -> int:
        """B."""
        return len(self.inputs["latent"])

    @property
    def kind(self) -> Hashable:
        """Equal for calls whose rows may be run side by side."""
        if any(len(value) != self.rows for value in self.inputs.values()):
            return id(self)
        return self.run, *((name, value.shape[1:], str(value.dtype)) for name, value in self.inputs.items())

    def answer(self, prediction: Array) -> None:
        """Give the job what it waits for, (B, C, h, w)."""
        self._answers.append(prediction)

    @property
    def prediction(self) -> Array:
        """The answer. Raises UsageError before there is one."""
        if not self._answers:
            raise UsageError(
                "a job goes on before its call of the UNet was answered",
                expected="call.answer(prediction) before the next item",
                fix="Answer every UNetCall of `Loop.unet_calls`, or take `Loop.steps`.",
            )
        return self._answers[0]


@dataclass(frozen=True)
class Stop:
    """When a generation ends early: as soon as one of `events` is set, or `seconds` are over."""

    events: tuple[Event, ...] = ()
    seconds: float | None = None
    _began: float = field(default_factory=perf_counter)

    def check(self, when: str) -> None:
        """Raise CancelledError if it is to end; `when` says what comes next."""
        if any(event.is_set() for event in self.events):
            raise CancelledError(
                f"cancelled {when}", expected="an unset cancel event", fix="Call again to start over."
            )
        if self.seconds is not None and perf_counter() - self._began > self.seconds:
            raise CancelledError(
                f"the time limit of {self.seconds:g} s was over {when}",
                expected="a picture within that time",
                fix="Pass a larger timeout, or draw fewer or smaller pictures at once.",
            )


NEVER = Stop()


class Loop(Protocol):
    """Calls nets, denoises and decodes, on the host (`denoise.py`) or on a device (`device/loop.py`)."""

    def call(self, net: str, **arrays: Array) -> dict[str, Array]:
        """Run a net outside the loop once. Raises PackageError if the package has none of that name."""
        ...

    def steps(self, job: DenoiseJob, clock: Clock, stop: Stop | None) -> Iterator[State]:
        """Yield the state after every row of the table; `stop` is looked at before each."""
        ...

    def unet_calls(self, job: DenoiseJob, clock: Clock, stop: Stop | None) -> Iterator[UNetCall | State]:
        """The same, with the calls of the UNet yielded to who answers them."""
        ...

    def draw(self, job: DenoiseJob, clock: Clock, *, decode: bool) -> Drawn:
        """Denoise and, with `decode`, decode, without yielding in between."""
        ...

    def decode(self, latent: Array, *, tile: int | None = None, stop: Stop = NEVER) -> tuple[Array, Array]:
        """Pictures of latents.

        Args:
            latent: (N, C, H/8, W/8) float32.
            tile: side in pixels of the decoder's tiles; None decodes all at once.
            stop: is looked at before every tile.

        Returns:
            (N, H, W, 3) uint8, and (N,) float32: each picture's mean before clamping, which is not finite if
            any of its values is not.
        """
        ...

    def close(self) -> None:
        """Free everything. May be called twice."""
        ...


class PackageLoop(Loop, Protocol):
    """A loop over the nets of a package, which may be asked for with other weights."""

    def use_unet(self, package: Package, net: str) -> None:
        """Run the rows of every later job with this graph of the UNet ("unet", or one that takes controls).

        The other one is closed. `package` is the loop's.

        Raises:
            BackendError: it cannot be opened, or on a device a picture is drawn at the moment.
        """
        ...

    def open_beside(self, package: Package) -> Loop:
        """A loop over all nets of another package, such as a control's, where and as this one runs its own.

        It is the caller's to close, before this one.

        Raises:
            PackageError: a graph is refused.
            BackendError: there are no engines for it.
            MemoryLimitError: it does not fit.
        """
        ...

    def adapted(self, package: Package) -> PackageLoop:
        """A loop over the same package with other `Package.changes`; nets that they leave alone are shared.

        Raises:
            BackendError: the weights of these nets cannot be changed.
        """
        ...

    @property
    def own_bytes(self) -> int:
        """What the nets of every picture take that an adapted loop does not share."""
        ...

    def open_own(self) -> None:
        """Open these now. Raises what opening a net raises."""
        ...

    def make_way(self, other: PackageLoop) -> None:
        """Free the nets that `other`, adapted from this loop, has its own of, until they are called again."""
        ...


class JobRecorder:
    """A loop that keeps the job it is to draw; the nets that prepare it are run by another loop."""

    job: DenoiseJob

    def __init__(self, loop: Loop) -> None:
        self.call, self.decode, self.close = loop.call, loop.decode, loop.close
        self.steps, self.unet_calls = loop.steps, loop.unet_calls

    def draw(self, job: DenoiseJob, clock: Clock, *, decode: bool) -> Drawn:
        """Keep the job."""
        self.job = job
        return Drawn(latent=job.first, image=None, mean=None)
