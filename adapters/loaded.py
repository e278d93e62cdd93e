"""The adapters that a model may be drawn with, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..engines.errors import UsageError
from ..engines.net_weights import part_shapes
from ..engines.package import Package
from ..engines.spec import NETS
from .embeddings import embedding_inputs, make_embedding, refuse_name
from .folder import NamedFiles
from .sets import COMPONENTS, AdapterSet, Strength, check_count

if TYPE_CHECKING:
    from .binding import BoundAdapter

Lora = tuple[str, Any]  # the name of an adapter, and its strength as `Strength.parse` takes it


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
    """

    def __init__(self, package: Package, folder: str | Path | None = None) -> None:
        self._package = package
        self._files = NamedFiles(folder, (".safetensors",), self._bound)
        self._loaded: dict[str, BoundAdapter] = {}
        self._usual: tuple[Lora, ...] = ()
        self._targets: dict[str, dict[str, tuple[int, ...]]] = {}
        self._lock = Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what was loaded."""
        with self._lock:
            return tuple(self._loaded)

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
            UsageError: another adapter has that name.
        """
        bound = self._bound(Path(path), allow_unused=allow_unused)
        name = bound.name if name is None else name
        with self._lock:
            known = self._loaded.get(name)
            if known is not None and known.sha256 != bound.sha256:
                raise UsageError(
                    f"another adapter is called {name!r}",
                    expected="a name of its own for each",
                    fix="Pass adapter_name=…, or unload the other one first.",
                )
            self._loaded[name] = bound
        return name

    def unload(self, names: Sequence[str] | None = None) -> None:
        """Forget these, or all, and that they were the usual ones.

        Raises:
            UsageError: no adapter of that name is loaded.
        """
        with self._lock:
            for name in self._loaded if names is None else names:
                if name not in self._loaded:
                    raise self._unknown(name)
            gone = set(self._loaded if names is None else names)
            self._loaded = {name: one for name, one in self._loaded.items() if name not in gone}
            self._usual = tuple(one for one in self._usual if one[0] not in gone)

    def set_usual(self, names: Sequence[str], weights: Sequence[Any]) -> None:
        """What pictures are drawn with that say nothing of adapters.

        Raises:
            UsageError: an unknown name, or strengths that are none.
        """
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
        return AdapterSet(
            adapters=tuple((name, self._find(name), Strength.parse(strength)) for name, strength in loras),
            tagged=len(further),
        )

    def check(self, hashes: Mapping[str, str]) -> None:
        """Raise UsageError unless adapters of these names have these hashes: sha256, or AUTOMATIC1111's."""
        for name, wanted in hashes.items():
            found = self._find(name)
            if wanted.lower() not in (found.sha256, found.short_hash):
                raise UsageError(
                    f"the adapter {name!r} is another file than the picture's: {found.sha256[:12]}",
                    expected=f"the one of {wanted[:12]}",
                    fix="Load that one under the name, or pass loras=… to draw with others.",
                )

    def _find(self, name: str) -> BoundAdapter:
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
        if path := self._files.paths().get(name):
            return self._files.content(path)
        raise self._unknown(name)

    def _bound(self, path: Path, *, allow_unused: bool = False) -> BoundAdapter:
        # here: most pictures are drawn without
        from .binding import bind
        from .files import read_adapter

        bound = bind(read_adapter(path), self._shapes(), allow_unused=allow_unused)
        if not bound.embeddings:
            return bound
        inputs = embedding_inputs(self._package)
        for word in bound.embeddings:
            refuse_name(word)
        words = {
            word: make_embedding(word, arrays, inputs, where=f"{path}: the embedding {word!r:.60}")
            for word, arrays in bound.embeddings.items()
        }
        return replace(bound, words=words)

    def _unknown(self, name: str) -> UsageError:
        known = list(dict.fromkeys((*self._loaded, *self._files.paths())))
        near = get_close_matches(name, known, 3) or known[:10]
        return UsageError(
            f"no adapter is called {name!r:.100}",
            expected=f"one of {', '.join(near)}" if near else "the name of one that was loaded",
            fix="Load it first: pipe.load_lora_weights(FILE), --lora FILE, or --lora-dir FOLDER",
        )

    def _shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """The model's weights by component, read once."""
        with self._lock:
            if not self._targets:
                parts = {NETS[net].part for net in self._package.manifest.nets if net in NETS}
                self._targets = {
                    name: part_shapes(self._package, name) for name in COMPONENTS if name in parts
                }
                if {"text_encoder", "text_encoder_2"} <= parts:
                    self._targets["text_encoder"] |= unread_weights(self._targets["text_encoder"])
            return self._targets
