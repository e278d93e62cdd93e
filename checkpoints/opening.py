"""A checkpoint that was read to be opened, and all that decides its package: the content of the weights,
configs and tokenizers, and the options. So a package is made once, a file that was moved is still the same,
and one that changed is another.

No graph is read here: what was opened before opens without.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..engines.errors import CheckpointError, PackageError
from ..engines.installed import latentrt_version
from ..engines.package import MANIFEST, Elsewhere, Package, common_folder
from ..engines.spec import NETS
from ..engines.store.files import check_private, storage_errors
from ..engines.store.folder import StoreFolder
from .contents import read_contents
from .controls.control_file import ControlFile
from .entries import Note, SeenFile, manifest_sha256, now
from .files.component import DOWNLOAD, TensorHeader
from .files.net_reads import net_tensors
from .files.open import Checkpoint
from .files.source import Source
from .files.tokenizers import WriteTokenizer
from .fused import Fused
from .manifest import source_facts
from .precision.calibration import Tokenize, components
from .templates.archive import SHIPPED, Dtype, archive_sha256

REVISION = 1  # of what `making.py` writes: raise it when the same checkpoint gets other graphs


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a checkpoint is opened.

    Attributes:
        dtype: the arithmetic of the graphs, "fp16" or "fp32".
        reads: safetensors' names of the types that the backend reads; weights of others are converted.
        vae, tiny_vae, prediction_type: as in `Checkpoint.open`.
        image_encoder: an IP-Adapter's; None is the one beside its file.
        templates: the archive of graphs.
        fuse: reads the adapters that become part of the weights.
    """

    dtype: Dtype
    reads: Collection[str]
    vae: Path | None = None
    tiny_vae: Path | None = None
    prediction_type: str | None = None
    image_encoder: Path | None = None
    templates: Path = SHIPPED
    fuse: Callable[[Checkpoint], Fused] = lambda source: Fused()


