"""The denoising loop on the host. Every sampler is a table (docs/samplers.md); these lines run any."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from threading import Lock

import numpy as np

from ...engines.backend import HostBackend, Net
from ...engines.errors import BackendError, NumericError, numeric_fix
from ...engines.net_weights import engine_bytes, net_tensors
from ...engines.package import Manifest, Package
from ...engines.processors import usable_processors
from ...engines.spec import DTYPES, FLOAT_TYPES, TEXT_ENCODERS, Array, has_time_of_each_row
from ...engines.spilled import available_bytes
from ..pictures.tiling import decode_tiled
from ..pictures.windows import Window, Windows, blend
from ..sampling.table import Table
from .calls import Predict, answered
from .controls import HostControls, added_inputs, refuse_unloaded
from .job import NEVER, REQUIRED, Clock, DenoiseJob, Drawn, Kept, PackageLoop, Run, State, Stop, UNetCall

_WHILE_OPENED = 2  # times its weights is what a net takes then, at most
_WIDENED = 4  # times as many bytes as stored, at most: fp8 that is computed with in fp32
# NumPy would only warn; the loop checks the result and says in which step it happened.
_overflow_is_found_below = partial(np.errstate, over="ignore", invalid="ignore")


def denoise(
    table: Table,
    noise: Callable[[], Array],
    predict: Predict,
    first: Array,
    kept: Kept | None = None,
    dtype: str = "fp16",
) -> Iterator[UNetCall | State]:
    """Run the table; yields a state for each row, the final latent last, and before each its calls.

    Args:
        table: one row per UNet call.
        noise: draws unit noise (N, C, h, w) float32, continuing each picture's own stream.
        predict: the guided UNet.
        first: (N, C, h, w) float32, the variance-preserving state that enters the first row.
        kept: what is put back outside the mask after every row.
        dtype: the package's, for the error's advice.

    Raises:
        NumericError: the state is no longer finite.
    """
    y = first
    history: list[Array] = []
    for i, row in enumerate(table.rows()):
        unet_input, m = y, (yield from predict(y, i))
        with _overflow_is_found_below():
            history = [row.p * y + row.q * m, *history[: table.history - 1]]
            y = row.a * y + sum(b * h for b, h in zip(row.b, history, strict=False) if b)
            if row.draws:
                y = y + row.c * noise()
            if kept is not None:
                y = kept.put_back(y, *row.keep)
        check_finite(y, f"after step {i + 1} of {len(table)}", dtype)
        state = State(index=i, unet_input=unet_input, prediction=m, latent=y)
        yield state
        y = state.latent


Call = Callable[..., Mapping[str, Array]]  # (net, **arrays) -> its outputs, as `Loop.call`


class UNetCalls:
    """The guided UNet of a job whose nets are called with arrays: a `Predict`.

    Where the job has windows, each is a call, and what is guided is their mean (`pictures.windows`). A row of
    the table is affine in the prediction, so this is the mean of the windows' steps.

    Args:
        job: what is drawn.
        manifest: of the package whose nets are called.
        call: runs one of them.
        clock: is charged with what each stage takes.
        stop: is looked at before every call of the UNet.
        unet: which graph of the UNet is run ("unet", or one that takes controls).
        run: runs it.
    """

    def __init__(
        self, job: DenoiseJob, manifest: Manifest, call: Call, clock: Clock, stop: Stop, unet: str, run: Run
    ) -> None:
        self._job, self._clock, self._stop, self._run = job, clock, stop, run
        self._dtype = DTYPES[FLOAT_TYPES[manifest.dtype]]
        rows, columns = job.shape[1:]
        self._windows = (job.windows or Windows(side=max(rows, columns), overlap=0)).over(rows, columns)
        self._each = job.rows_per_step
        behind = {} if job.image_latents is None else {"image_latents": job.image_latents}
        with clock.stage("invariants"):
            keys_and_values = call("unet_context", context=job.context)
            self._constant = {name: texts[list(job.text_of_row)] for name, texts in keys_and_values.items()}
            self._schedule = call("unet_time", **job.schedule_inputs())
            self._behind = [
                {name: narrow(window.of(values), self._dtype) for name, values in behind.items()}
                for window in self._windows
            ]
        spec = manifest.net(unet).spec
        self._controls: list[HostControls] = []
        if added_inputs(spec):
            with clock.stage("controls"):
                self._controls = [HostControls(job.within(window), spec) for window in self._windows]
        elif job.steering:
            refuse_unloaded()
        if self._each == 1 and has_time_of_each_row(spec):
            self._each = len(job.text_of_row)  # all rows of this job are at one timestep
            self._schedule = {
                name: np.repeat(rows, self._each, axis=0) for name, rows in self._schedule.items()
            }

    def __call__(self, latent: Array, row: int) -> Generator[UNetCall, None, Array]:
        """The guided prediction (N, C, h, w) float32 for a state, at a row of the table."""
        job = self._job
        parts: list[Array] = []
        for number, window in enumerate(self._windows):
            yield (call := self._of_window(latent, row, number, window))
            parts.append(call.prediction)
        prediction = blend(self._windows, parts)
        return guide(prediction, job.guidance_scales[row], job.guidance_rescale, job.guided_at(row))

    def _of_window(self, latent: Array, row: int, number: int, window: Window) -> UNetCall:
        """The call for a window of the state. Raises CancelledError.

        It predicts (B, C, h, w); (N, C, h, w) at a row that is not guided.
        """
        check = partial(self._stop.check, f"before step {row + 1} of {len(self._job.table)}")
        check()
        batch = narrow(guided_batch(window.of(latent), self._job.guided), self._dtype)  # (B, C, h, w)
        times = slice(row * self._each, (row + 1) * self._each)
        inputs = {
            "latent": batch,
            **self._constant,
            **{name: rows[times] for name, rows in self._schedule.items()},
            **self._behind[number],
        }
        if self._controls:
            with self._clock.stage("controls"):
                inputs |= self._controls[number].inputs(batch, row)
        if self._job.guided and not self._job.guided_at(row):
            inputs = conditional_rows(inputs, self._job.pictures)
        return UNetCall(run=self._run, inputs=inputs, clock=self._clock, check=check)


def steps_of_calls(
    job: DenoiseJob, manifest: Manifest, call: Call, clock: Clock, stop: Stop | None, unet: str, run: Run
) -> Iterator[UNetCall | State]:
    """Yield the state after every row of the table, and before it the calls of the UNet that it takes.

    Arguments are those of `UNetCalls`. Raises CancelledError, NumericError.
    """
    predict = UNetCalls(job, manifest, call, clock, stop or NEVER, unet, run)
    source = job.noise.fork()
    states = denoise(job.table, lambda: source.draw(job.shape), predict, job.first, job.kept, manifest.dtype)
    yield from clock.timed("update", states)


class HostLoop:
    """Implements `job.Loop`: nets are called with arrays, everything between them is NumPy.

    Threads may share it: all that changes is which nets are open, under a lock.

    A net is opened when it is first called.

    Args:
        package: whose nets are run.
        backend: opens them.
        threads: of the backend; None is one for every processor this process may use.
        base: runs the nets that `package.changes` leave as they are.
    """

    def __init__(
        self, package: Package, backend: HostBackend, threads: int | None, base: HostLoop | None = None
    ) -> None:
        self.nets: dict[str, Net] = {}
        self.fixed_shapes = bool(getattr(backend, "fixed_shapes", False))
        self._package, self._backend, self._threads, self._base = package, backend, threads, base
        self._open = partial(backend.open_net, package, threads=threads)
        self._weights_of: dict[str, frozenset[str]] = {} if base is None else base._weights_of
        self._lock = Lock()
        self._unet = "unet"
        self._closed = False
        self._dtype = DTYPES[FLOAT_TYPES[package.manifest.dtype]]

    def open_beside(self, package: Package) -> HostLoop:
        """See `job.PackageLoop`; its nets are opened when they are first called."""
        return HostLoop(package, self._backend, self._threads)

    def adapted(self, package: Package) -> HostLoop:
        """See `job.Loop`."""
        return HostLoop(package, self._backend, self._threads, base=self)

    @property
    def unet(self) -> str:
        """The graph of the UNet that runs rows."""
        return self._unet if self._base is None else self._base.unet

    def use_unet(self, package: Package, net: str) -> None:
        """See `job.PackageLoop`. A graph that is between the steps of a picture is freed behind it."""
        assert self._base is None, "adapted loops run the graph of their base"
        if net != self._unet:
            self.net(net)
            with self._lock:
                self.nets.pop(self._unet, None)
                self._unet = net

    def changes(self, name: str) -> bool:
        """Whether a net computes with other weights than the package stores."""
        if not self._package.changes:
            return False
        if name not in self._weights_of:
            self._weights_of[name] = frozenset(net_tensors(self._package, name))
        changed = self._package.changes_of(name)
        return not self._weights_of[name].isdisjoint(changed)

    def open_own(self) -> None:
        """See `job.Loop`."""
        self.open_nets(self._own)

    @property
    def own_bytes(self) -> int:
        """See `job.Loop`."""
        return self._own_bytes

    @cached_property
    def _own_bytes(self) -> int:
        return sum(engine_bytes(self._package, name) for name in self._own)

    def make_way(self, other: PackageLoop) -> None:
        """See `job.Loop`. A net that is in a call, or between the steps of a picture, is freed behind it."""
        assert isinstance(other, HostLoop)
        with self._lock:
            for name in other._own:
                self.nets.pop(name, None)

    @cached_property
    def _own(self) -> tuple[str, ...]:
        """The nets of every picture that compute with other weights than the package stores."""
        nets = self._package.manifest.nets
        usual = (self.unet if name == "unet" else name for name in (*TEXT_ENCODERS, *REQUIRED))
        return tuple(name for name in usual if name in nets and self.changes(name))

    def net(self, name: str) -> Net:
        """A net, opened on first use. Raises PackageError if there is none, BackendError once closed."""
        if self._base is not None and not self.changes(name):
            return self._base.net(name)
        with self._lock:
            if self._closed:
                raise BackendError(
                    f"the net {name!r} was called after its pipeline was closed",
                    expected="an open pipeline",
                    fix="Call it inside the `with` block.",
                )
            if name not in self.nets:
                self._package.manifest.net(name)
                self.nets[name] = self._open(name)
            return self.nets[name]

    def open_nets(self, names: Sequence[str]) -> None:
        """Open these now, so that the first picture does not wait for them.

        Side by side, as a large net takes seconds of one processor; where memory is short one after the
        other, the largest first, as each takes more while it is opened than afterwards.

        Raises:
            LatentrtError: what the backend raises for the first net that does not open.
        """
        short = self._is_short(names)
        if short:
            names = sorted(names, key=partial(engine_bytes, self._package), reverse=True)
        with ThreadPoolExecutor(1 if short else usable_processors()) as pool:
            opening = [pool.submit(self._open, name) for name in names]
        with self._lock:
            for name, opened in zip(names, opening, strict=True):
                if opened.exception() is None:
                    self.nets[name] = opened.result()
        for opened in opening:
            opened.result()

    def _is_short(self, names: Sequence[str]) -> bool:
        """Whether these nets, opened side by side, might take more memory than there is."""
        manifest, available = self._package.manifest, available_bytes()
        files = {weights for name in names for weights in manifest.nets[name].weights}
        # Counting reads the graphs, so a look at the files' sizes comes first.
        stored = sum(manifest.files[weights].size for weights in files)
        if available is None or available > _WHILE_OPENED * _WIDENED * stored:
            return False
        return available < _WHILE_OPENED * sum(engine_bytes(self._package, name) for name in names)

    def call(self, net: str, **arrays: Array) -> dict[str, Array]:
        """Run one net once; see `job.Loop`."""
        return self.net(net)(**arrays)

    def unet_calls(self, job: DenoiseJob, clock: Clock, stop: Stop | None) -> Iterator[UNetCall | State]:
        """See `job.Loop`. Raises CancelledError, NumericError."""
        name = self.unet
        unet = self.net(name)  # kept between the steps, also where another set of adapters takes its place
        yield from steps_of_calls(job, self._package.manifest, self.call, clock, stop, name, unet)

    def steps(self, job: DenoiseJob, clock: Clock, stop: Stop | None) -> Iterator[State]:
        """Yield the state after every row of the table. Raises CancelledError, NumericError."""
        yield from answered(self.unet_calls(job, clock, stop))

    def draw(self, job: DenoiseJob, clock: Clock, *, decode: bool) -> Drawn:
        """Denoise and decode; see `job.Loop`."""
        *_, last = self.steps(job, clock, None)
        if not decode:
            return Drawn(latent=last.latent, image=None, mean=None)
        with clock.stage("vae_decoder"):
            image, mean = self.decode(last.latent, tile=job.tile)
        return Drawn(latent=last.latent, image=image, mean=mean)

    def decode(self, latent: Array, *, tile: int | None = None, stop: Stop = NEVER) -> tuple[Array, Array]:
        """Pictures of latents; see `job.Loop`."""

        def whole(part: Array) -> tuple[Array, Array]:
            stop.check("before the decoder")
            decoded = self.call("vae_decoder", latent=narrow(part, self._dtype))
            return decoded["image"], decoded["mean"]

        if tile is None:
            return whole(latent)
        return decode_tiled(whole, latent, tile, self._package.manifest.latent_scale)

    def close(self) -> None:
        """Free every net. May be called twice."""
        with self._lock:
            self._closed = True
            for net in self.nets.values():
                net.close()


def guided_batch(rows: Array, guided: bool) -> Array:
    """(N, …) -> (B, …): the UNet's rows, with guidance each picture twice (unconditional rows first)."""
    return np.concatenate([rows, rows]) if guided else rows


