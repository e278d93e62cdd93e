"""What the prompt syntaxes share: weighted fragments, and the errors for what they do not carry out."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ...engines.errors import UsageError

_LARGEST_WEIGHT = float(np.finfo(np.float32).max)
# `__name__` and `__folder/name*__`, of the wildcard extensions of both AUTOMATIC1111's web UI and ComfyUI
_WILDCARD = re.compile(r"__[^\W_][\w/*.\-]*?__")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """A piece of a prompt and its weight; 1 leaves it as it is."""

    text: str
    weight: float = 1.0

    @property
    def ends_chunk(self) -> bool:
        """Whether this is AUTOMATIC1111's `BREAK`, which its parser marks by this text and weight."""
        return self.weight == -1 and self.text == "BREAK"


def checked(weight: float, text: str) -> float:
    """The weight of `text`. Raises UsageError for one that float32 cannot hold."""
    if not abs(weight) <= _LARGEST_WEIGHT:  # written so that NaN is refused too
        raise UsageError(
            f"the prompt gives {text!r:.40} the weight {weight}",
            expected="weights that float32 can hold",
            fix="Write a smaller weight, or fewer brackets.",
        )
    return weight


def unsupported(what: str, found: str, fix: str) -> UsageError:
    """The error for syntax that has a meaning in other programs and none here."""
    return UsageError(
        f"the prompt has {what}: {found!r:.60}",
        expected="text, weights in brackets and escapes",
        fix=f'{fix} With the prompt syntax "plain" every character is text.',
    )


def refuse_wildcards(text: str) -> None:
    """Raise UsageError for `__name__`."""
    if match := _WILDCARD.search(text):
        raise unsupported("a wildcard", match[0], "Write one of its words.")
