"""Prompts to the UNet's conditions, context and pooled embedding; encoded texts are cached."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ...adapters.embeddings import Embedding, input_of
from ...engines.errors import UsageError
from ...engines.spec import EXTRA_EMBEDDINGS, Array, NetSpec, no_extra_embeddings
from . import names
from .a1111 import parse_a1111
from .chunks import (
    ExtraIds,
    Fragment,
    PromptChunks,
    a1111_chunks,
    comfyui_chunks,
    interpolate_from_empty,
    scale_and_restore_mean,
    truncated_chunk,
)
from .comfyui import parse_comfyui
from .tokenizer import ClipTokenizer

CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class PromptSyntax:
    """One way of writing prompts.

    Attributes:
        parse: prompt -> fragments. Raises UsageError for syntax that nothing here carries out.
        names: how a prompt calls embeddings.
        cut: fragments, and the ids of embeddings that they call -> chunks.
        weigh: context (K, T, D), weights (K, T) and the empty prompt's context (T, D) -> weighted context.
    """

    parse: Callable[[str], Sequence[Fragment]]
    names: names.NameRules
    cut: Callable[[Sequence[Fragment], ClipTokenizer, ExtraIds], PromptChunks]
    weigh: Callable[[Array, Array, Array], Array]

    def read(self, prompt: str, known: Collection[str]) -> tuple[Fragment, ...]:
        """The fragments of a prompt, those among them that call one of the embeddings `known` by name.

        Raises:
            UsageError: syntax that nothing here carries out, or a name that is not known.
        """
        return names.find_embeddings(self.parse(prompt), self.names, known)


PROMPT_SYNTAXES: Mapping[str, PromptSyntax] = {
    # the text as it is, as diffusers reads it
    "plain": PromptSyntax(
        parse=lambda prompt: (Fragment(text=prompt),),
        names=names.PLAIN,
        cut=truncated_chunk,
        weigh=lambda context, weights, empty: context,
    ),
    "a1111": PromptSyntax(
        parse=parse_a1111,
        names=names.A1111,
        cut=a1111_chunks,
        weigh=lambda context, weights, empty: scale_and_restore_mean(context, weights),
    ),
    "comfyui": PromptSyntax(
        parse=parse_comfyui, names=names.COMFYUI, cut=comfyui_chunks, weigh=interpolate_from_empty
    ),
}


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder and its tokenizer.

    Attributes:
        run: runs the net: `input_ids` (P, 77) int32, and for some `clip_skip` (1,) int32, the number of last
            layers that are left out, and `extra_embeddings` (E, D) -> `context` (P, 77, D) float, and for
            some `pooled` (P, width) float.
        spec: inputs and outputs of the net.
        tokenizer: makes the ids.
        net: its name, by which embeddings have vectors for it.
        vocabulary: the first id that `extra_embeddings` has a row for; asked for with the first embedding.
    """

    run: Callable[..., Mapping[str, Array]]
    spec: NetSpec
    tokenizer: ClipTokenizer
    net: str = "text_encoder"
    vocabulary: Callable[[], int] | None = None

    @property
    def takes_clip_skip(self) -> bool:
        """Whether the graph can leave layers out."""
        return any(tensor.name == "clip_skip" for tensor in self.spec.inputs)

    def __call__(self, ids: Array, clip_skip: int, extra: Array | None = None) -> tuple[Array, Array | None]:
        """Encode ids (P, 77) int32. Returns context (P, 77, D), and pooled (P, width) or None.

        `extra` (E, D) are the rows of ids beyond the vocabulary, where there are any.
        """
        further = {"clip_skip": np.array([clip_skip], np.int32)} if self.takes_clip_skip else {}
        rows = no_extra_embeddings(self.spec) if extra is None else {EXTRA_EMBEDDINGS: extra}
        outputs = self.run(input_ids=ids, **further, **rows)
        return outputs["context"], outputs.get("pooled")

    def place(self, embeddings: Mapping[str, Embedding]) -> tuple[ExtraIds, Array | None]:
        """The ids that embeddings have in one call, by name, and the rows of these ids (E, D)."""
        if not embeddings:
            return {}, None
        assert self.vocabulary is not None, "whoever loads embeddings knows the vocabulary"
        assert input_of(self.spec) is not None, "embeddings are bound to encoders that take them"
        ids: dict[str, range] = {}
        first = self.vocabulary()
        for name, embedding in embeddings.items():
            ids[name] = range(first, first + len(embedding))
            first = ids[name].stop
        return ids, np.concatenate([embedding.vectors[self.net] for embedding in embeddings.values()])


