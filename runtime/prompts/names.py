"""Where prompts call embeddings of textual inversion by their names.

A name is found as a whole word wherever it stands, the longest first: neither in another word (`cat` in
`scat` or `cat-2`), nor in a number. AUTOMATIC1111 compares ids of tokens instead, and so finds `1a1` in
`21a1`; diffusers and stable-diffusion.cpp find names in other words; ComfyUI wants `embedding:` in front.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

from ...engines.errors import UsageError
from .chunks import Fragment

# What may not stand before and behind a name that begins or ends with a letter, a digit or an underscore.
_NOT_BEFORE = r"(?<!\w)(?<!\w-)(?<!\d\.)"
_NOT_BEHIND = r"(?!\w|-\w|\.\d)"
# The same behind a name that `embedding:` calls, which may have a file's ending.
_ENDING = r"(?:\.(?:safetensors|pt|bin))?(?!\w|[-./]\w)"

_LISTED = 10  # names in a message
# What to do about an embedding that is not there.
LOAD = "Load it: pipe.load_textual_inversion(FILE), or the folder that has its file: --embd-dir FOLDER"


@dataclass(frozen=True, kw_only=True)
class NameRules:
    """How a prompt syntax calls embeddings.

    Attributes:
        before: a pattern of what stands before a name that must be known; None where nothing does.
        bare: which names count by themselves: "none"; those that were "given" with an embedding; or "all",
            those of files too.
        flags: of `re`.
    """

    before: str | None = None
    bare: str = "none"
    flags: int = 0


# every character is text but for the words that the caller gave, as in diffusers
PLAIN = NameRules(bare="given")
A1111 = NameRules(before=r"(?<!\w)embedding:(?=\S)", bare="all", flags=re.IGNORECASE)
COMFYUI = NameRules(before=r"(?:^|(?<=\s))embedding:\s*")


def find_embeddings(
    fragments: Sequence[Fragment], rules: NameRules, names: Collection[str]
) -> tuple[Fragment, ...]:
    """Cut fragments at the embeddings that they call.

    Args:
        fragments: of one prompt, as its syntax parses it.
        rules: of the syntax.
        names: those that are known, without what `rules.bare` does not let count.

    Raises:
        UsageError: a name behind `embedding:` that is not known, or that two have but for their capitals.
    """
    pattern = _pattern(rules, tuple(sorted(names, key=lambda name: (-len(name), name))))
    if pattern is None:
        return tuple(fragments)
    pieces = (
        [fragment] if fragment.ends_chunk else _pieces(fragment, pattern, rules, names)
        for fragment in fragments
    )
    return tuple(chain.from_iterable(pieces))


def _pieces(
    fragment: Fragment, pattern: re.Pattern[str], rules: NameRules, names: Collection[str]
) -> Iterator[Fragment]:
    text, end = fragment.text, 0
    for match in pattern.finditer(text):
        found = match.groupdict()
        called = found.get("called") or found.get("bare")
        if called is None:
            raise _unknown(match[0], found.get("unknown") or "", names)
        if end < match.start():
            yield replace(fragment, text=text[end : match.start()])
        yield replace(fragment, text=match[0], embedding=_spelled_as(called, rules, names))
        end = match.end()
    if end < len(text) or not text:
        yield replace(fragment, text=text[end:])


@lru_cache(maxsize=64)
def _pattern(rules: NameRules, names: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds names; the first are preferred."""
    ways: list[str] = []
    if rules.before is not None:
        known = f"(?P<called>{'|'.join(map(_spelled, names))}){_ENDING}|" if names else ""
        ways.append(rf"{rules.before}(?:{known}(?P<unknown>\S*))")
    if rules.bare != "none" and names:
        ways.append(f"(?P<bare>{_bare(names)})")
    return re.compile("|".join(ways), rules.flags) if ways else None


def _bare(names: Sequence[str]) -> str:
    """Names as whole words. What may not stand before them is looked at once for all, which is fast."""
    ways: list[str] = []
    for pattern, before in ((r"\w", _NOT_BEFORE), (r"\W", "")):
        some = [name for name in names if re.match(pattern, name)]
        if some:
            spelled = (_spelled(name) + (_NOT_BEHIND if re.search(r"\w$", name) else "") for name in some)
            ways.append(f"{before}(?:{'|'.join(spelled)})")
    return "|".join(ways)


def _spelled(name: str) -> str:
    """A pattern of the name, with any white space where it has some."""
    return r"\s+".join(map(re.escape, name.split()))


def _spelled_as(found: str, rules: NameRules, names: Collection[str]) -> str:
    """The name that a text is: letter by letter, else the only one with other capitals."""
    for flags in (0, rules.flags):
        same = sorted(name for name in names if re.fullmatch(_spelled(name), found, flags))
        if len(same) == 1:
            return same[0]
    raise UsageError(
        f"the prompt has {found!r}, and embeddings are called {' and '.join(map(repr, same))}",
        expected="a name that one of them has",
        fix="Write it with the same capitals.",
    )


def _unknown(found: str, rest: str, names: Collection[str]) -> UsageError:
    from difflib import get_close_matches

    name = re.split(r"[<\[]", rest)[0].strip(",").rstrip(".;:!?")
    near = get_close_matches(name, list(names), n=3, cutoff=0.4)
    some = ", ".join(map(repr, sorted(names)[:_LISTED]))
    known = f"one of the {len(names)} that are known: {some}" if names else "no call, because none is known"
    return UsageError(
        f"the prompt calls {found.strip()!r:.80}, and no embedding is called {name!r:.60}",
        expected=f"one of the {len(names)} that are known, such as {', '.join(map(repr, near))}"
        if near
        else known,
        fix=LOAD,
    )
