"""A checkpoint opened as it is: graphs from templates, weights where the user has them.

What is opened is a package in the cache, a few megabytes, whose weights files are elsewhere
(`engines.package.Elsewhere`). It is found by what decides it: the content of the weights, configs and
tokenizers, and the options. So it is made once, a file that was moved is still the same, and one that changed
is another.

::

    <cache>/checkpoints/<digest>/              a package
    <cache>/checkpoints/<digest>/opened.json   what it was made of, for the list (`entries.py`)
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..engines.errors import PackageError, StorageError
from ..engines.installed import latentrt_version
from ..engines.package import MANIFEST, Elsewhere, Package, common_folder
from ..engines.safetensors_format import ITEM_SIZES
from ..engines.store.files import check_private, storage_errors
from ..engines.store.folder import StoreFolder
from .beside import beside, put
from .contents import Content, read_contents
from .entries import Note, SeenFile, manifest_sha256, now, remember, write_note
from .files.component import TensorHeader
from .files.net_reads import net_tensors
from .files.open import Checkpoint
from .files.tokenizers import WriteTokenizer
from .graphs.weights import attach, places
from .manifest import request_defaults
from .precision.calibration import Tokenize, components
from .stages import OnProgress, Progress
from .templates.archive import SHIPPED, Dtype, archive_sha256
from .writing import TemplateGraphs, copy_weights, weight_types, write_package

_MEASURES = "the ranges of fp16 are measured, once: that takes minutes for a large model"
REVISION = 1  # of what is written here: raise it when the same checkpoint gets other graphs
_STORED = {"fp16": "F16", "fp32": "F32"}
_GRAPHS_BYTES = 10_000_000  # what an entry takes at most without converted weights


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a checkpoint is opened.

    Attributes:
        dtype: the arithmetic of the graphs, "fp16" or "fp32".
        reads: safetensors' names of the types that the backend reads; weights of others are converted.
        vae, tiny_vae, prediction_type: as in `Checkpoint.open`.
        templates: the archive of graphs.
    """

    dtype: Dtype
    reads: Collection[str]
    vae: Path | None = None
    tiny_vae: Path | None = None
    prediction_type: str | None = None
    templates: Path = SHIPPED


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

    Args:
        path: a `.safetensors` file or a diffusers folder.
        options: how.
        tokenize: reads prompts for the ranges that fp16 graphs are measured on.
        store: the cache's folder; None is the user's own.
        hub: the model of a hub that was fetched to `path`, as the user wrote it, for the list.
        progress: called with each stage of making what is not in the cache.
        note: called with each line on what was assumed, left out, or converted.

    Raises:
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
    cache = StoreFolder(store)
    opening = _Opening(source, options, cache, hub)
    lines = [*source.notes, *opening.conversions()]
    with _entry(cache, opening, progress, lines.append) as (held, entry):
        package = opening.find(entry)
        if package is None:
            if note is not None and options.dtype == "fp16":
                note(_MEASURES)  # at once: the other lines can wait
            package = opening.make(held, entry, tokenize, progress)
        else:
            remember(held, entry, opening.note(entry))
    if note is not None:
        for line in lines:
            note(line)
    return package


