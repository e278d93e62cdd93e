"""An adapter and a model: which tensors of the model it changes, and whether everything fits.

Everything is checked here, before anything is computed: an adapter is used whole or not at all.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoints.files.file_kinds import FAMILIES, FAMILY_OF_CONTEXT, context_width
from ..engines.errors import AdapterError, command
from ..engines.spec import Array
from .files import Adapter
from .kinds.change import Change, Scaling, Site, found_at, scalar_of
from .kinds.table import BIASES, bias_change, fault_of_scale, rank_of, weight_change
from .names import FIRST, SECOND, UNET, Names, Targets
from .scaling import EVERY

if TYPE_CHECKING:
    from .embeddings import Embedding

_log = logging.getLogger("latentrt.adapters")
_LISTED = 20  # keys in a message
_ENCODERS: Mapping[str, str] = {"clip_l": FIRST, "clip_g": SECOND}
_TOKENS = "embeddings.token_embedding.weight"


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundAdapter:
    """An adapter for the tensors of one model.

    Attributes:
        path: of the file.
        name: what requests call it: its file's name without the ending.
        sha256: of the file's content.
        short_hash: A1111's, of 12 digits.
        changes: component -> tensor -> what the file does to it.
        unused: keys that the model has no tensor for: of a text encoder that it lacks, or whatever
            `allow_unused` allowed.
        embeddings: those that lie in the file: name -> "clip_l" (the first or only encoder's) or "clip_g" ->
            (vectors, width), as stored.
        words: the same as the package's text encoders take them, where a package is asked for them.
        applied: how many keys are used.
        total: how many there are.
    """

    path: Path
    name: str
    sha256: str
    short_hash: str
    changes: Mapping[str, Mapping[str, Change]]
    unused: tuple[str, ...]
    embeddings: Mapping[str, Mapping[str, Array]]
    applied: int
    total: int
    words: Mapping[str, Embedding] = field(default_factory=dict[str, "Embedding"])

    def has_hash(self, digits: str) -> bool:
        """Whether its sha256 or A1111's short hash begins with these digits, at least 8."""
        wanted = digits.lower()
        return len(wanted) >= 8 and any(known.startswith(wanted) for known in (self.sha256, self.short_hash))

    @property
    def kinds(self) -> Mapping[str, int]:
        """How many tensors are changed in which way."""
        return dict(Counter(change.kind for tensors in self.changes.values() for change in tensors.values()))


@dataclass(kw_only=True)
class _Module:
    """The parts of one module's change, by part, and the keys that they have in the file."""

    spelled: str
    parts: dict[str, Array] = field(default_factory=dict[str, Array])
    keys: dict[str, str] = field(default_factory=dict[str, str])


def bind(adapter: Adapter, targets: Targets, *, allow_unused: bool = False) -> BoundAdapter:
    """Find the tensors of a model that a file changes, and check that everything fits.

    Args:
        adapter: the file.
        targets: the model's weights: component ("unet", "text_encoder", "text_encoder_2") -> name -> shape,
            by diffusers' and transformers' names, as the checkpoint's modules have them: (out, in) for a
            linear layer.
        allow_unused: go on where the model has no tensor for some keys.

    Raises:
        AdapterError: the file is made for another base, has a key that the model has no tensor for (unless
            allowed), two changes of one tensor or half of one, or parts that do not fit. Nothing has been
            changed.
    """
    _refuse_other_base(adapter, targets)
    names = Names(targets)
    modules, absent, unknown = _sorted(adapter, names, targets)
    unknown += [
        key
        for (component, module), found in modules.items()
        for part, key in found.keys.items()
        if part in BIASES and f"{module}.bias" not in targets[component]
    ]
    if unknown and not allow_unused:
        _refuse_unknown(adapter, names, unknown)
    if not modules and not adapter.bundled:
        _refuse_foreign(adapter, targets, absent)
    changes = {component: dict[str, Change]() for component in targets}
    for (component, module), found in modules.items():
        changes[component].update(_changes(adapter, targets, component, module, found))
    _warn_of_zeros(adapter, modules, changes)
    if adapter.lacks_magnitudes:
        _log.warning("%s says that it is a DoRA, and has no magnitudes: it is used as a LoRA", adapter.path)
    embeddings, other = _embeddings(adapter, targets)
    unused = (*absent, *unknown, *other)
    if unused:
        _log.warning(
            "%s: %d of %d keys have no use in this model", adapter.path, len(unused), len(adapter.tensors)
        )
    return BoundAdapter(
        path=adapter.path,
        name=adapter.name,
        sha256=adapter.sha256,
        short_hash=adapter.short_hash,
        changes={component: found for component, found in changes.items() if found},
        unused=unused,
        embeddings=embeddings,
        applied=len(adapter.tensors) - len(unused),
        total=len(adapter.tensors),
    )


def check_alphas(adapter: Adapter) -> None:
    """Raise AdapterError for an alpha that no model could be changed with: what `bind` says of it."""
    modules: dict[str, _Module] = {}
    for name, key in adapter.parts.items():
        found = modules.setdefault(key.module, _Module(spelled=key.spelled))
        found.parts[key.part], found.keys[key.part] = adapter.tensors[name], name
    names = Names({})
    for module, found in modules.items():
        scaling = _scaling(adapter, names.absent(module) or EVERY, found.spelled, found)
        rank = rank_of(found.parts)
        fault = fault_of_scale(scaling.of(rank), rank) if rank else None
        if fault is not None:
            what, expected, fix = fault
            where = found_at(adapter.path, found.spelled[:200], what, adapter.made_for)
            raise AdapterError(where, expected=expected, fix=fix)


def _sorted(
    adapter: Adapter, names: Names, targets: Targets
) -> tuple[dict[tuple[str, str], _Module], list[str], list[str]]:
    """The parts by component and module; keys of components that the model lacks; keys that it does not know.

    Raises:
        AdapterError: two keys for one part of a module.
    """
    modules: dict[tuple[str, str], _Module] = {}
    absent: list[str] = []
    unknown: list[str] = []
    places: dict[str, tuple[str, str] | None] = {}
    for name in adapter.tensors:
        key = adapter.parts.get(name)
        if key is None:
            unknown += [] if name in adapter.bundled else [name]
            continue
        if key.module not in places:
            places[key.module] = names.find(key.module)
        place = places[key.module]
        if place is None:
            (unknown if names.absent(key.module) is None else absent).append(name)
            continue
        found = modules.setdefault(place, _Module(spelled=key.spelled))
        if key.part in found.parts:
            _refuse_twice(adapter, name, found.keys[key.part])
        found.parts[key.part], found.keys[key.part] = adapter.tensors[name], name
    unknown += _without_change(modules)
    return {place: found for place, found in modules.items() if found.parts}, absent, unknown


def _without_change(modules: Mapping[tuple[str, str], _Module]) -> list[str]:
    """Take out modules whose parts change nothing: an alpha alone, or a whole weight beside an adapter."""
    keys: list[str] = []
    for found in modules.values():
        if "weight" in found.parts and "on_input" not in found.parts:
            found.parts.pop("weight")
            keys.append(found.keys.pop("weight"))
        if found.parts.keys() <= {"alpha", "scalar", "reshape_weight"}:
            keys += found.keys.values()
            found.parts.clear()
            found.keys.clear()
    return keys


def _changes(
    adapter: Adapter, targets: Targets, component: str, module: str, found: _Module
) -> dict[str, Change]:
    """What a module's parts do to its weight and bias, by tensor."""
    scaling = _scaling(adapter, component, module, found)
    parts = {name: part for name, part in found.parts.items() if name not in BIASES}
    changes: dict[str, Change] = {}
    scale = 1.0
    if parts:
        tensor = f"{module}.weight"
        change = weight_change(_site(adapter, targets, component, tensor, found), parts, scaling)
        changes[tensor], scale = change, change.scale
    for name in BIASES:
        tensor = f"{module}.bias"
        if name not in found.parts or tensor not in targets[component]:
            continue
        site = _site(adapter, targets, component, tensor, found)
        if tensor in changes:
            site.refuse("has two differences of a bias", "one")
        if name == "up_bias" and "up" not in parts:
            site.refuse("has a bias without its factors", "lora_A and lora_B too")
        # A LoRA's bias is scaled as its product is.
        changes[tensor] = bias_change(site, name, found.parts[name], scale if name == "up_bias" else 1.0)
    return changes


def _site(adapter: Adapter, targets: Targets, component: str, tensor: str, found: _Module) -> Site:
    shape = targets[component].get(tensor)
    site = Site(
        file=adapter.path,
        key=found.spelled[:200],
        tensor=f"{component}: {tensor}",
        shape=shape or (),
        source=f"{adapter.sha256} {component} {tensor}",
        made_for=adapter.made_for,
    )
    if not shape:
        site.refuse("changes a weight that is none", "a tensor")
    return site


def _scaling(adapter: Adapter, component: str, module: str, found: _Module) -> Scaling:
    """The factor of a module: of its own alpha, else of what PEFT noted.

    Raises:
        AdapterError: an alpha or scalar is no number.
    """
    noted = adapter.scalings.get(component) or adapter.scalings.get(EVERY)
    alpha = _number(adapter, found, "alpha")
    if alpha is None and noted is not None:
        alpha = noted.alpha_of(module)
    scalar = _number(adapter, found, "scalar")
    stabilised = noted is not None and noted.stabilised
    return Scaling(alpha=alpha, stabilised=stabilised, scalar=1.0 if scalar is None else scalar)


def _number(adapter: Adapter, found: _Module, part: str) -> float | None:
    """A part that is one number, of whatever type; None where it is not there."""
    if part not in found.parts:
        return None
    array = found.parts[part]
    if array.size != 1:
        raise AdapterError(
            f"{adapter.path} has {found.keys[part]} of the shape {array.shape}",
            expected="one number",
            fix="Download the file again, or have it written again by the program that trained it.",
        )
    return scalar_of(array)


def _embeddings(adapter: Adapter, targets: Targets) -> tuple[dict[str, dict[str, Array]], list[str]]:
    """The embeddings that lie in the file, and the keys of those for encoders that the model lacks.

    Raises:
        AdapterError: one has another width than the encoder's tokens, or is there twice.
    """
    found: dict[str, dict[str, Array]] = {}
    keys: dict[tuple[str, str], str] = {}
    absent: list[str] = []
    for name, key in adapter.bundled.items():
        vectors = adapter.tensors[name]
        encoder = _ENCODERS[key.encoder]
        if encoder not in targets:
            absent.append(name)
            continue
        if (first := keys.setdefault((key.name, key.encoder), name)) != name:
            _refuse_twice(adapter, name, first)
        vectors = np.reshape(vectors, (-1, vectors.shape[-1])) if vectors.ndim in (1, 2) else vectors
        width = next(
            (shape[1] for tensor, shape in targets[encoder].items() if tensor.endswith(_TOKENS)), None
        )
        if vectors.ndim != 2 or (width is not None and vectors.shape[1] != width):
            raise AdapterError(
                f"{adapter.path} has an embedding {name[:200]} of the shape {vectors.shape}",
                expected=f"(vectors, {width or 'width'}), for {encoder}",
                fix=_other(adapter),
            )
        found.setdefault(key.name, {})[key.encoder] = vectors
    return found, absent


def _refuse_other_base(adapter: Adapter, targets: Targets) -> None:
    """Raise AdapterError where cross-attention reads another width than the adapter was trained on."""
    known = {name: header for name, header in adapter.headers.items() if name in adapter.parts}
    found = context_width(known)
    weights = targets.get(UNET, {})
    wanted = next((shape[1] for name, shape in weights.items() if name.endswith("attn2.to_k.weight")), None)
    if found is None or wanted is None or found == wanted:
        return
    raise AdapterError(
        f"{adapter.path} is made for {_base(found, 'another model')}: its attn2.to_k reads {found} numbers",
        expected=f"an adapter for {_base(wanted, 'this model')}, whose attn2.to_k reads {wanted}",
        fix=_other(adapter),
    )


def _base(width: int, otherwise: str) -> str:
    family = FAMILY_OF_CONTEXT.get(width)
    return FAMILIES[family] if family else otherwise


def _refuse_unknown(adapter: Adapter, names: Names, unknown: Sequence[str]) -> None:
    """Raise AdapterError with the keys that the model has no tensor for, and the names nearest to them."""
    listed: list[str] = []
    for name in unknown[:_LISTED]:
        key, why = adapter.parts.get(name), ""
        if key and names.find(key.module) is None:
            near = names.nearest(key.module)
            why = f" (nearest: {near})" if near else ""
        elif key:
            why = " (it has no bias)" if key.part in BIASES else f" ({key.part} alone is no change)"
        listed.append(f"{name[:200]}{why}")
    more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
    base = f", which seems to be made for {adapter.made_for}," if adapter.made_for else ""
    raise AdapterError(
        f"{adapter.path}{base} has {len(unknown)} of {len(adapter.tensors)} keys that this model has no use"
        f" for: {', '.join(listed)}{more}",
        expected="only changes of this model's tensors",
        fix="Use an adapter that was made for this model, or go on without these keys: --lora-lenient, or"
        " allow_unused=True in Python",
    )


def _refuse_foreign(adapter: Adapter, targets: Targets, absent: Sequence[str]) -> None:
    """Raise AdapterError for a file that changes nothing in this model."""
    what = (
        f"only parts that this model lacks ({', '.join(absent[:3])} …)" if absent else "nothing in this model"
    )
    raise AdapterError(
        f"{adapter.path} changes {what}",
        expected=f"changes of {', '.join(targets)}",
        fix=_other(adapter),
    )


def _other(adapter: Adapter) -> str:
    return f"Use an adapter that was made for this model: {command('latentrt', 'inspect', adapter.path)}"


def _refuse_twice(adapter: Adapter, name: str, first: str) -> None:
    raise AdapterError(
        f"{adapter.path} has two changes of one tensor: {first[:200]} and {name[:200]}",
        expected="one key for each part of a change",
        fix="Have the file written again without one of them.",
    )


def _warn_of_zeros(
    adapter: Adapter,
    modules: Mapping[tuple[str, str], _Module],
    changes: Mapping[str, Mapping[str, Change]],
) -> None:
    """Log the modules that their alpha of 0 makes change nothing.

    Trainers mean the rank by it, and never store it. Not every kind is scaled by its alpha.
    """
    zeros = [
        found.keys["alpha"]
        for (component, module), found in modules.items()
        if "alpha" in found.parts and scalar_of(found.parts["alpha"]) == 0
        if (change := changes[component].get(f"{module}.weight")) and change.scale == 0
    ]
    if zeros:
        _log.warning(
            "%s: %d modules have alpha 0 and change nothing, %s first",
            adapter.path,
            len(zeros),
            zeros[0][:200],
        )