def conditional_rows(inputs: Mapping[str, Array], pictures: int) -> dict[str, Array]:
    """The last N rows of a guided call's inputs, (2N, …) each; what older packages have once stays."""
    return {name: value[pictures:] if len(value) == 2 * pictures else value for name, value in inputs.items()}


def guide(prediction: Array, scale: float, rescale: float, guided: bool) -> Array:
    """One prediction per picture from the rows of a UNet call.

    Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, in the form u + scale * (c - u); with
    `rescale` > 0 the result's standard deviation is drawn towards that of the conditional rows
    (Lin et al. 2023, arXiv 2305.08891, eqs. 14 to 16).

    Args:
        prediction: (B, C, H/8, W/8), any float dtype; B = 2N if guided, else N.
        scale: guidance scale.
        rescale: phi, 0 to 1.
        guided: whether the first half of the rows is unconditional.

    Returns:
        (N, C, H/8, W/8) float32.
    """
    rows = prediction.astype(np.float32, copy=False)
    if not guided:
        return rows
    half = len(rows) // 2
    unconditional, conditional = rows[:half], rows[half:]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the loop checks the result
        combined: Array = unconditional + scale * (conditional - unconditional)
        if rescale:
            axes = tuple(range(1, rows.ndim))
            # ddof=1 as torch.std, which diffusers uses
            wanted: Array = np.std(conditional, axes, ddof=1, keepdims=True)
            found: Array = np.std(combined, axes, ddof=1, keepdims=True)
            combined = combined * (rescale * (wanted / found) + (1 - rescale))
    return combined


def check_finite(latent: Array, when: str, dtype: str) -> None:
    """Raise NumericError if a latent, (N, C, H/8, W/8), holds NaN or infinity; `dtype` is the package's."""
    if not np.isfinite(latent).all():
        raise NumericError(
            f"the latent is not finite {when}",
            expected="finite numbers",
            fix=numeric_fix(dtype),
        )


def narrow(latent: Array, dtype: type[np.generic]) -> Array:
    """The latent in a net's dtype. What fp16 cannot hold becomes infinity, and shows in the net's output."""
    with np.errstate(over="ignore"):
        return latent.astype(dtype, copy=False)
