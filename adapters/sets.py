"""Adapters with their strengths, as one set: what of a model they change, and by how much.

Strengths are those of diffusers' `set_adapters` (docs: "LoRA", "set_adapters"): a number, or one for each
component ("unet", "text_encoder", "text_encoder_2"), and for the UNet one for "down", "mid" and "up" or for
each "block_N" of "down" and "up", or a list with one for each layer of a block; a list of one is for all.
What a mapping leaves out is 1.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

from ..engines.errors import UsageError
from ..engines.package import Change

if TYPE_CHECKING:
    from typing import TypeGuard

    from .binding import BoundAdapter
    from .embeddings import Embedding

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
MOST = 16  # adapters of one set
_LARGEST = 100.0
_BLOCKS, _MIDDLE = ("down", "up"), "mid"
_LAYER = re.compile(r"(?P<section>down|up)_blocks\.(?P<block>\d+)\.(resnets|attentions)\.(?P<layer>\d+)\.")
Weights = Mapping[str, Iterable[str]]  # the names of a model's weights, by component
_Part = tuple[str, str, float]
_Layers = dict[str, dict[str, int]]  # of a UNet: "down" or "up" -> number of a block -> how many layers
_WANTED = (
    "a number from -100 to 100, or one for each of unet, text_encoder, text_encoder_2; for the unet also for"
    " down, mid, up, for block_0, block_1, … of down and up, or a list for a block's layers"
)


@dataclass(frozen=True, kw_only=True)
class Strength:
    """How strongly an adapter changes a model.

    Attributes:
        value: as it was given, in numbers that JSON has.
        parts: (component, beginning of a weight's name, strength), the longer beginnings later.
    """

    value: Any
    parts: tuple[_Part, ...]

    @classmethod
    def parse(cls, value: Any, weights: Weights | None = None) -> Strength:
        """From a number or a mapping as above.

        Args:
            value: the number or mapping.
            weights: the model's, whose blocks it may name; without them any block may be named.

        Raises:
            UsageError: it is anything else, or names a block that the model lacks, or has another number of
                strengths for a block than that has layers.
        """
        if not isinstance(value, Mapping):
            number = _number(value, value)
            return cls(value=_plain(value), parts=tuple((component, "", number) for component in COMPONENTS))
        given = cast("Mapping[Any, Any]", value)
        if unknown := [name for name in given if name not in COMPONENTS]:
            raise _refusal(value, f"no component {unknown[0]!r}")
        layers = None if weights is None else _layers(weights.get("unet", ()))
        parts = [
            part for name in COMPONENTS for part in _component(name, given.get(name, 1.0), layers, value)
        ]
        return cls(value=_plain(given), parts=tuple(parts))

    @property
    def is_off(self) -> bool:
        """Whether it is 0 everywhere."""
        return not any(strength for _, _, strength in self.parts)

    def of(self, component: str, weight: str) -> float:
        """The strength on one weight of a component."""
        found = 1.0
        for name, beginning, strength in self.parts:
            if name == component and weight.startswith(beginning):
                found = strength
        return found


def _layers(weights: Iterable[str]) -> _Layers:
    """How many layers each block of a UNet has: an attention and the convolutions before it are one."""
    found: _Layers = {section: {} for section in _BLOCKS}
    for match in filter(None, map(_LAYER.match, weights)):
        blocks = found[match["section"]]
        blocks[match["block"]] = max(blocks.get(match["block"], 0), int(match["layer"]) + 1)
    return found


def _component(component: str, value: Any, layers: _Layers | None, whole: Any) -> list[_Part]:
    if not isinstance(value, Mapping):
        return [(component, "", _number(value, whole))]
    if component != "unet":
        raise _refusal(whole, f"blocks of {component}")
    parts: list[_Part] = []
    for section, inside in cast("Mapping[Any, Any]", value).items():
        if section == _MIDDLE:
            parts.append((component, "mid_block.", _number(_only(inside), whole)))
        elif section in _BLOCKS:
            parts += _section(section, inside, layers, whole)
        else:
            raise _refusal(whole, f"no section {section!r}")
    return parts


def _section(section: str, value: Any, layers: _Layers | None, whole: Any) -> list[_Part]:
    """The strengths of "down" or "up": one, or those of blocks; a list is for each block, as in diffusers."""
    known = None if layers is None else layers[section]
    if _is_list(value):
        if known is None:  # which blocks there are is known later
            for one in value:
                _number(one, whole)
            return []
        value = {f"block_{block}": value for block in known}
    if not isinstance(value, Mapping):
        return [("unet", f"{section}_blocks.", _number(value, whole))]
    parts: list[_Part] = []
    for name, strength in cast("Mapping[Any, Any]", value).items():
        block = str(name).removeprefix("block_")
        if f"block_{block}" != name or not block.isdecimal() or (known is not None and block not in known):
            blocks = (
                f": it has {', '.join(f'block_{one}' for one in sorted(known, key=int))}" if known else ""
            )
            raise _refusal(whole, f"no block {name!r} of {section!r}{blocks}")
        beginning = f"{section}_blocks.{block}."
        given = _only(strength)
        if not _is_list(given):
            parts.append(("unet", beginning, _number(given, whole)))
            continue
        if known is not None and len(given) != known[block]:
            layers_of = f"{known[block]} layer{'s' * (known[block] != 1)}"
            raise _refusal(whole, f"{len(given)} strengths for {section}.{name}, which has {layers_of}")
        parts += [
            ("unet", f"{beginning}{kind}.{index}.", _number(one, whole))
            for index, one in enumerate(given)
            for kind in ("attentions", "resnets")
        ]
    return parts


def _plain(value: Any) -> Any:
    """A strength with NumPy's numbers, and others, as Python's own."""
    if isinstance(value, Mapping):
        return {name: _plain(inside) for name, inside in cast("Mapping[str, Any]", value).items()}
    if _is_list(value):
        return [_plain(one) for one in value]
    return value if type(value) in (int, float) else float(value)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def _only(value: Any) -> Any:
    """What a list of one has in it; anything else as it is."""
    return value[0] if _is_list(value) and len(value) == 1 else value


def _number(value: Any, whole: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(float(value)) <= _LARGEST:
        raise _refusal(whole, f"{value!r:.40}")
    return float(value)


def _refusal(whole: Any, found: str) -> UsageError:
    return UsageError(
        f"the strength of an adapter is {whole!r:.100} ({found})",
        expected=_WANTED,
        fix="Change the strength.",
    )


def check_count(adapters: Sequence[object]) -> None:
    """Raise UsageError for more adapters than a set may have."""
    if len(adapters) > MOST:
        raise UsageError(f"{len(adapters)} adapters", expected=f"at most {MOST}", fix="Use fewer.")


def _tells(adapter: BoundAdapter, strength: Strength) -> bool:
    """Whether an adapter changes a weight at this strength."""
    return any(strength.of(part, name) for part, weights in adapter.changes.items() for name in weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterSet:
    """Adapters in the order in which they are applied, each with its strength.

    An adapter may come twice: its strengths add up where it is additive, as in AUTOMATIC1111.

    Attributes:
        adapters: the names that they were asked for by, what these are, and how strong.
        tagged: how many of the last ones a prompt names.
    """

    adapters: tuple[tuple[str, BoundAdapter, Strength], ...] = ()
    tagged: int = 0

    @cached_property
    def changes(self) -> Mapping[str, Mapping[str, Change]]:
        """By component and weight, what the set makes of it; weights at strength 0 are left out."""
        from .merging import merged  # here: most pictures are drawn without

        found: dict[str, dict[str, list[tuple[Any, float]]]] = {}
        for _, adapter, strength in self.adapters:
            for component, weights in adapter.changes.items():
                for weight, change in weights.items():
                    if share := strength.of(component, weight):
                        found.setdefault(component, {}).setdefault(weight, []).append((change, share))
        return {
            component: {weight: partial(merged, changes=parts) for weight, parts in weights.items()}
            for component, weights in found.items()
        }

    @cached_property
    def words(self) -> Mapping[str, Sequence[Embedding]]:
        """The embeddings that lie in files of the set, by word: one of each file that has it.

        Strengths do not scale them, but what is at strength 0 everywhere is not there.
        """
        found: dict[str, list[Embedding]] = {}
        for name, adapter, strength in self.adapters:
            if strength.is_off:
                continue
            for word, embedding in adapter.words.items():
                found.setdefault(word, []).append(replace(embedding, adapter=name))
        return found

    @cached_property
    def key(self) -> str:
        """The same for sets that change the same in the same way; "" where nothing is changed.

        Adapters that a set has at strength 0 are no part of it.
        """
        if not self.changes:
            return ""
        facts = [(one.sha256, strength.parts) for _, one, strength in self.adapters if _tells(one, strength)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What a picture's record says: `loras`, as they can be passed again, and which files they were."""
        if not self.adapters:
            return {}
        passed = self.adapters[: len(self.adapters) - self.tagged]
        loras = {"loras": [[name, strength.value] for name, _, strength in passed]} if passed else {}
        return {
            **loras,
            "adapters": {
                name: {
                    "sha256": adapter.sha256,
                    "short_hash": adapter.short_hash,
                    "applied": adapter.applied,
                    "total": adapter.total,
                }
                for name, adapter, _ in self.adapters
            },
        }