class Opening:
    """A checkpoint that was read, and what decides the package that is made of it.

    Attributes:
        source: the checkpoint; its weights are without adapters. Or a control, to be completed.
        fused: the adapters that become part of them.
        options: how it is opened.
        tensors: the weights that each component reads, by their names in the graphs.
        names: the weights files -> their names in the manifest.
        files: these names -> what is in the files.
    """

    def __init__(self, source: Source, options: Options, cache: StoreFolder, hub: str) -> None:
        self.options, self._hub, self.fused = options, hub, Fused()
        self.source = source
        if isinstance(source, Checkpoint):
            self.fused = options.fuse(source)
            self.source = self.fused.noted_in(source)
        self.tensors = {name: net_tensors(source, name) for name in components(source)}
        files = {header.file: name for name, header in self._headers()}
        contents = read_contents(files, cache)
        # A weights file's name in the manifest says what it is of, and need not be that of a file.
        self.names = {path: f"{files[path]}/{path.name}" for path in contents}
        self.files = {self.names[path]: content for path, content in contents.items()}

    def _headers(self) -> Iterable[tuple[str, TensorHeader]]:
        """Every tensor with its component, the last component first, so that a dict keeps the first."""
        for header in self._base.values():
            yield "unet", header
        for component, tensors in reversed(self.tensors.items()):
            for header in tensors.values():
                yield component, header

    @property
    def _base(self) -> Mapping[str, TensorHeader]:
        """The tensors of a checkpoint that a control's weights are made of; none of most sources."""
        return self.source.base if isinstance(self.source, ControlFile) else {}

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of all that decides the package: also what its graphs call the weights files."""
        folder = common_folder(content.path for content in self.files.values())
        facts = {
            "identity": self.identity,
            "latentrt": latentrt_version(),
            "files": {
                name: [content.path.relative_to(folder).as_posix(), content.sha256]
                for name, content in self.files.items()
            },
            "fused": [one.name for one in self.source.fused],
        }
        return _sha256(facts)

    @cached_property
    def identity(self) -> str:
        """The sha256 (hex) of all that decides what is drawn, whatever files and folders are called."""
        source = self.source
        return _sha256(
            {
                "revision": REVISION,
                "templates": archive_sha256(self.options.templates),
                "dtype": self.options.dtype,
                "converted": sorted(self.unread),
                "weights": {part: self._weights_sha256(part) for part in source.parts},
                "parts": {name: dict(part.config) for name, part in source.parts.items()},
                "configs": {name: dict(config) for name, config in source.configs.items()},
                **source_facts(source),
                "tokenizers": {name: _tokenizer_facts(write) for name, write in source.tokenizers.items()},
                "fused": [[one.sha256, one.strength] for one in source.fused],
            }
        )

    def _weights_sha256(self, part: str) -> str:
        """The sha256 (hex) of the content of the files that a part's weights are in."""
        used = {
            header.file
            for name, tensors in self.tensors.items()
            if NETS[name].part == part
            for header in (*tensors.values(), *self._base.values())
        }
        return _sha256(sorted({self.files[self.names[file]].sha256 for file in used}))

    @property
    def opened_with(self) -> dict[str, Any]:
        """As `Package.opened_with` has it, without the dtype, of which nobody knows here who chose it."""
        paths = {"vae": self.options.vae, "tiny_vae": self.options.tiny_vae}
        found: dict[str, Any] = {
            name: {"name": Path(os.path.abspath(path)).name, "sha256": self._weights_sha256(name)}
            for name, path in paths.items()
            if path is not None
        }
        said = {"prediction_type": self.options.prediction_type, "few_steps": self.fused.few_steps_of}
        found |= {name: value for name, value in said.items() if value}
        if self.fused.given:
            found["fused"] = [
                {"name": path.name, "sha256": one.sha256, "strength": one.strength}
                for (path, _), one in zip(self.fused.given, self.fused.adapters, strict=True)
            ]
        return found

    @cached_property
    def unread(self) -> dict[str, list[str]]:
        """The components whose weights the backend does not read -> the types that it does not."""
        found = {
            name: sorted({header.dtype for header in tensors.values()} - set(self.options.reads))
            for name, tensors in self.tensors.items()
        }
        return {name: types for name, types in found.items() if types}

    @cached_property
    def copied(self) -> frozenset[str]:
        """The components whose weights the cache has a copy of: not read as they are, or not in any file."""
        return frozenset((*self.unread, *self.fused.touched(self.source), *self._made()))

    def _made(self) -> Iterable[str]:
        """The components of a control some of whose weights are computed."""
        made = self.source.made.keys() if isinstance(self.source, ControlFile) else set[str]()
        return (name for name, tensors in self.tensors.items() if made & tensors.keys())

    def notes(self) -> list[str]:
        """Lines for the user: on the adapters, and on each component that the cache has a copy of."""
        converted = [
            f"{name}: weights of the type {', '.join(types)} are converted to {self.options.dtype} in the"
            " cache: the backend does not read them"
            for name, types in self.unread.items()
        ]
        of_what = "that it and the checkpoint make" if self._base else "with the adapters in them"
        merged = [
            f"{name}: the weights {of_what} are in the cache"
            for name in sorted(self.copied - self.unread.keys())
        ]
        return [*self.fused.notes, *converted, *merged]

    def note(self, entry: Path) -> Note:
        """What the list of opened checkpoints says of a package that was opened now."""
        options = self.options
        return Note(
            name=self.source.name,
            family=self.source.family,
            control=self.source.kind if isinstance(self.source, ControlFile) else "",
            dtype=options.dtype,
            path=os.path.abspath(self.source.root),
            hub=self._hub,
            vae=os.path.abspath(options.vae) if options.vae else "",
            tiny_vae=os.path.abspath(options.tiny_vae) if options.tiny_vae else "",
            prediction_type=options.prediction_type or "",
            fused=[[str(path), strength] for path, strength in self.fused.given],
            few_steps=self.fused.few_steps_of,
            files={
                name: SeenFile(path=str(content.path), size=content.size, mtime_ns=content.mtime_ns)
                for name, content in self.files.items()
            },
            manifest=manifest_sha256(entry),
            created=now(),
        )

    def find(self, entry: Path) -> Package | None:
        """The package in the cache, if it is there. Raises StorageError if others could have changed it."""
        if not (entry / MANIFEST).is_file():
            return None
        with storage_errors(entry, f"{entry} cannot be read"):
            check_private(entry, entry.lstat(), stat.S_IFDIR)
        try:
            return self.package(entry)
        except PackageError:  # damaged: it is made anew
            return None

    def package(self, entry: Path) -> Package:
        """The package in an entry, called as the checkpoint is called now. Raises PackageError."""
        found = Package.open(entry, elsewhere=self.places)
        manifest = replace(found.manifest, name=self.source.name)
        return replace(found, manifest=manifest, opened_with=self.opened_with)

    @property
    def places(self) -> dict[str, Elsewhere]:
        """Where the weights files are, by their names in the manifest."""
        return {name: content.elsewhere for name, content in self.files.items()}


def check_tokenizers(source: Source, tokenize: Tokenize) -> None:
    """Raise CheckpointError for a folder's tokenizer that cannot be read, before anything else is done."""
    for write in source.tokenizers.values():
        folder = _settings(write).get("folder")
        if folder is None:  # it is written, not copied
            continue
        try:
            tokenize(folder, [""], 77)
        except PackageError as error:
            fix = f"Take the tokenizer's folder as it was published. {DOWNLOAD}"
            raise CheckpointError(error.found, expected=error.expected, fix=fix) from error


def _sha256(facts: object) -> str:
    # Not `canonical_sha256`: schedulers' configs may hold "-Infinity".
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tokenizer_facts(write: WriteTokenizer) -> object:
    """What decides the files that a tokenizer's writer writes: its settings, and what it copies."""
    return {
        name: _files_facts(value) if isinstance(value, Path) else value
        for name, value in _settings(write).items()
    }


def _settings(write: WriteTokenizer) -> dict[str, Any]:
    return getattr(write, "keywords", {})


def _files_facts(folder: Path) -> list[list[str]]:
    """The name and the sha256 (hex) of every file in a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
