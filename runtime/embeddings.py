"""The embeddings that a pipeline knows: those that were loaded under a word, and files of a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, cast

from ..adapters.embeddings import (
    AnotherKindError,
    Embedding,
    EncoderInputs,
    embedding_inputs,
    make_embedding,
    own_word,
    read_embedding,
    refuse_name,
)
from ..adapters.folder import NamedFiles, check_names, check_path
from ..engines.errors import LatentrtError, ModelError, UsageError
from ..engines.package import Package
from ..engines.spec import Array
from .prompts.encode import PROMPT_SYNTAXES, called_embeddings
from .prompts.names import LOAD
from .request.request import Request

# What embeddings come from: a file, or arrays as a file has them.
Source = str | Path | Mapping[str, Array]

# The endings of embedding files, the preferred first. A pickle is refused with the command that converts it.
_ENDINGS = (".safetensors", ".pt", ".bin")
_MOST_FILES = 64  # of the embeddings that one prompt calls
_SHORT_HASH = 12  # characters, as AUTOMATIC1111 writes it

# Embeddings that lie in the adapters of a request, by word: one of each adapter that has it.
Words = Mapping[str, Sequence[Embedding]]
_NO_WORDS: Words = {}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Called:
    """An embedding that a picture's texts called.

    Attributes:
        name: what the texts called it.
        sha256: of its content (hex).
        adapter: the name of the adapter in whose file it lay; "" for one that has a file of its own.
    """

    name: str
    sha256: str
    adapter: str = ""

    def to_json(self) -> dict[str, str]:
        """As a record has it."""
        origin = {"adapter": self.adapter} if self.adapter else {}
        return {"name": self.name, "sha256": self.sha256, **origin}


def _several(source: object) -> list[Source]:
    """One embedding or several, as a list. Raises UsageError for anything else."""
    given = list(cast("Sequence[Any]", source)) if isinstance(source, (list, tuple)) else [source]
    for one in given:
        if not isinstance(one, Mapping):
            what, fix = "a file, or arrays as a file has them", 'Pass a path, or {"clip_l": ARRAY}.'
            check_path(one, "an embedding", what, fix)
    return cast("list[Source]", given)


class EmbeddingLibrary:
    """Embeddings by name. Threads may share it: a request keeps those that it was made with.

    Args:
        package: whose text encoders they are for.
        folder: of embedding files, which are called as `NamedFiles` says, or by the word that they have.

    Raises:
        UsageError: `folder` is none.
    """

    def __init__(self, package: Package, folder: str | Path | None = None) -> None:
        self._package = package
        self._files = NamedFiles(folder, _ENDINGS, lambda path: read_embedding(path, self._inputs, path.stem))
        self._own_words = NamedFiles(folder, _ENDINGS, own_word)
        self._lock = Lock()
        self._loaded: Mapping[str, Embedding] = {}  # replaced, never changed
        self._told: set[tuple[str, str]] = set()  # words and adapters that went before the user's

    def load(self, source: Source | Sequence[Source], token: str | Sequence[str | None] | None) -> None:
        """Load embeddings; see `Pipeline.load_textual_inversion`. All of them, or none if one is refused."""
        sources = _several(source)
        tokens: list[Any] = list(cast(Any, token)) if isinstance(token, (list, tuple)) else [token]
        if len(tokens) != len(sources):
            if token is not None:
                raise UsageError(
                    f"{len(tokens)} tokens for {len(sources)} embeddings",
                    expected="one for each, or none for the names that they have",
                    fix="Pass token=[…] of the same length.",
                )
            tokens = [None] * len(sources)
        found = [self._read(one, name) for one, name in zip(sources, tokens, strict=True)]
        with self._lock:
            loaded = dict(self._loaded)
            for embedding in found:
                before = loaded.setdefault(embedding.name, embedding)
                if not before.is_like(embedding):
                    raise UsageError(
                        f"another embedding is loaded as {embedding.name!r}",
                        expected="a word that is free",
                        fix="Pass another token=…, or call unload_textual_inversion first.",
                    )
            self._loaded = loaded

    def unload(self, token: str | Sequence[str] | None) -> None:
        """Forget embeddings that were loaded; see `Pipeline.unload_textual_inversion`."""
        with self._lock:
            tokens = (
                list(self._loaded)
                if token is None
                else check_names(token, "an embedding", "Pass the words that were loaded.")
            )
            for name in tokens:
                if name not in self._loaded:
                    raise _missing(name, f"one of {', '.join(map(repr, self._loaded)) or 'none'}")
            self._loaded = {name: embedding for name, embedding in self._loaded.items() if name not in tokens}

    def names(self) -> tuple[str, ...]:
        """What prompts may call: words that were loaded, and names of files."""
        return tuple(sorted({*self._loaded, *self._paths()}))

    def bind(self, request: Request, words: Words = _NO_WORDS) -> Request:
        """The request with the embeddings that its texts call.

        Args:
            request: what to draw.
            words: that lie in its adapters. They count for this request alone, as if they were given, and go
                before others of the same name: the adapter was trained with them.

        Raises:
            UsageError: a prompt that its syntax refuses, or that calls what is not there, or a word that two
                adapters have other vectors for.
            CheckpointError: a file that it calls is no embedding, or one for other encoders.
            PackageError: the package takes no embeddings.
        """
        by_names_alone = PROMPT_SYNTAXES[request.prompt_syntax].names.bare != "given"
        return self._bind(request, self._paths() if by_names_alone else {}, words)

    def _bind(self, request: Request, files: Mapping[str, Path], words: Words) -> Request:
        """The same with these files."""
        loaded = self._loaded
        known = {**files, **loaded, **words}
        pictures = {_texts(request, index) for index in range(len(request.prompts))}
        if not known and not any("embedding:" in text.lower() for texts in pictures for text in texts):
            return request
        called: set[str] = set()
        for texts in pictures:
            names = called_embeddings(texts, request.prompt_syntax, known)
            if len(names) > _MOST_FILES:
                raise UsageError(
                    f"a prompt calls {len(names)} embeddings",
                    expected=f"at most {_MOST_FILES}",
                    fix="Call fewer.",
                )
            called |= set(names)
        bound: dict[str, Embedding] = {}
        for name in sorted(called):
            try:
                own = loaded.get(name) or (self._of_file(files, name) if name in files else None)
            except AnotherKindError as other:  # a LoRA in the same folder: its name is a word like any other
                try:
                    fewer = {one: path for one, path in files.items() if one != name}
                    return self._bind(request, fewer, words)
                except UsageError as missing:  # but for `embedding:NAME`
                    raise other from missing
            if name in words:
                bound[name] = self._preferred(words[name], own)
            elif own is not None:
                bound[name] = own
        return replace(request, embeddings=bound)

    def _preferred(self, words: Sequence[Embedding], own: Embedding | None) -> Embedding:
        """What a word of adapters stands for, where there may be one of the user's own as well."""
        first = words[0]
        for other in words[1:]:
            if not first.is_like(other):
                raise UsageError(
                    f"the adapters {first.adapter!r} and {other.adapter!r} both bring the embedding"
                    f" {first.name!r}, with other vectors",
                    expected="one meaning of a word",
                    fix="Draw with one of the two, or leave the word out of the prompts.",
                )
        if own is not None and not first.is_like(own) and (first.name, first.adapter) not in self._told:
            self._told.add((first.name, first.adapter))
            _LOG.warning(
                "the word %r is the embedding that the adapter %r brings along, and not yours of that name",
                first.name,
                first.adapter,
            )
        return first

    def check(self, wanted: Iterable[Called], texts: Sequence[str], words: Words = _NO_WORDS) -> None:
        """See to it that these embeddings are there, as far as one of the texts has their names.

        Names and hashes may be as AUTOMATIC1111 writes them: without colons and commas, and cut. `words` lie
        in the adapters that are drawn with.

        Raises:
            UsageError: one is missing, or another one has its name.
        """
        files = self._paths()
        known = {written_name(name): name for name in [*files, *self._loaded, *words]}
        for one in wanted:
            name = known.get(written_name(one.name))
            if not any((name or one.name).lower() in text.lower() for text in texts):
                continue
            expected = f"the one with the sha256 {one.sha256}"
            if one.adapter:
                expected += f", which lies in the adapter {one.adapter!r}"
            if name is None:
                raise _missing(one.name, expected)
            found = words[name][0] if name in words else self._loaded.get(name) or self._of_file(files, name)
            if not found.sha256.startswith(one.sha256.lower()):
                raise UsageError(
                    f"the embedding {name!r} is not the one that the picture was drawn with: its sha256 is"
                    f" {found.sha256}",
                    expected=expected,
                    fix="Put that file in its place, or draw a new picture.",
                )

    @cached_property
    def _inputs(self) -> EncoderInputs:
        return embedding_inputs(self._package)

    def _read(self, source: Source, name: str | None) -> Embedding:
        """One embedding, under its word. Raises CheckpointError, UsageError."""
        if name not in (None, ""):
            refuse_name(name)
        if isinstance(source, Mapping):
            own = next(iter(source)) if len(source) == 1 else None
            name = name or own
            if name is None:
                raise UsageError(
                    f"{len(source)} arrays without a word", expected="a token", fix="Pass token=NAME."
                )
            refuse_name(name)
            return make_embedding(name, source, self._inputs)
        embedding = read_embedding(Path(source), self._inputs, name)
        refuse_name(embedding.name)
        return embedding

    def _paths(self) -> dict[str, Path]:
        """The folder's files by what prompts may call them: their names, and the words that they have."""
        paths = self._files.paths()
        return {**{word: found[0] for word, found in self._by_own_word(paths).items()}, **paths}

    def _by_own_word(self, paths: Mapping[str, Path]) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in sorted(set(paths.values())):
            with suppress(ModelError):  # a damaged file is refused when it is called
                if word := self._own_words.content(path):
                    found.setdefault(word, []).append(path)
        return found

    def _of_file(self, files: Mapping[str, Path], name: str) -> Embedding:
        """A file of the folder, under one of its names. Raises UsageError for a word of several."""
        paths = self._files.paths()
        if name in paths:
            path = self._files.find(name, self._is_one) or paths[name]
            return replace(self._files.content(path), name=name)
        found = self._files.content(files[name])
        same = self._by_own_word(paths).get(name, [])
        if not all(found.is_like(self._files.content(path)) for path in same):
            raise UsageError(
                f"{len(same)} files have the word {name!r:.60}: {', '.join(map(str, same[:5]))}",
                expected="one meaning of a word",
                fix="Call the one that is meant by its file's name.",
            )
        return replace(found, name=name)

    def _is_one(self, path: Path) -> bool:
        """Whether a file of the folder is an embedding, be it damaged."""
        try:
            self._files.content(path)
        except AnotherKindError:
            return False
        except LatentrtError:
            return True
        return True