@dataclass(frozen=True, kw_only=True, eq=False)
class TextConditioning:
    """P encoded texts.

    Attributes:
        context: (P, 77*K, sum of D), the features of the encoders side by side. K is a multiple of every
            text's number of chunks, and each is repeated as a whole: attention weighs a key and its copies
            as it weighs the key alone, so no text changes with the others of its batch.
        pooled: (P, E), for each text's first chunk the pooled output of the last encoder that has one; None
            if none has.
        dropped: for each text the end that found no room; "" where all of it did.
    """

    context: Array
    pooled: Array | None
    dropped: tuple[str, ...]


class _Key(NamedTuple):
    """All that an encoded text depends on."""

    texts: tuple[str, ...]  # one for each encoder
    syntax: str
    clip_skip: int
    embeddings: tuple[tuple[str, str], ...] = ()  # name and sha256 of those that the texts call


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoded:
    """One encoded text: context (K, 77, sum of D), pooled (E,). Read-only, because threads share it."""

    context: Array
    pooled: Array | None
    dropped: str

    def __post_init__(self) -> None:
        for array in (self.context, self.pooled):
            if array is not None:
                array.setflags(write=False)


class _Cache:
    """The texts used last, as many as fit into `limit` bytes. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = Lock()
        self._texts: OrderedDict[_Key, _Encoded] = OrderedDict()
        self._nbytes = 0

    def get(self, key: _Key) -> _Encoded | None:
        with self._lock:
            if key in self._texts:
                self._texts.move_to_end(key)
            return self._texts.get(key)

    def put(self, key: _Key, text: _Encoded) -> None:
        size = _nbytes(key, text)
        with self._lock:
            if key in self._texts or size > self._limit:
                return
            self._texts[key] = text
            self._nbytes += size
            while self._nbytes > self._limit:
                self._nbytes -= _nbytes(*self._texts.popitem(last=False))


def _nbytes(key: _Key, text: _Encoded) -> int:
    """Bytes of a cached text and its key: a long prompt may keep only one chunk, and still takes memory."""
    pooled = 0 if text.pooled is None else text.pooled.nbytes
    return text.context.nbytes + pooled + sum(len(each) for each in key.texts)


def called_embeddings(texts: Iterable[str], syntax: str, known: Collection[str]) -> tuple[str, ...]:
    """The names, of those known, that prompts call: sorted, each once.

    Raises:
        UsageError: a prompt that its syntax refuses, or that calls an embedding that is not known.
    """
    fragments = (one for text in texts for one in PROMPT_SYNTAXES[syntax].read(text, known))
    return tuple(sorted({one.embedding for one in fragments if one.embedding is not None}))


class TextConditioner:
    """A package's text encoders, in their order. Threads may share it.

    Args:
        encoders: one, or SDXL's two.
        cache_bytes: how many bytes of encoded texts are kept, those used last; 0 keeps none.
    """

    def __init__(self, encoders: Sequence[TextEncoder], *, cache_bytes: int = CACHE_BYTES) -> None:
        self._encoders = tuple(encoders)
        self._cache = _Cache(cache_bytes)

    def encode(
        self,
        texts: Sequence[str],
        texts_2: Sequence[str | None] | None = None,
        *,
        syntax: str = "plain",
        clip_skip: int = 0,
        embeddings: Mapping[str, Embedding] = MappingProxyType({}),
    ) -> TextConditioning:
        """Encode P texts, negative ones among them. Those not cached take one call of each encoder together.

        Args:
            texts: P prompts.
            texts_2: P prompts for the second encoder, diffusers' `prompt_2`; None repeats the first's.
            syntax: how the prompts are written: "plain", "a1111" or "comfyui".
            clip_skip: number of the encoders' last layers that are left out (0: none).
            embeddings: those that prompts may call, by name.

        Raises:
            UsageError: a prompt that its syntax refuses, an embedding that is not there, or clip_skip where a
                graph cannot leave layers out.
        """
        if clip_skip and not all(encoder.takes_clip_skip for encoder in self._encoders):
            raise UsageError(
                f"clip_skip is {clip_skip}",
                expected="0: this package's text encoder has one output, behind its usual layer",
                fix="Export the checkpoint again, or leave clip_skip out.",
            )
        seconds = [None] * len(texts) if texts_2 is None else texts_2
        pairs = [(one, one if two is None else two) for one, two in zip(texts, seconds, strict=True)]
        keys = [self._key(pair[: len(self._encoders)], syntax, clip_skip, embeddings) for pair in pairs]
        encoded = self._encoded(keys, embeddings)
        rows = [encoded[key] for key in keys]
        count = math.lcm(*(len(row.context) for row in rows))
        repeated = [np.tile(row.context, (count // len(row.context), 1, 1)) for row in rows]
        context = np.stack(repeated)  # (P, K, 77, D)
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextConditioning(
            context=np.reshape(context, (len(rows), -1, context.shape[-1])),
            pooled=np.stack(pooled) if pooled else None,
            dropped=tuple(row.dropped for row in rows),
        )

    def _key(
        self, texts: tuple[str, ...], syntax: str, clip_skip: int, embeddings: Mapping[str, Embedding]
    ) -> _Key:
        called = called_embeddings(texts, syntax, embeddings) if embeddings else ()
        return _Key(texts, syntax, clip_skip, tuple((name, embeddings[name].sha256) for name in called))

    def _empty(self, key: _Key) -> _Key:
        return key._replace(texts=("",) * len(self._encoders), embeddings=())

    def _encoded(self, keys: Sequence[_Key], embeddings: Mapping[str, Embedding]) -> Mapping[_Key, _Encoded]:
        """These texts, and the empty one if another is weighted with it, or filled up for one encoder."""
        known = {key: text for key in keys if (text := self._cache.get(key))}
        called = {name: embeddings[name] for key in keys if key not in known for name, _ in key.embeddings}
        placed = [encoder.place(called) for encoder in self._encoders]
        chunked = {key: self._chunks(key, placed) for key in keys if key not in known}
        weighted = any(chunks.weighted for each in chunked.values() for chunks in each)
        uneven = any(len({len(chunks.ids) for chunks in each}) > 1 for each in chunked.values())
        empty = self._empty(keys[0])
        if (weighted or uneven) and empty not in known:
            if text := self._cache.get(empty):
                known[empty] = text
            else:
                chunked[empty] = self._chunks(empty, placed)
        if chunked:
            outputs = _Outputs(self._encoders, chunked, keys[0].clip_skip, [rows for _, rows in placed])
            # the empty text first, because others need it
            for key in sorted(chunked, key=lambda key: key != empty):
                known[key] = outputs.text(key, known.get(empty))
                self._cache.put(key, known[key])
        return known

    def _chunks(self, key: _Key, placed: Sequence[tuple[ExtraIds, Array | None]]) -> tuple[PromptChunks, ...]:
        """The chunks of one text, by each encoder's tokenizer and the ids of embeddings there."""
        syntax, known = PROMPT_SYNTAXES[key.syntax], [name for name, _ in key.embeddings]
        return tuple(
            syntax.cut(syntax.read(text, known), encoder.tokenizer, ids)
            for text, encoder, (ids, _) in zip(key.texts, self._encoders, placed, strict=True)
        )


