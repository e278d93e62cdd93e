"""AUTOMATIC1111's prompt syntax: `(more)`, `[less]`, `(word:1.3)`, `\\(`, `BREAK`.

Source of the behaviour: stable-diffusion-webui's `modules/prompt_parser.py` (`parse_prompt_attention`, and
the grammar of prompt editing) and `modules/extra_networks.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from math import prod
from operator import itemgetter
from typing import Literal, NamedTuple

from ...engines.errors import UsageError
from .chunks import Fragment, checked, refuse_wildcards, unsupported
from .lora_tags import without_tags

_MORE, _LESS = 1.1, 1 / 1.1
# So many brackets around a fragment have their factors multiplied one by one, as the reference does for all.
_EXACT_DEPTH = 32

_TOKEN = re.compile(r"\\[\\()\[\]]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")
_EXTRA_NETWORK = re.compile(r"<(\w+):[^>]")
_AND = re.compile(r"\bAND\b")
_STRUCTURE = re.compile(r"\\.|[\\()\[\]:|]")
# the number of `[from:to:when]`; ASCII digits only
_WHEN = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")

_EXTRA_NETWORK_FIXES = {
    "hypernet": "Hypernetworks are not supported: remove the tag.",
}


def parse_a1111(text: str) -> tuple[Fragment, ...]:
    """Split a prompt without tags of adapters as `parse_prompt_attention` does, in time linear in its length.

    Weights are equal to the bit, merging included, for up to 32 brackets around a word; beyond, the factors
    of the outer ones are multiplied with each other first, which can change the last bits. As in the
    reference, `BREAK` ends a chunk only where no factor but 1 surrounds it: in `(a BREAK b)` it is a word of
    negative weight.

    Raises:
        UsageError: extra networks (`<lora:…>`), `[from:to:when]`, `[a|b]`, `AND` and `__wildcard__`, which
            nothing here carries out; a weight that is no number, or beyond float32.
    """
    text = without_tags(text)
    _refuse_unsupported(text)
    parser = _Parser()
    for match in _TOKEN.finditer(text):
        parser.add(match[0], match[1])
    return tuple(parser.fragments())


class _Closing(NamedTuple):
    """A closed bracket: fragments from `start` to before `end` are multiplied by `factor`."""

    order: int
    start: int
    end: int
    factor: float


@dataclass(kw_only=True)
class _Parser:
    """Fragments so far, the brackets that are open, and those that were closed, by kind."""

    texts: list[str] = field(default_factory=list[str])
    bases: list[float] = field(default_factory=list[float])
    opened: dict[str, list[int]] = field(default_factory=lambda: {"(": [], "[": []})
    closed: dict[str, list[_Closing]] = field(default_factory=lambda: {"(": [], "[": []})
    count: int = 0

    def add(self, symbol: str, weight: str | None) -> None:
        """Take the next symbol; `weight` is the number of `:1.2)`."""
        if symbol[0] == "\\":
            self._append(symbol[1:])
        elif symbol in "([":
            self.opened[symbol].append(len(self.texts))
        elif weight is not None and self.opened["("]:
            self._close("(", self.opened["("].pop(), _number(weight))
        elif symbol == ")" and self.opened["("]:
            self._close("(", self.opened["("].pop(), _MORE)
        elif symbol == "]" and self.opened["["]:
            self._close("[", self.opened["["].pop(), _LESS)
        else:
            self._append_text(symbol)

    def fragments(self) -> Iterator[Fragment]:
        """Close the brackets that are still open, and yield neighbours of equal weight as one fragment."""
        for kind, factor in (("(", _MORE), ("[", _LESS)):
            for start in self.opened[kind]:
                self._close(kind, start, factor)
        if not self.texts:
            yield Fragment(text="")
        pairs = zip(self.texts, _weights(self.bases, tuple(self.closed.values())), strict=True)
        for weight, group in groupby(pairs, key=itemgetter(1)):
            text = "".join(text for text, _ in group)
            yield Fragment(text=text, weight=checked(weight, text))

    def _append(self, text: str, weight: float = 1.0) -> None:
        self.texts.append(text)
        self.bases.append(weight)

    def _append_text(self, text: str) -> None:
        # stripped apart: `\s*BREAK` in one pattern is quadratic on long white space
        parts = _BREAK.split(text)
        for index, part in enumerate(parts):
            if index > 0:
                self._append("BREAK", -1.0)
                part = part.lstrip()
            self._append(part.rstrip() if index + 1 < len(parts) else part)

    def _close(self, kind: str, start: int, factor: float) -> None:
        if start < len(self.texts):
            self.closed[kind].append(
                _Closing(order=self.count, start=start, end=len(self.texts), factor=factor)
            )
            self.count += 1


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"the prompt has the weight {text!r:.40}",
            expected="a decimal number, like (word:1.2)",
            fix=r"Write one point at most, or \( and \) for brackets that are text.",
        ) from None


class _Around:
    """The brackets of one kind around a fragment, outermost first. Brackets of one kind never cross."""

    def __init__(self, closed: Sequence[_Closing]) -> None:
        # of the brackets that start at one fragment, the outermost was closed last
        self._coming = sorted(closed, key=lambda closing: (closing.start, -closing.order), reverse=True)
        self._now: list[_Closing] = []
        self._products: list[float] = [1.0]

    def move_to(self, position: int) -> bool:
        """Go on to the next fragment. Return whether its brackets differ from those of the one before."""
        before = len(self._now)
        while self._now and self._now[-1].end <= position:
            self._now.pop()
            self._products.pop()
        changed = len(self._now) < before
        while self._coming and self._coming[-1].start == position:
            closing = self._coming.pop()
            self._now.append(closing)
            self._products.append(self._products[-1] * closing.factor)
            changed = True
        return changed

    @property
    def inner(self) -> list[_Closing]:
        """The innermost brackets."""
        return self._now[-_EXACT_DEPTH:]

    @property
    def outer_product(self) -> float:
        """The product of the factors of all other brackets."""
        return self._products[max(0, len(self._now) - _EXACT_DEPTH)]


def _weights(bases: Sequence[float], closed: Sequence[Sequence[_Closing]]) -> Iterator[float]:
    """Each base times the factors of its brackets, in the order in which these were closed.

    The order matters to the last bit, and neighbours are merged when their weights are equal to the last bit.
    """
    around = [_Around(kind) for kind in closed]
    factors: list[float] = []
    for position, base in enumerate(bases):
        moved = [kind.move_to(position) for kind in around]
        if any(moved):
            inner = sorted(chain.from_iterable(kind.inner for kind in around))
            factors = [*(closing.factor for closing in inner), *(kind.outer_product for kind in around)]
        yield prod(factors, start=base)  # one after the other, from the left


def _refuse_unsupported(text: str) -> None:
    """Raise UsageError for what AUTOMATIC1111's web UI would carry out and nothing here does."""
    match = _EXTRA_NETWORK.search(text)
    if match and (end := text.find(">", match.end())) != -1:
        fix = _EXTRA_NETWORK_FIXES.get(match[1].lower(), "Extra networks are not supported: remove the tag.")
        raise unsupported("an extra network", text[match.start() : end + 1], fix)
    if match := _AND.search(text):
        raise unsupported("composition of several prompts", match[0], 'Write "and" in lower case.')
    if found := _find_scheduling(text):
        fix = r"Write what should be drawn, or \[ and \] for brackets that are text."
        raise unsupported(*found, fix)
    refuse_wildcards(text)