def called_by(request: Request, index: int) -> tuple[Called, ...]:
    """The embeddings that the texts of picture `index` call, of those that the request was bound to."""
    known = request.embeddings
    names = called_embeddings(_texts(request, index), request.prompt_syntax, known) if known else ()
    return tuple(Called(name=name, sha256=known[name].sha256, adapter=known[name].adapter) for name in names)


def written_name(name: str) -> str:
    """A name as AUTOMATIC1111 writes it beside a hash."""
    return name.replace(":", "").replace(",", "")


def write_hashes(called: Sequence[Called]) -> str | None:
    """AUTOMATIC1111's `TI hashes`; None where there are none.

    What lies in an adapter is not among them, there as here: the adapter's own hash says it.
    """
    pairs = (f"{written_name(one.name)}: {one.sha256[:_SHORT_HASH]}" for one in called if not one.adapter)
    return ", ".join(pairs) or None


def read_hashes(text: str) -> tuple[Called, ...]:
    """What `TI hashes` says. Raises ValueError for another text."""
    pairs = [part.rpartition(":")[::2] for part in text.split(",")]
    found = tuple(Called(name=name.strip(), sha256=sha256.strip()) for name, sha256 in pairs)
    if not all(one.name and one.sha256 and int(one.sha256, 16) >= 0 for one in found):
        raise ValueError(text)
    return found


def _texts(request: Request, index: int) -> tuple[str, ...]:
    """All texts of a picture, without those that are missing."""
    of_picture = (
        request.prompts[index],
        request.prompts_2[index],
        request.negative_prompts[index],
        request.negative_prompts_2[index],
    )
    return tuple(text for text in of_picture if text is not None)


def _missing(name: str, expected: str) -> UsageError:
    return UsageError(
        f"the embedding {name!r} is missing",
        expected=expected,
        fix=LOAD,
    )
