"""The adapters that a model may be drawn with, by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain, count
from pathlib import Path, PurePath
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from ..engines.errors import AdapterError, ModelError, UsageError
from ..engines.net_weights import part_shapes
from ..engines.package import Package
from ..engines.safetensors_format import read_header
from ..engines.spec import NETS
from .embeddings import Embedding, embedding_inputs, make_embedding, refuse_name
from .folder import NamedFiles, NameTakenError, check_name, check_names, check_path
from .sets import COMPONENTS, AdapterSet, Strength, check_count

if TYPE_CHECKING:
    from .binding import BoundAdapter

Lora = tuple[str, Any]  # the name of an adapter, and its strength as `Strength.parse` takes it


_OUTPUT_NAME = "ss_output_name"  # what kohya's trainers were told to call the file: A1111's usual name of it
_ENDINGS = (".safetensors",)
_NAMES = "Pass the names of adapters, as load_lora_weights returns them."
_SHORT = 12  # digits of A1111's hash
_LOG = logging.getLogger(__name__)


def _noted(path: Path) -> Mapping[str, str]:
    return read_header(path, error=AdapterError).metadata


def _noted_hash(notes: Mapping[str, str]) -> str:
    """A1111's hash, where the trainer noted it."""
    return notes.get("sshs_model_hash", "").lower()[:_SHORT]


def _each(paths: Mapping[str, Path]) -> Iterable[Path]:
    """Each file once."""
    return dict.fromkeys(paths.values())


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, list(paths)[:5]))