_Kind = Literal["emphasis", "prompt editing", "alternation"]


@dataclass(kw_only=True)
class _Group:
    """What was read directly inside an open bracket; the whole prompt is a group without a bracket."""

    bracket: str
    start: int
    colons: int = 0
    bars: int = 0
    last_colon: int = -1

    def take(self, symbol: str, position: int) -> bool:
        """Note a colon, a bar or an escape. Return False where the reference's grammar has none."""
        if symbol == ":":
            self.colons += 1
            self.last_colon = position
        elif symbol == "|":
            self.bars += 1
            return self.bracket == "["
        return symbol != "\\"

    def kind(self, bracket: str, text: str, end: int) -> _Kind | None:
        """What the group means if `bracket` closes it at `end`; None if it fits no rule of the grammar."""
        if self.bracket + bracket not in ("()", "[]"):
            return None
        if self.bracket == "(":
            return "emphasis" if self.colons <= 1 else None
        if self.bars:
            return None if self.colons else "alternation"
        if not self.colons:
            return "emphasis"
        editing = self.colons <= 2 and _WHEN.fullmatch(text, self.last_colon + 1, end)
        return "prompt editing" if editing else None


def _find_scheduling(text: str) -> tuple[_Kind, str] | None:
    r"""Find the first `[from:to:when]` or `[a|b]`.

    The reference's grammar (`schedule_parser`) allows single brackets and colons only outside of every group,
    so a bracket that fits nowhere turns all brackets open around it into text. It allows `|` only in an
    alternation, and no `\` at the end of a line; a prompt that breaks this does not parse, and nothing in it
    is scheduled. Where a prompt fits the grammar in several ways, the reference's parser sometimes prefers
    one without scheduling; it is found all the same.
    """
    found: tuple[_Kind, str] | None = None
    groups = [_Group(bracket="", start=0)]
    for match in _STRUCTURE.finditer(text):
        symbol, position = match[0], match.start()
        if symbol in ("(", "["):
            groups.append(_Group(bracket=symbol, start=position))
        elif symbol not in (")", "]"):
            if not groups[-1].take(symbol, position):
                return None
        elif kind := groups[-1].kind(symbol, text, position):
            start = groups.pop().start
            if kind != "emphasis" and found is None:
                found = kind, text[start : position + 1]
        elif any(group.bars for group in groups):
            return None
        else:
            del groups[1:]
    return None if any(group.bars for group in groups) else found
