"""ComfyUI's prompt syntax: `(more)`, `(word:1.3)`, `\\(`.

Source of the behaviour: `comfy/sd1_clip.py` of ComfyUI (`token_weights`, `parse_parentheses`), and
`processDynamicPrompt` of its frontend.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator

from .chunks import Fragment, checked, refuse_wildcards, unsupported

_MORE = 1.1
# how the reference hides escaped brackets from its parser; the second pair of each row puts them back
_HIDDEN = ((r"\)", "\0\1", ")"), (r"\(", "\0\2", "("))
_CHOICE = re.compile(r"\\.?|[{}|]", re.S)


def parse_comfyui(text: str) -> tuple[Fragment, ...]:
    """Split a prompt into fragments as `token_weights` does, in linear time and without recursion.

    As in the reference, `(word)` multiplies the surrounding weight by 1.1, and `(word:1.3)` replaces it. A
    bracket that is never closed is text, with all that follows it; a closing bracket too many makes text of
    the next opening one.

    Raises:
        UsageError: `{a|b}` and `__wildcard__`, which nothing here carries out; a weight beyond float32.
    """
    _refuse_choices(text)
    refuse_wildcards(text)
    for escaped, hidden, _ in _HIDDEN:
        text = text.replace(escaped, hidden)
    fragments: list[Fragment] = []
    for start, end, weight in _Brackets(text).pieces():
        piece = text[start:end]
        for _, hidden, bracket in _HIDDEN:
            piece = piece.replace(hidden, bracket)
        fragments.append(Fragment(text=piece, weight=checked(weight, piece)))
    return tuple(fragments)


class _Brackets:
    """A text's brackets: which belong together, and where a weight may precede a closing one."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._openings: list[int] = []
        self._closing: dict[int, int] = {}  # position of an opening bracket -> of its closing one
        self._colon: dict[
            int, int
        ] = {}  # position of a bracket -> of the last colon since the bracket before
        opened: list[int] = []
        surplus = 0  # closing brackets too many; as many opening ones after them are text
        colon: int | None = None
        for match in re.finditer("[():]", text):
            position = match.start()
            if match[0] == ":":
                colon = position
                continue
            if colon is not None:
                self._colon[position], colon = colon, None
            if match[0] == ")" and opened:
                self._closing[opened.pop()] = position
            elif match[0] == ")":
                surplus += 1
            elif surplus:
                surplus -= 1
            else:
                opened.append(position)
                self._openings.append(position)

    def pieces(self) -> Iterator[tuple[int, int, float]]:
        """Yield (start, end, weight) of every piece of text, from left to right."""
        todo = [
            (0, len(self._text), 1.0)
        ]  # (start, end, weight) of what is still to be split; the last is next
        while todo:
            start, end, weight = todo.pop()
            opening = self._next_opening(start, end)
            if start < opening:
                yield start, opening, weight
            if opening == end:
                continue
            closing = self._closing.get(opening, end)
            if closing < end:
                todo.append((closing + 1, end, weight))
                todo.append(self._inside(opening, closing, weight))
            elif self._text[end - 1] == ")":
                # The reference takes all from a bracket that is not closed here as one piece, and treats the
                # brackets around a piece as if they belonged together.
                todo.append(self._inside(opening, end - 1, weight))
            else:
                yield opening, end, weight

    def _next_opening(self, start: int, end: int) -> int:
        index = bisect_left(self._openings, start)
        return min(end, self._openings[index]) if index < len(self._openings) else end

    def _inside(self, opening: int, closing: int, weight: float) -> tuple[int, int, float]:
        """Start, end and weight of what is between two brackets."""
        start, colon = opening + 1, self._colon.get(closing, -1)
        if colon > start:
            try:
                return start, colon, float(self._text[colon + 1 : closing])
            except ValueError:
                pass  # what follows the colon is text, no weight
        return start, closing, weight * _MORE


def _refuse_choices(text: str) -> None:
    """Raise UsageError for `{a|b}`. As in the reference, the `}` may be missing."""
    starts: list[int] = []
    for match in _CHOICE.finditer(text):
        if match[0] == "{":
            starts.append(match.start())
        elif match[0] == "}" and starts:
            starts.pop()
        elif match[0] == "|" and starts:
            end = text.find("}", match.end())
            found = text[starts[-1] : None if end == -1 else end + 1]
            raise unsupported(
                "a random choice", found, r"Write one of the words, or \{ for a brace that is text."
            )