def unread_weights(first: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What SDXL's first text encoder has behind the last layer but one, whose output alone is used.

    No graph reads these weights, and files change them all the same: trainers know nothing of it.
    """
    layer = re.compile(r"(text_model\.encoder\.layers\.)(\d+)\.(.+)")
    found = [(match, shape) for name, shape in first.items() if (match := layer.fullmatch(name))]
    last = max((int(match[2]) for match, _ in found), default=-1)
    width = first["text_model.embeddings.token_embedding.weight"][1:]
    return {
        **{f"{m[1]}{last + 1}.{m[3]}": shape for m, shape in found if int(m[2]) == last},
        **{f"text_model.final_layer_norm.{end}": width for end in ("weight", "bias")},
    }


class LoadedAdapters:
    """Adapters that were read and fit a model, by name. Threads may share it.

    Args:
        package: the model.
        folder: of adapters, which are called as `NamedFiles` says.
        allow_unused: go on where any adapter has keys that the model has no weight for.
    """

    def __init__(
        self, package: Package, folder: str | Path | None = None, *, allow_unused: bool = False
    ) -> None:
        self._package, self._allow_unused = package, allow_unused
        self._files = NamedFiles(folder, _ENDINGS, self._bound)
        self._noted = NamedFiles(folder, _ENDINGS, _noted)
        self._loaded: dict[str, BoundAdapter] = {}
        self._further: Mapping[str, BoundAdapter | None] = {}
        self._lent: dict[str, BoundAdapter | None] = {}  # by sha256
        self._usual: tuple[Lora, ...] = ()
        self._targets: dict[str, dict[str, tuple[int, ...]]] = {}
        self._lock = Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what was loaded."""
        with self._lock:
            return tuple(self._loaded)

    @property
    def usual(self) -> tuple[Lora, ...]:
        """Those of requests that name none: (name, strength)."""
        with self._lock:
            return self._usual

    def load(self, path: str | Path, name: str | None = None, *, allow_unused: bool = False) -> str:
        """Read a file and find what it changes; nothing is drawn with it yet.

        Args:
            path: of a `.safetensors` file.
            name: what to call it; the file's name without its end by default.
            allow_unused: go on where the file has keys that the model has no weight for.

        Returns:
            The name.

        Raises:
            AdapterError: a damaged file, or one for another model.
            CheckpointError: an embedding in it is damaged.
            UsageError: no path, a name that is none, or one that another adapter has.
        """
        check_path(
            path,
            "an adapter's file",
            "the path of a .safetensors file",
            "Save it first, as safetensors.torch.save_file(TENSORS, FILE) does.",
        )
        if name is not None:
            check_name(name, "an adapter", "Pass adapter_name=NAME, or leave it out for the file's.")
        bound = self._bound(Path(path), allow_unused=allow_unused)
        name = bound.name if name is None else name
        with self._lock:
            known = self._loaded.get(name)
            if known is not None and known.sha256 != bound.sha256:
                raise NameTakenError(
                    f"another adapter is called {name!r}",
                    expected="a name of its own for each",
                    fix="Pass adapter_name=…, or unload the other one first.",
                    name=name,
                )
            self._loaded[name] = bound
        return name

    def called(self, written: str) -> str | None:
        """The name of what is written as a name, or as the folder's file with its ending; None for none."""
        with self._lock:
            known = {*self._loaded, *self._files.paths()}
        path = PurePath(written)
        bare = path.with_suffix("").as_posix() if path.suffix.lower() in _ENDINGS else written
        return next((name for name in (written, bare) if name in known), None)

    def free_name(self, name: str) -> str:
        """The name, or the first with a number behind it that neither an adapter nor a file here has."""
        with self._lock:
            taken = {*self._loaded, *self._files.paths()}
        numbered = (f"{name}-{number}" for number in count(2))
        return next(one for one in chain([name], numbered) if one not in taken)

    def unload(self, names: str | Sequence[str] | None = None) -> None:
        """Forget these, or all, and that they were the usual ones.

        Raises:
            UsageError: no name, or no adapter of that name is loaded.
        """
        given = None if names is None else check_names(names, "an adapter", _NAMES)
        with self._lock:
            gone = set(self._loaded if given is None else given)
            for name in given or ():
                if name not in self._loaded:
                    raise self._unknown(name)
            self._loaded = {name: one for name, one in self._loaded.items() if name not in gone}
            self._usual = tuple(one for one in self._usual if one[0] not in gone)

    def set_usual(self, names: str | Sequence[str], weights: Any) -> None:
        """What pictures are drawn with that say nothing of adapters.

        Args:
            names: one or several; none is the model alone.
            weights: a strength for all, or a list of one for each.

        Raises:
            UsageError: no name, an unknown one, or strengths that are none.
        """
        names = check_names(names, "an adapter", _NAMES)
        if not isinstance(weights, (list, tuple)):
            weights = [weights] * len(names)
        weights = cast("Sequence[Any]", weights)
        if len(names) != len(weights):
            raise UsageError(
                f"{len(names)} adapters and {len(weights)} strengths",
                expected="a strength for each",
                fix="Pass as many strengths as names, or one number for all.",
            )
        chosen = tuple(zip(names, weights, strict=True))
        self.chosen(chosen)
        with self._lock:
            self._usual = chosen

    def chosen(self, loras: Sequence[Lora] | None, further: Sequence[Lora] = ()) -> AdapterSet:
        """The set of these adapters, the usual ones for None, and of further ones.

        Raises:
            UsageError: an unknown name, more than MOST adapters, or a strength that is none.
            AdapterError: a file of the folder is damaged, or for another model.
        """
        with self._lock:
            loras = (*(self._usual if loras is None else loras), *further)
        check_count(loras)
        left_out = {name for name, adapter in self._further.items() if adapter is None}
        return AdapterSet(
            adapters=tuple(
                (name, self.find(name), Strength.parse(strength, self._shapes()))
                for name, strength in loras
                if name not in left_out
            ),
            tagged=sum(name not in left_out for name, _ in further),
        )

    def knowing(self, further: Mapping[str, BoundAdapter | None]) -> LoadedAdapters:
        """The same with further adapters, which go before those of the same name.

        None in place of one means that sets are without it.
        """
        other = copy(self)
        other._further = {**self._further, **further}
        return other

    def find(self, name: str) -> BoundAdapter:
        """The adapter of a name: what was loaded, a file of the folder, or what a file's trainer called it.

        Raises:
            UsageError: there is none.
            AdapterError: a file of the folder is damaged, or for another model.
        """
        if (further := self._further.get(name)) is not None:
            return further
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
        if path := self._files.find(name):
            return self._files.content(path)
        called = [one for one in _each(self._files.paths()) if self._notes(one).get(_OUTPUT_NAME) == name]
        if len(called) > 1:
            raise UsageError(
                f"{len(called)} files were called {name!r:.100} by their trainer: {_listed(called)}",
                expected="one",
                fix="Call it by its file's name.",
            )
        if called:
            return self._files.content(called[0])
        raise self._unknown(name)

    def all_names(self) -> tuple[str, ...]:
        """The names of what was loaded and of the folder's files."""
        return tuple(dict.fromkeys((*self._loaded, *self._files.paths())))

    def calls(self, name: str, adapter: BoundAdapter) -> bool:
        """Whether a name is that of the adapter."""
        with suppress(ModelError, UsageError):
            return self.find(name).sha256 == adapter.sha256
        return False

    def recorded(self, name: str, digits: str) -> BoundAdapter | None:
        """The adapter that a picture was drawn with, of that name if it is, else of any; None if it is gone.

        Args:
            name: what the picture calls it.
            digits: of its sha256, or of AUTOMATIC1111's short hash.
        """
        with suppress(ModelError, UsageError):  # another one of that name may be damaged
            if (found := self.find(name)).has_hash(digits):
                return found
        with self._lock:
            loaded = list(self._loaded.values())
        if found := next((one for one in loaded if one.has_hash(digits)), None):
            return found
        for path in self._likely(name, digits):
            with suppress(ModelError, UsageError):
                if (found := self._files.content(path)).has_hash(digits):
                    return found
        return None

    def fitting(self, other: BoundAdapter) -> BoundAdapter | None:
        """An adapter of another model for this one; None, and a line that says it, where it does not fit.

        Embeddings in its file are kept where they fit.
        """
        with self._lock:
            if other.sha256 in self._lent:
                return self._lent[other.sha256]
        try:
            found = self._bound(other.path)
        except AdapterError as error:
            words = dict[str, Embedding]()
            with suppress(ModelError):
                words = self._words(other)
            found = replace(other, changes={}, words=words, applied=0) if words else None
            _LOG.warning(
                "%s draws without the adapter %r: %s", self._package.manifest.name, other.name, error.found
            )
        with self._lock:
            self._lent[other.sha256] = found
        return found

    def _likely(self, name: str, digits: str) -> Iterator[Path]:
        """The folder's files that may have a hash, those first of which something noted says so."""

        def unlikely(path: Path) -> tuple[bool, bool]:
            notes = self._notes(path)
            return not _noted_hash(notes).startswith(digits.lower()), notes.get(_OUTPUT_NAME) != name

        for path in sorted(_each(self._files.paths()), key=unlikely):
            # what is noted is A1111's hash, so no file has to be read for another one
            if len(digits) > _SHORT or not _noted_hash(self._notes(path)) or not unlikely(path)[0]:
                yield path

    def _notes(self, path: Path) -> Mapping[str, str]:
        """What a file of the folder says of itself; nothing where it cannot be read."""
        with suppress(ModelError):
            return self._noted.content(path)
        return {}

    def _bound(self, path: Path, *, allow_unused: bool = False) -> BoundAdapter:
        # here: most pictures are drawn without
        from .binding import bind
        from .files import read_adapter

        bound = bind(read_adapter(path), self._shapes(), allow_unused=allow_unused or self._allow_unused)
        if not bound.embeddings:
            return bound
        return replace(bound, words=self._words(bound))

    def _words(self, bound: BoundAdapter) -> dict[str, Embedding]:
        """The embeddings of an adapter's file, as the package's text encoders take them."""
        inputs = embedding_inputs(self._package)
        for word in bound.embeddings:
            refuse_name(word)
        return {
            word: make_embedding(word, arrays, inputs, where=f"{bound.path}: the embedding {word!r:.60}")
            for word, arrays in bound.embeddings.items()
        }

    def _unknown(self, name: str) -> UsageError:
        known = list(self.all_names())
        near = get_close_matches(str(name), known, 3) or known[:10]
        return UsageError(
            f"no adapter is called {name!r:.100}",
            expected=f"one of {', '.join(near)}" if near else "the name of one that was loaded",
            fix="Load it first: pipe.load_lora_weights(FILE), --lora FILE, or --lora-dir FOLDER",
        )

    def _shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """The model's weights by component, read once. Raises AdapterError where they are rounded."""
        if rounded := self._package.manifest.quantised:
            raise AdapterError(
                f"the UNet is in {rounded['format']}, which no adapter changes",
                expected="a package in fp16 or fp32",
                fix="Merge it before the UNet is rounded: latentrt export CHECKPOINT -o PACKAGE --lora FILE",
            )
        with self._lock:
            if not self._targets:
                parts = {NETS[net].part for net in self._package.manifest.nets if net in NETS}
                self._targets = {
                    name: part_shapes(self._package, name) for name in COMPONENTS if name in parts
                }
                if {"text_encoder", "text_encoder_2"} <= parts:
                    self._targets["text_encoder"] |= unread_weights(self._targets["text_encoder"])
            return self._targets
