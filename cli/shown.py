"""What the commands print for people. Texts come from files of strangers, and terminals obey what they get.

Names of files and tensors, configs, and what pictures say may hold line breaks and control characters: those
are shown as Python spells them. JSON needs none of this: it is ASCII.
"""

from __future__ import annotations

import sys

# Of no width, and part of words of some scripts and of joined emoji; other such characters turn text around.
_JOINERS = "\u200c\u200d"


def show(text: str) -> None:
    """Print one line."""
    print(printable(text))


def tell(text: str) -> None:
    """Print one line on standard error."""
    print(printable(text), file=sys.stderr)


def show_lines(text: str) -> None:
    """Print a text of several lines."""
    for line in text.split("\n"):
        show(line)


def printable(text: str) -> str:
    """A text in one line, in which nothing commands a terminal."""
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in _JOINERS
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
