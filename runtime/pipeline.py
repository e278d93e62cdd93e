"""Prompt to picture: the one place that knows the order encode -> denoise -> decode."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, overload

import numpy as np

from ..adapters.embeddings import vocabulary_size
from ..adapters.folder import check_folder
from ..adapters.loaded import LoadedAdapters
from ..engines.backend import Place, find_backend
from ..engines.errors import UsageError
from ..engines.installed import latentrt_version
from ..engines.package import Package
from ..engines.spec import TEXT_ENCODERS, Array
from .adapted import ADAPTED_BYTES, Adapted, AdaptedLoops
from .conditioning import make_conditioning
from .embeddings import EmbeddingLibrary, Source
from .loop.calls import Pause, SharedLoop, decoded, encoded
from .loop.denoise import HostLoop
from .loop.device.cuda_graphs import Graphs
from .loop.job import (
    NEVER,
    Clock,
    DenoiseJob,
    Drawn,
    JobRecorder,
    Loop,
    PackageLoop,
    State,
    SteeringJob,
    Stop,
    UNetCall,
)
from .loop.open import LoopOptions, open_loop
from .loop.sharing import ROWS, Ended, SharedSteps, Yielded
from .model import (
    ADAPTERS,
    CONTROLS,
    EMBEDDINGS,
    Advance,
    CheckpointOptions,
    Note,
    open_control_model,
    open_model,
    shipped_of,
)
from .prompts.encode import CACHE_BYTES, TextConditioner, TextEncoder
from .prompts.tokenizer import ClipTokenizer
from .record import STEERED_BY
from .request.parameters import STARTS, OutputType, Parameters, check_number, spelled_out
from .request.request import Request, make_request
from .result import PreviewKind, Result, check_finite, finished, preview
from .sampling.noise import NoiseSource
from .sampling.table import Table
from .start import Start, make_start
from .steering.loaded import LoadedControls
from .steering.steered import naming_controls

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

_LOG = logging.getLogger(__name__)
_ON_A_CPU = LoopOptions(backend="onnxruntime")
Made = tuple["list[Image] | Array", "dict[str, Any]"]  # what a result has for images, and what made them
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

    def preview(self, kind: PreviewKind = "decoder") -> list[Image]:
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
    """An opened package. Threads may share it.

    Attributes:
        package: what was opened.
        backend: what executes it, for people.
        loop: runs its nets (`loop.job.Loop`); for measurements.
        adapters: LoRA and its relatives, which pictures may be drawn with.
        embeddings: those of textual inversion that prompts may call.
        controls: ControlNets, T2I-Adapters and IP-Adapters, which may steer pictures.
    """

    def __init__(
        self,
        package: Package,
        loop: PackageLoop,
        backend: str,
        adapters: LoadedAdapters,
        adapted: AdaptedLoops,
        embeddings: EmbeddingLibrary,
        controls: LoadedControls,
    ) -> None:
        self.package = package
        self.backend = backend
        self.loop = loop
        self.adapters = adapters
        self._adapted = adapted
        self.embeddings = embeddings
        self.controls = controls

    @classmethod
    def open(
        cls,
        model: str | Path = "demo",
        *,
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        graphs: Graphs = "auto",
        cache_bytes: int = CACHE_BYTES,
        adapted_bytes: int = ADAPTED_BYTES,
        loras: str | Path | None = None,
        checkpoint: CheckpointOptions | None = None,
        embeddings: str | Path | None = None,
        allow_unused: bool = False,
        progress: Advance | None = None,
        note: Note | None = None,
    ) -> Pipeline:
        """Open a model: the shipped one, a checkpoint as it is, or a package that was exported.

        Args:
            model: "demo", the path of a `.safetensors` file, of a diffusers folder or of a package, the name
                of a checkpoint that was opened before, or a model of a hub (`org/name`,
                `org/name@revision`), which is fetched first.
            backend: "auto" picks the best that is present; `pipe.backend` says which.
            device: "auto", "cpu", "cuda", or "cuda:N" for another than the first CUDA device;
                "openvino:GPU" and the like for what OpenVINO drives besides.
            threads: of the CPU backend; None is every processor this process may use.
            graphs: on a device, whether rows are replayed as a captured graph: "on", "off", or "auto",
                where that is faster.
            cache_bytes: what encoded prompts may take; 0 encodes every prompt anew.
            adapted_bytes: what the weights of nets may take that are open with and without adapters; at
                least those that drew last are kept. What they need beside their weights is not counted.
            loras: a folder of adapters, which pictures are drawn with by the names of the files; each is read
                when it is first asked for. `load_lora_weights` adds others. None is those of the
                shipped model that this is, or was made of.
            checkpoint: how a checkpoint is opened: its arithmetic, other autoencoders, what it predicts.
            embeddings: a folder of textual inversions, which prompts call by the names of the files; each is
                read when it is first called. `load_textual_inversion` adds others.
            allow_unused: go on where any adapter, of `loras`, of `checkpoint` or loaded later, has keys that
                the model has no weight for.
            progress: called with what is being done, how much of it is done, and of how much, while a model
                is fetched or opened for the first time.
            note: called with each line on what was assumed about a checkpoint, or left out.

        Raises:
            ModelError: no model there, or a damaged, unsafe, newer or unsupported one.
            UsageError: an option of checkpoints with a package, or embeddings that are no folder.
            BackendError: nothing installed can execute it, or there are no engines for it.
            StorageError: no room for what is fetched or made ready.
        """
        for folder in (embeddings, loras):
            check_folder(folder)  # before a model is fetched
        package = open_model(
            model,
            backend=lambda: find_backend(backend, place=Place.parse(device))[0],
            options=checkpoint or CheckpointOptions(),
            advance=progress,
            note=note,
            allow_unused=allow_unused,
        )
        shipped = shipped_of(model, package)
        options = LoopOptions(backend=backend, device=device, threads=threads, graphs=graphs)
        with ExitStack() as stack:
            stack.callback(package.close)
            loop, description = open_loop(package, options)
            stack.callback(loop.close)
            pipe = cls.over(
                package,
                loop,
                description,
                cache_bytes=cache_bytes,
                adapted_bytes=adapted_bytes,
                loras=ADAPTERS.get(shipped) if loras is None else loras,
                embeddings=EMBEDDINGS.get(shipped) if embeddings is None else embeddings,
                allow_unused=allow_unused,
                open_control=partial(
                    _open_control,
                    package,
                    options=options,
                    shipped=CONTROLS.get(shipped),
                    progress=progress,
                    note=note,
                ),
            )
            stack.pop_all()
            return pipe

    @classmethod
    def over(
        cls,
        package: Package,
        loop: PackageLoop,
        backend: str,
        *,
        cache_bytes: int = CACHE_BYTES,
        adapted_bytes: int = ADAPTED_BYTES,
        loras: str | Path | None = None,
        embeddings: str | Path | None = None,
        allow_unused: bool = False,
        open_control: Callable[[str | Path, Path | None], Package] | None = None,
    ) -> Pipeline:
        """A pipeline over a loop that is open already, and is closed with it.

        Args:
            package: whose nets the loop has.
            loop: runs them.
            backend: what executes them, for people.
            cache_bytes, adapted_bytes, loras, embeddings, allow_unused: as in `open`.
            open_control: opens a control's package, with an IP-Adapter's image encoder; by default for ONNX
                Runtime's CPU.

        Raises:
            PackageError: a tokenizer is missing or damaged.
            UsageError: `embeddings` is no folder.
        """
        nets = package.manifest.nets
        tokenizers = {
            net: ClipTokenizer.open(package.root / folder)
            for net, folder in TEXT_ENCODERS.items()
            if net in nets
        }
        vocabularies = {net: cache(partial(vocabulary_size, package, net)) for net in tokenizers}

        def conditioner(loop: Loop) -> TextConditioner:
            encoders = [
                TextEncoder(
                    run=partial(loop.call, net),
                    spec=nets[net].spec,
                    tokenizer=tokenizer,
                    net=net,
                    vocabulary=vocabularies[net],
                )
                for net, tokenizer in tokenizers.items()
            ]
            return TextConditioner(encoders, cache_bytes=cache_bytes)

        base = Adapted(loop=loop, text=conditioner(loop))
        library = EmbeddingLibrary(package, embeddings)
        adapted = AdaptedLoops(package, base, conditioner, adapted_bytes)

        def use_unet(net: str) -> None:
            adapted.forget()  # their own nets are those of the graph that goes
            loop.use_unet(package, net)

        return cls(
            package,
            loop,
            backend,
            LoadedAdapters(package, loras, allow_unused=allow_unused),
            adapted,
            library,
            LoadedControls(
                package.manifest,
                open_control or partial(_open_control, package),
                loop.open_beside,
                use_unet,
            ),
        )

    # ── adapters ───────────────────────────────────────────────────────────────────────────────────

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, *, allow_unused: bool = False
    ) -> str:
        """Read a LoRA or one of its relatives, and call it `adapter_name`, by default as its file.

        Nothing is drawn with it before it is chosen: `set_adapters`, `pipe(…, loras=…)`, `<lora:NAME:1>`.

        Args:
            path: of a `.safetensors` file.
            adapter_name: what to call it.
            allow_unused: go on where the file has keys that the model has no weight for.

        Returns:
            The name.

        Raises:
            AdapterError: a damaged file, or one for another model.
            UsageError: no path, a name that is none, or one that another adapter has.
        """
        return self.adapters.load(path, adapter_name, allow_unused=allow_unused)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = 1.0) -> None:
        """Draw with these adapters where a call does not say with which.

        Args:
            adapter_names: one or several; none is the model alone.
            adapter_weights: a strength for all or one for each: a number, or a mapping as in diffusers, with
                "unet" (a number, or "down", "mid", "up" and their blocks), "text_encoder", "text_encoder_2".

        Raises:
            UsageError: an unknown name, or a strength that is none.
        """
        self.adapters.set_usual(adapter_names, adapter_weights)

    def unload_lora_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Forget adapters of these names, or all. Raises UsageError for an unknown name."""
        self.adapters.unload(adapter_names)
        self._adapted.forget()

    def load_control(
        self, path: str | Path, name: str | None = None, *, image_encoder: str | Path | None = None
    ) -> str:
        """Open a ControlNet, a T2I-Adapter or an IP-Adapter, and call it `name`, by default as its file.

        Nothing is drawn with it before a request has a `Control`, or for an IP-Adapter an `ImagePrompt`, of
        that name: `pipe(…, controls=[…])`. From now on the model's rows run in a graph that takes controls;
        without any in a request the pictures are the same to the byte on a CPU.

        Args:
            path: a file, a diffusers folder, a model of a hub (`org/name`), or the name of one that ships
                with the model (`demo/README.md`).
            name: what to call it.
            image_encoder: an IP-Adapter's, a folder of transformers or a `.safetensors` file; by default the
                folder "image_encoder" beside it, where the published ones have it.

        Returns:
            The name.

        Raises:
            ModelError: no control there, one for another model, or an IP-Adapter without an image encoder.
            BackendError: it cannot be opened, or on a device a picture is drawn at the moment.
            UsageError: another control has that name.
        """
        return self.controls.load(path, name, image_encoder=image_encoder)

    def unload_controls(self, names: str | Sequence[str] | None = None) -> None:
        """Close controls of these names, or all. Raises as `LoadedControls.unload`."""
        self.controls.unload(names)

    def _with_adapters(self, adapters: LoadedAdapters) -> Pipeline:
        """The same pipeline, with the same open nets, that knows other adapters. To close one closes both."""
        return Pipeline(
            self.package,
            self.loop,
            self.backend,
            adapters,
            self._adapted,
            self.embeddings,
            self.controls,
        )

    # ── drawing ────────────────────────────────────────────────────────────────────────────────────

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["pil"] = "pil",
        callback_on_step_end: StepCallback | None = None,
        cancel: Event | None = None,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result[list[Image]]: ...
    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["np", "float", "latent"],
        callback_on_step_end: StepCallback | None = None,
        cancel: Event | None = None,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result[Array]: ...
    @spelled_out
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        cancel: Event | None = None,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result[Any]:
        """Draw pictures; the other keyword arguments are those of `request.parameters.Parameters`.

        Args:
            prompt: one, or several, which are one batch.
            output_type: what `Result.images` is: "pil" a list of Pillow images, "np" (N, H, W, 3) uint8,
                "float" the same from 0 to 1 (float32; diffusers' "np"), "latent" (N, C, H/8, W/8) float32.
            callback_on_step_end: `(pipe, index, timestep, {"latents": …, "total": …, "step": …})` may return
                other latents under the same name; `total` is the number of steps, `step` a `Step`.
            cancel: is looked at before every step, and before every tile of a picture in tiles.
            timeout: seconds after which it ends as if cancelled, at the same moments.
            parameters: see `latentrt generate --help`.

        Raises:
            UsageError: a parameter is unknown or out of range (SamplerError for the sampler).
            NumericError: NaN or infinity in the latent or the picture, or a picture of one colour.
            CancelledError: `cancel` was set, or the time is over.
        """
        values: Any = {**parameters, "output_type": output_type}
        request, clock = self._request(prompt, values), Clock()
        stop = _stop(cancel, timeout)
        watched = callback_on_step_end is not None or stop is not NEVER
        decode = output_type != "latent"
        with closing(self._generate(request, clock, stop, watched=watched, decode=decode)) as steps:
            images, producer = _finish(steps, partial(self._tell, callback_on_step_end))
        return Result(images=images, request=request, seconds=clock.seconds, producer=producer)

    @spelled_out
    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        cancel: Event | None = None,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> Generator[Step, None, Any]:
        """The same generation as an iterator, one item per step; close it to stop.

        The last step's `preview()` is the finished pictures. Raises as `__call__`.
        """
        request = self._request(prompt, parameters)
        return self._generate(request, Clock(), _stop(cancel, timeout), watched=True, decode=False)

    def stream_many(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        rows: int = ROWS,
        at_once: int = ROWS,
        sizes: Sequence[int] | None = None,
    ) -> Generator[tuple[int, Step | Result[Any] | Exception]]:
        """Draw many requests side by side, which share calls of the UNet whatever their parameters are.

        Each picture is the one that its request draws alone, to the byte on a CPU. Requests are of any
        samplers, steps and guidance; those of one size and with the same adapters share.

        Args:
            requests: each its "prompt", "output_type" and parameters, as `__call__` has them; the next one is
                taken when there is room.
            rows: of a call of the UNet, at most; a guided picture is two.
            at_once: requests that run side by side, at most.
            sizes: numbers of rows that calls have, in their order; None is `row_sizes`. On a device another
                number may have other roundings: with one alone, `(rows,)`, what is drawn beside a request
                changes nothing there either, and calls that are not full cost as much as full ones.

        Yields:
            The number of a request, from 0, and a step of it, or at last its result, or the exception that
            it ended with: a LatentrtError, or whatever a picture of its own has raised. The others go on.
        """
        sizes = self.row_sizes(rows) if sizes is None else sizes
        shared: SharedSteps[Step, Result[Any]] = SharedSteps(rows, sizes)
        numbered = enumerate(requests)
        with closing(shared):
            while True:
                for number, values in islice(numbered, at_once - len(shared)):
                    shared.add(number, self.shared(values))
                if not len(shared):
                    return
                for event in shared.turn():
                    number = cast(int, event.name)
                    if isinstance(event, Yielded):
                        yield number, event.item
                    elif isinstance(event, Ended):
                        yield number, event.value
                    else:
                        yield number, event.error

    def row_sizes(self, rows: int) -> tuple[int, ...]:
        """The numbers of rows that shared calls of the UNet have here, up to so many; () for any.

        A device has other plans, and perhaps other roundings, for each number, and some backends compile a
        net for each: there it is one of few.
        """
        if isinstance(self.loop, HostLoop) and not self.loop.fixed_shapes:
            return ()
        return (*(size for size in (2**power for power in range(rows.bit_length())) if size < rows), rows)

    def shared(
        self,
        values: Mapping[str, Any],
        *,
        cancel: Event | None = None,
        timeout: float | None = None,
    ) -> Generator[UNetCall | Pause | Step, None, Result[Any]]:
        """A generation whose calls of the UNet others answer: what `SharedSteps.add` takes.

        Args:
            values: its "prompt", "output_type" and parameters, as `__call__` has them.
            cancel: ends it before its next call once set.
            timeout: seconds from its first turn after which it ends so too.

        Returns:
            The result.

        Raises:
            CancelledError: by `cancel` or `timeout`.
            LatentrtError: as `__call__`, in its first turn for what is wrong with the values.
        """
        request, clock = self.request_of(values), Clock()
        decode = request.output_type != "latent"
        images, producer = yield from self._generate(
            request, clock, _stop(cancel, timeout), watched=True, decode=decode, through=SharedLoop
        )
        return Result(images=images, request=request, seconds=clock.seconds, producer=producer)

    @spelled_out
    async def stream_async(
        self,
        prompt: str | Sequence[str],
        *,
        cancel: Event | None = None,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> AsyncGenerator[Step, None]:
        """`stream` for asyncio: steps are drawn in a thread. Leaving the loop ends it within a step."""
        from asyncio import wrap_future  # 30 ms that most programs would wait for in vain
        from concurrent.futures import ThreadPoolExecutor

        left = Event()
        request = self._request(prompt, parameters)
        stop = _stop(cancel, timeout, left)
        steps = self._generate(request, Clock(), stop, watched=True, decode=False)
        thread = ThreadPoolExecutor(1)
        try:
            while (step := await wrap_future(thread.submit(next, steps, None))) is not None:
                yield step
        finally:
            left.set()
            thread.submit(steps.close)  # behind the step that is being drawn
            thread.shutdown(wait=False)

    def load_textual_inversion(
        self, source: Source | Sequence[Source], token: str | Sequence[str | None] | None = None
    ) -> None:
        """Give words of prompts the embeddings of textual inversion, for the calls that follow.

        With the prompt syntax "a1111" a word counts wherever it stands and after `embedding:`, with "comfyui"
        after `embedding:` alone, with "plain" wherever it stands exactly so. It may be loaded again.

        Args:
            source: a safetensors file; arrays as such a file has them, {"clip_l": (n, d), "clip_g": (n, d)}
                or {word: (n, d)}; or a list of these.
            token: the word, or a list of them. By default the name of the file's only tensor, where that is a
                word (diffusers), or else the file's name without its ending.

        Raises:
            CheckpointError: not an embedding, or one for other text encoders.
            UsageError: the word has another embedding already.
            PackageError: the package is so old that its text encoders know their own words alone.
        """
        self.embeddings.load(source, token)

    def unload_textual_inversion(self, token: str | Sequence[str] | None = None) -> None:
        """Forget the embeddings of these words, or of all that were loaded. A folder's files stay.

        Raises:
            UsageError: a word that was not loaded.
        """
        self.embeddings.unload(token)

    def _request(self, prompt: str | Sequence[str], parameters: Any) -> Request:
        """The request, with all that its texts name. Raises UsageError, CheckpointError."""
        request = make_request(self.package.manifest, prompt, **parameters)
        chosen = self.adapters.chosen(request.loras, request.tagged)
        self.controls.check(request.controls or ())
        return replace(self.embeddings.bind(request, chosen.words), adapters=chosen)

    def request_of(self, values: Mapping[str, Any]) -> Request:
        """What would be drawn: "prompt" and parameters as `shared` has them, checked, with every default.

        Raises:
            UsageError, CheckpointError: as `__call__`, before anything is drawn.
        """
        given = {"output_type": "pil", **values}
        return self._request(given.pop("prompt", ""), given)

    def _generate(
        self,
        request: Request,
        clock: Clock,
        stop: Stop,
        *,
        watched: bool,
        decode: bool,
        through: Callable[[Loop], Loop] = lambda loop: loop,
    ) -> Generator[Step, None, Made]:
        """Draw with what the request's adapters make of the nets. Arguments and results as of `_draw`.

        `through` gives what to run the nets with in place of their loop.
        """
        steering, steered = self.controls.job(request)  # refuses pictures before anything is opened
        chosen = request.adapters or self.adapters.chosen(request.loras, request.tagged)
        with naming_controls(steered.get(STEERED_BY, ())), ExitStack() as until_drawn:
            with clock.stage("adapters") if chosen.key else nullcontext():
                adapted = until_drawn.enter_context(self._adapted.use(chosen))
            loop = through(adapted.loop)
            images, producer = yield from self._draw(
                request, steering, loop, adapted.text, clock, stop, watched=watched, decode=decode
            )
        return images, producer | steered | chosen.record()

    def _draw(
        self,
        request: Request,
        steering: SteeringJob,
        loop: Loop,
        text: TextConditioner,
        clock: Clock,
        stop: Stop,
        *,
        watched: bool,
        decode: bool,
    ) -> Generator[Step, None, Made]:
        """The whole story: tokens -> context -> noise or a picture -> denoising loop -> pixels.

        Args:
            request: what to draw, N pictures.
            steering: what its controls add.
            loop: runs the nets.
            text: encodes prompts.
            clock: is charged with what each stage takes.
            stop: is looked at before every call of a large net.
            watched: whether anyone looks at the steps; on a device nothing else has to wait for one.
            decode: whether the latent becomes a picture.

        Yields:
            A step for each row of the schedule if it is watched; with a `SharedLoop` its calls of the UNet.

        Returns:
            What a result has for images, and what made them.
        """
        manifest = self.package.manifest
        noise, table = NoiseSource(request.seeds, request.rng), request.schedule()  # a row for each UNet call

        # tokens -> context (P, T, D), each different text once, and what joins the time embedding
        with clock.stage("text_encoder"):
            conditioning = make_conditioning(request, manifest, text, noise, loop.call)
        for prompt, dropped in conditioning.dropped.items():
            _LOG.warning("the prompt %r… is too long; dropped: %r", prompt[:40], dropped)

        # noise, or a picture with as much noise as the schedule begins with -> y (N, C, H/8, W/8)
        encode = partial(encoded, loop, request.tile, manifest.latent_scale, clock, stop)
        start = cast("Start", (yield from cast(Any, make_start(request, manifest, table, noise, encode))))

        # for each row of the table: m = guide(unet(y, t, context)), then y = a*y + sum(b_j * h_j) + c*noise
        job = DenoiseJob(
            context=conditioning.context,
            text_of_row=conditioning.text_of_row,
            vectors=conditioning.vectors,
            table=table,
            guided=request.guided,
            guidance_scales=request.guidance_scales(),
            guidance_rescale=request.guidance_rescale,
            noise=noise,
            **vars(start),
            tile=request.tile,
            windows=request.windows(manifest.latent_scale),
            steering=steering,
        )
        if watched:
            show = partial(preview, manifest=manifest, loop=loop, request=request)
            drawn = Drawn(latent=job.first, image=None, mean=None)
            for state in cast("Iterator[UNetCall | State]", loop.steps(job, clock, stop)):
                if isinstance(state, UNetCall):
                    yield cast(Any, state)  # for `stream_many`, which is told in `through`
                    continue
                yield Step(table=table, state=state, _preview=show)
                drawn = replace(drawn, latent=state.latent, profile=state.profile)
        else:
            drawn = loop.draw(job, clock, decode=decode)

        # latent -> pixels (N, H, W, 3) uint8
        producer = self._producer(drawn.profile)
        if not decode:
            return drawn.latent, producer
        image, mean = drawn.image, drawn.mean
        if image is None or mean is None:
            pauses = decoded(loop, drawn.latent, request.tile, manifest.latent_scale, clock, stop)
            image, mean = cast("tuple[Array, Array]", (yield from cast(Any, pauses)))  # see the calls above
        return finished(check_finite(image, mean, manifest.dtype), request, manifest.dtype), producer

    def prepare(self, request: Request, clock: Clock | None = None) -> DenoiseJob:
        """All that the loop is given for a request, without running it: for measurements."""
        recorders: list[JobRecorder] = []

        def record(loop: Loop) -> Loop:
            recorders.append(JobRecorder(loop))
            return recorders[0]

        steps = self._generate(request, clock or Clock(), NEVER, watched=False, decode=False, through=record)
        _finish(steps, lambda step: None)
        return recorders[0].job

    def warmup(self, **parameters: Unpack[Parameters]) -> None:
        """Run every net once at the size and batch of these parameters, so that the next call is warm."""
        starts = parameters.get("image") is not None and STARTS.fits(self.package.manifest)
        started = {"strength": 1.0} if starts else {}
        whole: Any = {"num_inference_steps": 1, "seed": 0, **started, **parameters}
        drawn = self("", output_type="latent", **whole)
        decoded = self.loop.decode(drawn.images, tile=drawn.request.tile)
        check_finite(*decoded, self.package.manifest.dtype)

    def close(self) -> None:
        """Free every net. May be called twice."""
        self._adapted.forget()
        self.controls.close()
        self.loop.close()
        self.package.close()

    def __reduce__(self) -> NoReturn:
        """Raise TypeError: an open pipeline cannot be pickled or copied."""
        raise TypeError("an open Pipeline cannot be pickled or copied: open one in each process")

    def __enter__(self) -> Pipeline:
        """The pipeline itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _tell(self, callback: StepCallback | None, step: Step) -> None:
        """Call back after a step, and go on with the latents that come back."""
        if callback is None:
            return
        # A copy: what a callback does to it counts only if it is returned.
        values = {"latents": np.array(step.latent), "total": step.total, "step": step}
        answer: Any = callback(self, step.index, step.timestep, values) or {}
        if not isinstance(answer, Mapping):
            raise UsageError(
                f"the callback returned {answer!r:.80}",
                expected="a mapping with `latents`, or None",
                fix="Return what it was called with, or nothing.",
            )
        if "latents" in answer:
            step.state.replace(cast("Mapping[str, Any]", answer)["latents"])

    def _producer(self, profile: str) -> dict[str, Any]:
        made_by: dict[str, Any] = {
            "model": self.package.manifest.name,
            "model_sha256": self.package.manifest.sha256,
            "backend": self.backend,
            "latentrt": latentrt_version(),
        }
        if self.package.opened_with:
            made_by["opened_with"] = dict(self.package.opened_with)
        if fused := self.package.manifest.fused_records():
            made_by["fused"] = fused
        return made_by | ({"profile": profile} if profile else {})


def _open_control(
    model: Package,
    path: str | Path,
    image_encoder: Path | None = None,
    options: LoopOptions = _ON_A_CPU,
    shipped: Path | None = None,
    progress: Advance | None = None,
    note: Note | None = None,
) -> Package:
    """Open a control as the model that it steers is opened."""
    backend = find_backend(options.backend, place=Place.parse(options.device))[0]
    return open_control_model(
        path,
        backend=backend,
        model=model,
        image_encoder=image_encoder,
        shipped=shipped,
        advance=progress,
        note=note,
    )


def _stop(cancel: Event | None, timeout: float | None, *events: Event) -> Stop:
    """When to end early. Raises UsageError for a limit that is no time."""
    if cancel is None and timeout is None and not events:
        return NEVER
    if timeout is not None:
        check_number("timeout", timeout, 0.0, 1e9)
    return Stop(events=(*events, cancel) if cancel else events, seconds=timeout)


def _finish(steps: Generator[Step, None, Made], each: Callable[[Step], None]) -> Made:
    """Run a generation to its end; what it returns."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            made: Made = end.value
            return made
        each(step)
