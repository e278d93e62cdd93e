"""The adapters of a picture that is drawn again: found by name or hash, as strong as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..adapters.loaded import LoadedAdapters, Lora
from ..engines.errors import UsageError, command
from .embeddings import written_name
from .prompts.lora_tags import lora_tags, without_tags
from .record import Recorded
from .request.parameters import lora_text

if TYPE_CHECKING:
    from ..adapters.binding import BoundAdapter

# Names, alone or with strengths.
Given = Sequence["str | Lora"]


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """What a picture is drawn again with.

    Attributes:
        prompt: without tags of adapters that are given with another strength.
        loras: what to pass besides the prompt's tags.
        tagged: what these tags name.
        known: adapters that the picture calls otherwise than they are called now.
        untagged: names of adapters that have a hash and are not drawn with.
    """

    prompt: str
    loras: tuple[Lora, ...]
    tagged: tuple[Lora, ...]
    known: Mapping[str, BoundAdapter]
    untagged: tuple[str, ...]


def redrawn_adapters(
    adapters: LoadedAdapters, recorded: Recorded, prompt: str, syntax: str, given: Given | None
) -> Redrawn:
    """Find the adapters of a picture, or those that are given in place of its own.

    Args:
        adapters: that are there.
        recorded: what the picture says.
        prompt: what is drawn now.
        syntax: of the prompt; adapters are named in "a1111" alone.
        given: what to draw with in place of what the picture has besides the tags of its prompt. An adapter
            without a strength has the picture's; one that the prompt names as well gets its strength in
            place of the tag's.

    Raises:
        UsageError: one is missing, or another file than the picture's.
    """
    return _Search(adapters, recorded, prompt, syntax).found(given)


class _Search:
    def __init__(self, adapters: LoadedAdapters, recorded: Recorded, prompt: str, syntax: str) -> None:
        self._adapters = adapters
        self._hashes = {written_name(name): digits for name, digits in recorded.adapters.items()}
        self._names = tuple(recorded.adapters)
        self._passed: list[Lora] = [
            (name, strength) for name, strength in recorded.parameters.get("loras", ())
        ]
        self._syntax = syntax
        self._prompt = prompt
        self._known: dict[str, BoundAdapter] = {}

    def found(self, given: Given | None) -> Redrawn:
        pairs: list[Lora] = []
        if given is None:
            pairs = self._passed
            self._find(name for name, _ in pairs)
        else:
            for one in given:
                pairs += self._replaced(*((one, None) if isinstance(one, str) else one))
        tagged = self._tags()
        self._find(name for name, _ in tagged)
        drawn = {written_name(name) for name, _ in (*pairs, *tagged)}
        return Redrawn(
            prompt=self._prompt,
            loras=tuple(pairs),
            tagged=tagged,
            known=self._known,
            untagged=()
            if given is not None
            else tuple(n for n in self._names if written_name(n) not in drawn),
        )

    def _tags(self) -> tuple[Lora, ...]:
        return cast("tuple[Lora, ...]", lora_tags(self._prompt)) if self._syntax == "a1111" else ()

    def _replaced(self, name: str, strength: Any) -> list[Lora]:
        """What to pass for an adapter that is given; None for its strength is the picture's."""
        adapter = self._adapters.find(name)
        digits = self._hashes.get(written_name(name))
        if digits is not None and not adapter.has_hash(digits):
            raise _another(name, adapter, digits)
        same = {
            one for one, known in self._hashes.items() if one == written_name(name) or adapter.has_hash(known)
        }
        tags = [one for one, _ in self._tags() if written_name(one) in same]
        before = [(name, value) for one, value in self._passed if written_name(one) in same]
        if strength is not None:
            self._prompt = without_tags(self._prompt, tags) if tags else self._prompt
            return [(name, strength)]
        self._known |= dict.fromkeys((tag for tag in tags if tag != name), adapter)
        return before or ([] if tags else [(name, 1.0)])

    def _find(self, names: Any) -> None:
        """Look for those of these names that have a hash."""
        missing: list[str] = []
        for name in dict.fromkeys(names):
            digits = self._hashes.get(written_name(name))
            if digits is None or name in self._known:
                continue
            found = self._adapters.recorded(name, digits)
            if found is None:
                missing.append(name)
            elif not self._adapters.calls(name, found):
                self._known[name] = found
        if missing:
            self._refuse(missing)

    def _refuse(self, missing: Sequence[str]) -> None:
        """Raise UsageError for adapters that are not there, or are other files."""
        name, digits = missing[0], self._hashes[written_name(missing[0])]
        strengths = [*self._passed, *self._tags()]
        words = [
            word
            for one, strength in strengths
            for word in ("--lora", lora_text("FILE" if one in missing else one, strength))
        ]
        fix = "Pass it, with the strengths of the picture: " + command(
            "latentrt", "generate", "--from", "PICTURE", *words
        )
        if name in self._adapters.all_names():
            raise _another(name, self._adapters.find(name), digits, fix)
        others = "".join(
            f", nor {one!r:.100} ({self._hashes[written_name(one)][:12]})" for one in missing[1:]
        )
        raise UsageError(
            f"no adapter is called {name!r:.100}, and no file has its hash {digits[:12]}{others}",
            expected=f"the file with the sha256 or the hash for A1111 {digits}",
            fix=fix,
        )


def _another(name: str, found: BoundAdapter, digits: str, fix: str = "") -> UsageError:
    of = found.sha256 if len(digits) > len(found.short_hash) else found.short_hash
    return UsageError(
        f"the adapter {name!r:.100} is another file than the picture's: {of[:12]} ({found.path})",
        expected=f"the one of {digits[:12]}",
        fix=fix or "Pass the file that has it; to draw with this one, call it by another name.",
    )
