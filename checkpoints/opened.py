"""A checkpoint opened as it is: graphs from templates, weights where the user has them.

What is opened is a package in the cache, a few megabytes, whose weights files are elsewhere
(`engines.package.Elsewhere`). It is found by what decides it (`opening.py`), and made where it is not there
(`making.py`).

::

    <cache>/checkpoints/<digest>/              a package
    <cache>/checkpoints/<digest>/opened.json   what it was made of, for the list (`entries.py`)
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ..engines.errors import CheckpointError, StorageError, UsageError
from ..engines.package import MANIFEST, Package
from ..engines.spec import Array
from ..engines.store.folder import StoreFolder
from .controls.control_file import IP_ADAPTER, ControlFile
from .controls.image_encoder import with_image_encoder
from .controls.read import read_control
from .controls.with_base import completed
from .entries import OPENED, load_entry, remember
from .files.open import Checkpoint
from .files.source import Source
from .opening import Opening, Options, check_tokenizers
from .precision.calibration import Tokenize
from .stages import OnProgress, Progress

_MEASURES = "the ranges of fp16 are measured, once: that takes minutes for a large model"


def open_checkpoint(
    path: str | Path,
    options: Options,
    *,
    tokenize: Tokenize,
    store: Path | None = None,
    hub: str = "",
    progress: OnProgress | None = None,
    note: Callable[[str], None] | None = None,
) -> Package:
    """Open a checkpoint as a package whose weights stay where they are.

    Until the package is closed, `latentrt cache prune` leaves its folder alone.

    Args:
        path: a `.safetensors` file or a diffusers folder.
        options: how.
        tokenize: reads prompts for the ranges that fp16 graphs are measured on.
        store: the cache's folder; None is the user's own.
        hub: the model of a hub that was fetched to `path`, as the user wrote it, for the list.
        progress: called with each stage of making what is not in the cache.
        note: called with each line on what was assumed, left out, or converted.

    Raises:
        AdapterError: one of the adapters is damaged, or made for another model.
        CheckpointError: it is missing, damaged, of a family that is not supported, or of an architecture
            without a template.
        UsageError: an unknown prediction type.
        NumericError: a net's values are not finite, or beyond fp16 where that is asked for.
        StorageError: the disk is full, or an entry of the cache is a link or open to others.
    """
    source = Checkpoint.open(
        path,
        prefer_fp16=options.dtype == "fp16",
        vae=options.vae,
        tiny_vae=options.tiny_vae,
        prediction_type=options.prediction_type,
    )
    check_tokenizers(source, tokenize)
    return open_source(source, options, tokenize=tokenize, store=store, hub=hub, progress=progress, note=note)


def open_control(
    path: str | Path,
    options: Options,
    *,
    base: Package | None = None,
    store: Path | None = None,
    hub: str = "",
    progress: OnProgress | None = None,
    note: Callable[[str], None] | None = None,
) -> Package:
    """Open a control as a package of its nets, as `open_checkpoint` opens a checkpoint.

    Args:
        path: a `.safetensors` file or a diffusers folder.
        options: how.
        base: a package that `open_checkpoint` gave out, whose UNet's weights complete a ControlNet that is
            stored as a change of them: as the checkpoint has them, without adapters.
        store, hub, progress, note: as in `open_checkpoint`.

    Raises:
        CheckpointError: it is missing, damaged, no control, or of an architecture without a template; it is
            a change of another UNet, or of one that is not there; an IP-Adapter's image encoder is missing.
        UsageError: an image encoder for another kind of control.
        NumericError, StorageError: as `open_checkpoint`.
    """
    prefer_fp16 = options.dtype == "fp16"
    source = read_control(Path(path), prefer_fp16=prefer_fp16)
    if source.kind == IP_ADAPTER:
        source = with_image_encoder(source, options.image_encoder, prefer_fp16=prefer_fp16)
    elif options.image_encoder is not None:
        raise UsageError(
            f"an image encoder with {source.what}, which reads none",
            expected="an image encoder with an IP-Adapter alone",
            fix="Leave it out.",
        )
    if source.needs_base:
        source = completed(source, _base(source, base))
    return open_source(
        source, options, tokenize=_no_texts, store=store, hub=hub, progress=progress, note=note
    )


def _base(control: ControlFile, package: Package | None) -> Checkpoint:
    """The checkpoint that a package was opened from, read again; its weights are without adapters."""
    entry = None if package is None or not (package.root / OPENED).is_file() else load_entry(package.root)
    if entry is None:
        raise CheckpointError(
            f"{control.root} is {control.title}: a change of a UNet's weights, which a package that was"
            " exported has in another form",
            expected="a model that is opened from its checkpoint",
            fix="Pass the checkpoint in place of the package: Pipeline.open(CHECKPOINT), or -m CHECKPOINT",
        )
    note = entry.note
    return Checkpoint.open(
        note.path,
        prefer_fp16=note.dtype == "fp16",
        vae=Path(note.vae) if note.vae else None,
        prediction_type=note.prediction_type or None,
    )


def _no_texts(folder: Path, texts: Sequence[str], length: int) -> Array:
    raise AssertionError("no net of a control reads texts")


def open_source(
    source: Source,
    options: Options,
    *,
    tokenize: Tokenize,
    store: Path | None,
    hub: str,
    progress: OnProgress | None,
    note: Callable[[str], None] | None,
) -> Package:
    """The package of what was read; arguments and errors are those of `open_checkpoint`."""
    cache = StoreFolder(store)
    opening = Opening(source, options, cache, hub)
    lines = [*source.notes, *opening.notes()]
    with _entry(cache, opening, progress, lines.append) as (held, entry):
        package = opening.find(entry)
        if package is None:
            if (entry / MANIFEST).exists():
                lines.append(f"what was made ready before is damaged, and is made anew: {entry}")
            if note is not None and options.dtype == "fp16":
                note(_MEASURES)  # at once: the other lines can wait
            from .making import make  # which reads graphs: 0.5 s that a second opening saves

            package = make(opening, held, entry, tokenize, progress)
        else:
            remember(held, entry, opening.note(entry))
        package = replace(package, _let_go=held.use(entry.name))
    if note is not None:
        for line in lines:
            note(line)
    return package


@contextmanager
def _entry(
    cache: StoreFolder, opening: Opening, progress: OnProgress | None, note: Callable[[str], None]
) -> Generator[tuple[StoreFolder, Path]]:
    """The folder of a package in the cache, and the store that it is in; who makes the same meanwhile waits.

    Where this user cannot write the cache, the store is a folder that lasts as long as the process.
    """
    entry = cache.checkpoints / opening.digest

    def waiting(message: str) -> None:
        if progress is not None:
            progress(Progress(stage=message, index=0, total=1))

    with ExitStack() as stack:
        try:
            cache.make()
            stack.enter_context(cache.lock(entry.name, "make the checkpoint ready", waiting))
        except StorageError as error:
            if opening.find(entry) is None:  # else it was made when the cache could still be written
                note(f"the checkpoint is made ready anew each time: {error.found}")
                cache = StoreFolder(_temporary())
                cache.make()
                entry = cache.checkpoints / entry.name
        yield cache, entry


def _temporary() -> Path:
    """A folder that goes away with the process."""
    folder = Path(tempfile.mkdtemp(prefix="latentrt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
