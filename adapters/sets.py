"""Adapters with their strengths, as one set: what of a model they change, and by how much.

Strengths are those of diffusers' `set_adapters` (docs: "LoRA", "set_adapters"): a number, or one for each
component ("unet", "text_encoder", "text_encoder_2"), and for the UNet one for "down", "mid" and "up" or for
each "block_N" of them. What a mapping leaves out is 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

from ..engines.errors import UsageError
from ..engines.package import Change

if TYPE_CHECKING:
    from .binding import BoundAdapter
    from .embeddings import Embedding

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
MOST = 16  # adapters of one set
_LARGEST = 100.0
_SECTIONS = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks."}
_WANTED = (
    "a number from -100 to 100, or one for each of unet, text_encoder, text_encoder_2;"
    " for the unet also for down, mid, up and their block_0, block_1, …"
)


@dataclass(frozen=True, kw_only=True)
class Strength:
    """How strongly an adapter changes a model.

    Attributes:
        value: as it was given.
        parts: (component, beginning of a weight's name, strength), the longer beginnings later.
    """

    value: Any
    parts: tuple[tuple[str, str, float], ...]

    @classmethod
    def parse(cls, value: Any) -> Strength:
        """From a number or a mapping as above. Raises UsageError for anything else."""
        if not isinstance(value, Mapping):
            number = _number(value, value)
            return cls(value=value, parts=tuple((component, "", number) for component in COMPONENTS))
        given = cast("Mapping[Any, Any]", value)
        if unknown := [name for name in given if name not in COMPONENTS]:
            raise _refusal(value, f"no component {unknown[0]!r}")
        parts = [part for name in COMPONENTS for part in _component(name, given.get(name, 1.0), value)]
        return cls(value=value, parts=tuple(parts))

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


def _component(component: str, value: Any, whole: Any) -> list[tuple[str, str, float]]:
    if not isinstance(value, Mapping):
        return [(component, "", _number(value, whole))]
    if component != "unet":
        raise _refusal(whole, f"blocks of {component}")
    parts: list[tuple[str, str, float]] = []
    for section, inside in cast("Mapping[Any, Any]", value).items():
        if section not in _SECTIONS:
            raise _refusal(whole, f"no section {section!r}")
        beginning = _SECTIONS[section]
        if not isinstance(inside, Mapping):
            parts.append((component, beginning, _number(inside, whole)))
            continue
        for block, strength in cast("Mapping[Any, Any]", inside).items():
            number = str(block).removeprefix("block_")
            if section == "mid" or not (str(block).startswith("block_") and number.isdecimal()):
                raise _refusal(whole, f"no block {block!r} of {section!r}")
            parts += _block(component, f"{beginning}{int(number)}.", strength, whole)
    return parts


def _block(component: str, beginning: str, strength: Any, whole: Any) -> list[tuple[str, str, float]]:
    """A block's strength, or one for each of its layers: an attention and the convolutions before it."""
    if isinstance(strength, (list, tuple)):
        layers = cast("Sequence[Any]", strength)
        return [
            (component, f"{beginning}{kind}.{index}.", _number(one, whole))
            for index, one in enumerate(layers)
            for kind in ("attentions", "resnets")
        ]
    return [(component, beginning, _number(strength, whole))]


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
        """The same for sets that change the same in the same way; "" where nothing is changed."""
        if not self.changes:
            return ""
        facts = [(adapter.sha256, strength.parts) for _, adapter, strength in self.adapters]
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