class _Outputs:
    """The encoders' outputs for chunks, from one call each; equal chunks are encoded once."""

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        chunked: Mapping[_Key, tuple[PromptChunks, ...]],
        clip_skip: int,
        extra: Sequence[Array | None],
    ) -> None:
        self._chunked = chunked
        self._rows: list[dict[bytes, int]] = []  # for each encoder, the row of a chunk's outputs
        self._contexts: list[Array] = []  # (P, 77, D) each
        self._pooled: list[Array | None] = []  # (P, E) each
        for index, encoder in enumerate(encoders):
            rows = {row.tobytes(): row for chunks in chunked.values() for row in chunks[index].ids}
            context, pooled = encoder(np.stack(list(rows.values())), clip_skip, extra[index])
            self._rows.append({row: position for position, row in enumerate(rows)})
            self._contexts.append(context)
            self._pooled.append(pooled)

    def text(self, key: _Key, empty: _Encoded | None) -> _Encoded:
        """Put one text together; `empty` is the encoded empty text, where one is needed."""
        chunked = self._chunked[key]
        count = max(len(chunks.ids) for chunks in chunked)
        widths = [context.shape[-1] for context in self._contexts]
        empties = (
            [None] * len(widths) if empty is None else np.split(empty.context, np.cumsum(widths)[:-1], -1)
        )
        contexts: list[Array] = []
        pooled: Array | None = None
        for index, chunks in enumerate(chunked):
            rows = [self._rows[index][row.tobytes()] for row in chunks.ids]
            context = self._contexts[index][rows]  # (K, 77, D)
            own_empty = empties[index]
            if own_empty is not None and chunks.weighted:
                context = PROMPT_SYNTAXES[key.syntax].weigh(context, chunks.weights, own_empty[0])
            contexts.append(_padded(context, count, own_empty))
            own_pooled = self._pooled[index]
            pooled = pooled if own_pooled is None else own_pooled[rows[0]].copy()
        return _Encoded(
            context=np.concatenate(contexts, axis=-1),
            pooled=pooled,
            dropped=next((chunks.dropped for chunks in chunked if chunks.dropped), ""),
        )


def _padded(context: Array, count: int, empty: Array | None) -> Array:
    """(`count`, 77, D): the context (K, 77, D) and, behind it, empty chunks (1, 77, D)."""
    missing = count - len(context)
    return context if empty is None else np.concatenate([context, *[empty] * missing])
