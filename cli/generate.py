"""`latentrt generate`: prompts, and perhaps a picture, become picture files."""

from __future__ import annotations

import inspect
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..engines.errors import UsageError, command
from ..runtime.request.parameters import PARAMETERS, Parameter
from .control import with_control_options
from .models import MODEL, LoraLenient, say, with_checkpoint_options
from .progress import progress_bar
from .shown import show, tell

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline
    from ..runtime.request.request import Request
    from ..runtime.result import Result


_OUTPUT = "File to write (.png, .jpg, .webp; .npy for the latents). Default: prompt and seed."
_FROM = "Draw a picture again, from what its file says; other options change it."
_REFINER_AT = "The share of the schedule at which the refiner takes over. Default: 0.8."
_PREVIEW = "Write what can be seen so far to this file, after every step."
_BACKEND = "auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx."
_LONGEST_NAME = 60  # bytes of a prompt in a file name; file systems end at 255
_THREADS = "CPU threads; at most, and by default, one for each processor that may be used."
_LORA_DIR = "Folder where --lora NAME and <lora:NAME:1> find adapters."
_EMBD_DIR = "Textual inversions: prompts call its files by name, as in `embedding:NAME`."
_NO_METADATA = "Leave prompt and parameters out of the file."


def with_parameters(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**parameters` an option for each of `PARAMETERS`.

    typer reads a command's signature; an option that was not given is None, and left to the pipeline.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(parameter))
        for name, parameter in PARAMETERS.items()
        if parameter.flags is not None
    ]
    setattr(command, "__signature__", signature.replace(parameters=[*own, *options]))  # noqa: B010
    return command


def _option(parameter: Parameter) -> Any:
    kind = parameter.kind
    option = Option(*(parameter.flags or ()), help=parameter.help, parser=kind.read, metavar=kind.metavar)
    return Annotated[list[kind.text] | None if kind.several else kind.text | None, option]


@with_checkpoint_options
@with_control_options
@with_parameters
def generate(
    prompt: Annotated[list[str] | None, Argument(help="What to draw; several prompts are one batch.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help=_OUTPUT)] = None,
    model: Annotated[str | None, Option("--model", "-m", help=MODEL)] = None,
    source: Annotated[Path | None, Option("--from", metavar="PICTURE", help=_FROM)] = None,
    refiner: Annotated[str | None, Option(help="A second package, which ends what --model begins.")] = None,
    refiner_at: Annotated[float | None, Option(help=_REFINER_AT)] = None,
    grid: Annotated[bool, Option("--grid", help="Write one file with all pictures side by side.")] = False,
    preview: Annotated[Path | None, Option(metavar="FILE", help=_PREVIEW)] = None,
    embd_dir: Annotated[Path | None, Option("--embd-dir", metavar="FOLDER", help=_EMBD_DIR)] = None,
    backend: Annotated[str, Option(help=_BACKEND)] = "auto",
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:1, openvino:GPU.")] = "auto",
    threads: Annotated[int | None, Option(help=_THREADS)] = None,
    lora_dir: Annotated[Path | None, Option("--lora-dir", "--lora-model-dir", help=_LORA_DIR)] = None,
    lora_lenient: LoraLenient = False,
    no_metadata: Annotated[bool, Option("--no-metadata", help=_NO_METADATA)] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    checkpoint: Any = None,
    controls: Any = None,
    **parameters: Any,
) -> None:
    """Draw prompts and write the pictures."""
    from ..runtime.pipeline import Pipeline

    _check_options(prompt or [], source, refiner, refiner_at)
    saver = _Saver(output, as_grid=grid, metadata=not no_metadata)
    chosen = {name: value for name, value in parameters.items() if value is not None}
    chosen["output_type"] = saver.output_type
    began = perf_counter()
    with ExitStack() as stack:
        advance = stack.enter_context(progress_bar(enabled=not as_json))
        first = model if model is not None else _model_of(source) if source else "demo"
        names = [first] if refiner is None else [first, refiner]
        open_pipe = partial(
            Pipeline.open,
            backend=backend,
            device=device,
            threads=threads,
            loras=lora_dir,
            embeddings=embd_dir,
            allow_unused=lora_lenient,
            progress=advance,
            note=say,
        )
        pipes = [stack.enter_context(open_pipe(first, checkpoint=checkpoint))]
        pipes += [stack.enter_context(open_pipe(name)) for name in names[1:]]
        if "loras" in chosen:
            chosen["loras"] = _loaded(pipes[0], chosen["loras"])
        if steering := controls(pipes[0], None if source is None else _steered(source)):
            chosen["controls"] = steering
        opened = perf_counter() - began
        advance("drawing", 0, 1)
        # Someone who looks on costs a device one wait per step.
        watched = preview is not None or (sys.stderr.isatty() and not as_json)
        callback = _on_step(advance, preview) if watched else None
        chosen["callback_on_step_end"] = callback
        if source is not None:
            result = _redraw(pipes, source, prompt or [], chosen)
        else:
            result = _draw(pipes, prompt or [], refiner_at, chosen)
    saving = perf_counter()
    paths = saver.save(result)
    if first == "demo":
        _say_what_the_demo_knows(result)
    seconds = {"open": opened, **result.seconds, "save": perf_counter() - saving}
    _report(result, paths, {**seconds, "total": perf_counter() - began}, as_json=as_json)


def _check_options(prompts: list[str], source: Path | None, refiner: str | None, at: float | None) -> None:
    """Raise UsageError for options that do not go together."""
    if not prompts and source is None:
        raise UsageError(
            "no prompt",
            expected="a prompt, or --from PICTURE",
            fix="See all that can be said: latentrt generate --help",
        )
    if source is not None and len(prompts) > 1:
        raise UsageError("several prompts with --from", expected="one, or none", fix="Draw them one by one.")
    if source is not None and at is not None:
        raise UsageError(
            "--refiner-at with --from", expected="the picture's own", fix="Leave --refiner-at out."
        )
    if refiner is None and at is not None:
        raise UsageError("--refiner-at alone", expected="a refiner", fix="Pass --refiner PACKAGE as well.")


def _loaded(pipe: Pipeline, loras: list[str | tuple[str, Any]]) -> list[str | tuple[str, Any]]:
    """The adapters by their names; those that are files are loaded first.

    What can only be meant as a file or a folder is taken for one, so that the error says what it lacks.
    """
    from ..adapters.files import file_of
    from ..checkpoints.files.component import PICKLES

    def loaded(name: str) -> str:
        path = file_of(Path(os.path.expanduser(name)))  # a home that is not known stays as it is
        if os.path.isfile(path):
            return _load(pipe, path)
        if not os.path.isdir(path) and path.suffix.lower() not in (".safetensors", *PICKLES):
            return name
        return pipe.adapters.called(name) or _load(pipe, path)

    return [loaded(one) if isinstance(one, str) else (loaded(one[0]), one[1]) for one in loras]


def _load(pipe: Pipeline, path: Path) -> str:
    """Load a file under its name; under one with a number where another file has that."""
    from ..adapters.files import name_of
    from ..adapters.folder import NameTakenError

    name = name_of(path)
    try:
        return pipe.load_lora_weights(path)
    except NameTakenError:
        free = pipe.adapters.free_name(name)
        tell(f"{path} is called {free} here, as another adapter is called {name}")
        return pipe.load_lora_weights(path, free)


def _draw(
    pipes: list[Pipeline], prompts: list[str], at: float | None, parameters: dict[str, Any]
) -> Result[Any]:
    from ..runtime.refine import refine

    first: Any = pipes[0]  # its parameters are checked where it is called
    if len(pipes) == 1:
        return first(prompts, **parameters)
    return refine(pipes[0], pipes[1], prompts, **({} if at is None else {"at": at}), **parameters)


def _say_what_the_demo_knows(result: Result[Any]) -> None:
    """Name the words of the prompts that neither the model nor what was drawn with it stands for."""
    from ..demo.shapes import unknown_words
    from ..runtime.prompts.encode import PROMPT_SYNTAXES

    request = result.request
    syntax = PROMPT_SYNTAXES[request.prompt_syntax]
    taught = {name.lower() for name in result.producer.get("adapters", ())}
    fragments = (
        one for text in dict.fromkeys(request.prompts) for one in syntax.read(text, request.embeddings)
    )
    texts = [one.text for one in fragments if one.embedding is None and not one.ends_chunk]
    if words := dict.fromkeys(word for text in texts for word in unknown_words(text) if word not in taught):
        tell(
            f"the demo model draws one coloured shape on a background, 128x128; it does not know"
            f" {', '.join(list(words)[:5])}: other pictures need a model of yours (docs/models.md)"
        )


def _redraw(pipes: list[Pipeline], source: Path, prompts: list[str], changes: dict[str, Any]) -> Result[Any]:
    from ..runtime.redraw import redraw

    base, *refiner = pipes
    if prompts:
        changes = {**changes, "prompt": prompts[0]}
    return redraw(base, source, refiner=refiner[0] if refiner else None, **changes)


def _model_of(source: Path) -> str:
    """The shipped model that drew a picture. Raises UsageError if it was another one."""
    from ..engines.package import Package
    from ..runtime.model import SHIPPED, given_options
    from ..runtime.pictures.write import read_metadata

    record = read_metadata(source).record or {}
    record = record.get("base_record", record)
    for name, folder in SHIPPED.items():
        if record.get("model_sha256") == Package.open(folder).manifest.sha256:
            return name
    raise UsageError(
        f"{source} was drawn with {record.get('model', 'a model of another program')!r}",
        expected="the model that drew it, or the one that shall draw it now",
        fix=f"Pass it: {command('--model', 'MODEL', *given_options(record.get('opened_with')))}",
    )


def _steered(source: Path) -> object:
    """What a picture's record says of its controls."""
    from ..runtime.pictures.write import read_metadata
    from ..runtime.record import STEERED_BY

    record = read_metadata(source).record or {}
    return record.get("base_record", record).get(STEERED_BY)


def _on_step(advance: Callable[[str, int, int], None], preview: Path | None) -> Callable[..., None]:
    """Move the bar, and write the pictures so far."""
    from ..runtime.pictures.write import check_target, grid, save_picture

    if preview is not None:
        check_target(preview)

    def on_step(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
        advance("denoising", index + 1, values["total"])
        if preview is not None:
            import numpy as np

            save_picture(preview, grid([np.asarray(image) for image in values["step"].preview("fast")]))

    return on_step


class _Saver:
    """Where results go: a file per picture, one for all (`as_grid`), or their latents (.npy)."""

    def __init__(self, output: Path | None, *, as_grid: bool, metadata: bool) -> None:
        from ..runtime.pictures.write import check_target

        self._output, self._as_grid, self._metadata = output, as_grid, metadata
        self._latents = output is not None and output.suffix == ".npy"
        if self._latents and as_grid:
            raise UsageError("a grid of latents", expected="a picture file", fix="Leave --grid out.")
        # before minutes of drawing
        check_target(
            Path("picture.png") if output is None else output.with_suffix(".png") if self._latents else output
        )

    @property
    def output_type(self) -> str:
        """What the pipeline is to return."""
        return "latent" if self._latents else "np" if self._as_grid else "pil"

    def save(self, result: Result[Any]) -> list[Path]:
        """Write everything; the paths, one per picture or one for all."""
        from ..runtime.pictures.write import grid, save_latents, save_picture

        request = result.request
        if self._latents:
            assert self._output is not None
            save_latents(self._output, result.images)
            return [self._output]
        if self._as_grid:
            path = self._output or _free(_stem(request.prompts[0], request.seeds[0]))
            infotext, record = (result.infotext(), result.record()) if self._metadata else (None, None)
            if record is not None and len(request.seeds) > 1:
                record["grid"] = len(request.seeds)
            with _no_empty_files([path]):
                save_picture(path, grid(result.images), infotext=infotext, record=record)
            return [path]
        paths = self._paths(request)
        with _no_empty_files(paths):
            for index, path in enumerate(paths):
                result.save(path, index, metadata=self._metadata)
        return paths

    def _paths(self, request: Request) -> list[Path]:
        """Where pictures go; several are numbered by their seeds, and by their place if seeds are equal."""
        seeds, output = request.seeds, self._output
        if output is not None and len(seeds) == 1:
            return [output]
        distinct = len(set(seeds)) == len(seeds)
        paths: list[Path] = []
        for index, (prompt, seed) in enumerate(zip(request.prompts, seeds, strict=True)):
            stem = _stem(prompt, seed) if output is None else f"{output.stem}-{seed}"
            stem = stem if distinct else f"{stem}-{index}"
            paths.append(_free(stem) if output is None else output.with_stem(stem))
        return paths


def _stem(prompt: str, seed: int) -> str:
    """A file's name after its prompt, in letters of any script."""
    letters = (
        c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", prompt)
    )
    short = (
        "-".join("".join(letters).lower().split()).encode()[:_LONGEST_NAME].decode(errors="ignore").strip("-")
        or "picture"
    )
    return f"{short}-{seed}"


@contextmanager
def _no_empty_files(paths: Sequence[Path]) -> Generator[None]:
    """Where the block fails, remove what `_free` made and nobody has written to."""
    try:
        yield
    except BaseException:
        for path in paths:
            if path.is_file() and not path.stat().st_size:
                path.unlink()
        raise


def _free(stem: str) -> Path:
    """A picture of that name, or of the first number behind it that is no file yet; made at once, and empty.

    Another command that looks for a name at the same time then takes the next.
    """
    path, numbers = Path(f"{stem}.png"), count(2)
    while True:
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            path = Path(f"{stem}-no{next(numbers)}.png")
        else:
            return path


def _report(result: Result[Any], paths: list[Path], seconds: dict[str, float], *, as_json: bool) -> None:
    request = result.request
    if as_json:
        files = paths if len(paths) == len(request.seeds) else paths * len(request.seeds)
        pictures = [{"path": str(path), **result.record(i)} for i, path in enumerate(files)]
        print(json.dumps({"pictures": pictures, "seconds": seconds}))
        return
    for path, seed in zip(paths, request.seeds, strict=False):
        show(f"{path}  ({request.width}x{request.height}, seed {seed})")
    stages = " · ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in seconds.items())
    tell(stages)