@contextmanager
def _entry(
    cache: StoreFolder, opening: _Opening, progress: OnProgress | None, note: Callable[[str], None]
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


def _tokenizer_facts(write: WriteTokenizer) -> object:
    """What decides the files that a tokenizer's writer writes: its settings, and what it copies."""
    settings: dict[str, Any] = getattr(write, "keywords", {})
    return {
        name: _files_facts(value) if isinstance(value, Path) else value for name, value in settings.items()
    }


def _files_facts(folder: Path) -> list[list[str]]:
    """The name and the sha256 (hex) of every file in a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]


class _Opening:
    """A checkpoint that was read and is not yet a package, and its `Weights`: they stay where they are."""

    def __init__(self, source: Checkpoint, options: Options, cache: StoreFolder, hub: str) -> None:
        self._source, self._options, self._hub = source, options, hub
        self._tensors = {name: net_tensors(source, name) for name in components(source)}
        files = {header.file: name for name, header in self._headers()}
        contents = read_contents(files, cache)
        # A weights file's name in the manifest says what it is of, and need not be that of a file.
        self._names = {path: f"{files[path]}/{path.name}" for path in contents}
        self._files = {self._names[path]: content for path, content in contents.items()}

    def _headers(self) -> Iterable[tuple[str, TensorHeader]]:
        """Every tensor with its component, the last component first, so that a dict keeps the first."""
        for component, tensors in reversed(self._tensors.items()):
            for header in tensors.values():
                yield component, header

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of all that decides the package."""
        source = self._source
        folder = common_folder(content.path for content in self._files.values())
        facts = {
            "revision": REVISION,
            "latentrt": latentrt_version(),
            "templates": archive_sha256(self._options.templates),
            "dtype": self._options.dtype,
            "converted": sorted(self._unread),
            "name": source.name,
            "files": {
                name: [content.path.relative_to(folder).as_posix(), content.sha256]
                for name, content in self._files.items()
            },
            "parts": {name: dict(part.config) for name, part in source.parts.items()},
            "configs": {name: dict(config) for name, config in source.configs.items()},
            "defaults": vars(request_defaults(source)),
            "zero_empty_prompt": source.zero_empty_prompt,
            "tokenizers": {name: _tokenizer_facts(write) for name, write in source.tokenizers.items()},
        }
        # Not `canonical_sha256`: schedulers' configs may hold "-Infinity".
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _unread(self) -> dict[str, list[str]]:
        """The components whose weights the backend does not read -> the types that it does not."""
        found = {
            name: sorted({header.dtype for header in tensors.values()} - set(self._options.reads))
            for name, tensors in self._tensors.items()
        }
        return {name: types for name, types in found.items() if types}

    def conversions(self) -> list[str]:
        """A line for each component that is converted."""
        return [
            f"{name}: weights of the type {', '.join(types)} are converted to {self._options.dtype} in the"
            " cache: the backend does not read them"
            for name, types in self._unread.items()
        ]

    def note(self, entry: Path) -> Note:
        """What the list of opened checkpoints says of a package that was opened now."""
        options = self._options
        return Note(
            name=self._source.name,
            family=self._source.family,
            dtype=options.dtype,
            path=os.path.abspath(self._source.root),
            hub=self._hub,
            vae=os.path.abspath(options.vae) if options.vae else "",
            tiny_vae=os.path.abspath(options.tiny_vae) if options.tiny_vae else "",
            prediction_type=options.prediction_type or "",
            files={
                name: SeenFile(path=str(content.path), size=content.size, mtime_ns=content.mtime_ns)
                for name, content in self._files.items()
            },
            manifest=manifest_sha256(entry),
            created=now(),
        )

    def _room(self) -> str:
        """What an entry takes on the disk, for whoever has no room for it."""
        size = _GRAPHS_BYTES + ITEM_SIZES[_STORED[self._options.dtype]] * sum(
            prod(header.shape) for name in self._unread for header in self._tensors[name].values()
        )
        return f"{size / 1e6:.0f} MB: the graphs{' and converted weights' if self._unread else ''}"

    def find(self, entry: Path) -> Package | None:
        """The package in the cache, if it is there. Raises StorageError if others could have changed it."""
        if not (entry / MANIFEST).is_file():
            return None
        with storage_errors(entry, f"{entry} cannot be read"):
            check_private(entry, entry.lstat(), stat.S_IFDIR)
        try:
            return Package.open(entry, elsewhere=self._places)
        except PackageError:  # damaged: it is made anew
            return None

    @property
    def elsewhere(self) -> Mapping[str, Content]:
        """The user's files, by their names in the manifest."""
        return self._files

    @property
    def _places(self) -> dict[str, Elsewhere]:
        return {name: content.elsewhere for name, content in self._files.items()}

    def make(
        self, cache: StoreFolder, entry: Path, tokenize: Tokenize, progress: OnProgress | None
    ) -> Package:
        """Write the package into the cache."""
        dtype = self._options.dtype
        graphs = TemplateGraphs(self._source, dtype, self._options.templates)
        failed = partial(
            storage_errors, cache.root, f"{self._source.root} cannot be made ready", room=self._room()
        )
        with failed(), beside(entry) as folder, failed():  # the inner one still sees what was written
            write_package(
                self._source,
                folder,
                graphs=graphs,
                weights=self,
                dtype=dtype,
                tokenize=tokenize,
                progress=progress,
            )
            write_note(folder, self.note(folder))
            put(folder, entry, folder)
        return Package.open(entry, elsewhere=self._places)

    def attach(self, component: str, model: ir.Model, folder: Path) -> list[str]:
        """Give a graph its weights, in the user's files or converted; their names in the manifest."""
        tensors = self._tensors[component]
        if component in self._unread:
            return copy_weights(component, model, folder, tensors, weight_types(model, tensors))
        attach(model, places(tensors))
        return list(dict.fromkeys(self._names[header.file] for header in tensors.values()))
