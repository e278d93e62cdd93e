"""Which tensor of a model an adapter's module means: a dictionary made of the model's own names.

An underscore may stand for a dot or for itself, so names are not taken apart: every module of the model is
written in every spelling, and looked up. The spellings are those of sd-scripts, diffusers, PEFT,
latent-diffusion (SDXL's trainers), LyCORIS, OneTrainer and ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile

from ..checkpoints.files.ldm_names import original_unet_names
from .keys import flat

# Weights by component ("unet", "text_encoder", "text_encoder_2"), by diffusers' or transformers' name, with
# the shape that the checkpoint's module has.
Targets = Mapping[str, Mapping[str, tuple[int, ...]]]
UNET, FIRST, SECOND = "unet", "text_encoder", "text_encoder_2"
# The first words of sd-scripts' and LyCORIS' prefixes.
_KINDS = ("lora", "lycoris", "oft")
# A component -> what stands before its modules' names.
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    UNET: (*(f"{kind}_unet_" for kind in _KINDS), "unet_", "model_diffusion_model_", "diffusion_model_"),
    FIRST: (
        *(f"{kind}_{part}_" for kind in _KINDS for part in ("te", "te1")),
        "text_encoder_",
        *(f"{place}{tower}_" for place in ("", "text_encoders_") for tower in ("clip_l", "clip_h")),
        *(
            f"{place}{tower}_transformer_"
            for place in ("", "text_encoders_")
            for tower in ("clip_l", "clip_h")
        ),
        *("cond_stage_model_transformer_", "conditioner_embedders_0_transformer_"),
    ),
    SECOND: (
        *(f"{kind}_te2_" for kind in _KINDS),
        "text_encoder_2_",
        *(f"{place}clip_g_{end}" for place in ("", "text_encoders_") for end in ("", "transformer_")),
    ),
}
# Prefixes without a component, whose modules are looked for in every one.
_ANYWHERE = ("lycoris_", "")
# sd-scripts' and LyCORIS' for a model with one text encoder, which is the refiner's second of SDXL.
_ONLY_ENCODER = tuple(f"{kind}_te_" for kind in _KINDS)


class Names:
    """The modules of a model by every name that adapters have for them."""

    def __init__(self, targets: Targets) -> None:
        self._modules = {component: _spellings(component, weights) for component, weights in targets.items()}
        prefixes = {name: list(_PREFIXES.get(name, ())) for name in {**_PREFIXES, **targets}}
        if FIRST not in targets:
            prefixes[SECOND] += _ONLY_ENCODER
            prefixes[FIRST] = [name for name in prefixes[FIRST] if name not in _ONLY_ENCODER]
        self._prefixes = prefixes

    def find(self, module: str) -> tuple[str, str] | None:
        """The component and the module of it that a flattened name means; None for no or several."""
        found = {
            (component, modules[rest])
            for component, modules in self._modules.items()
            for rest in self._rests(component, module)
            if rest in modules
        }
        return found.pop() if len(found) == 1 else None

    def absent(self, module: str) -> str | None:
        """The component that a name says it belongs to, which the model lacks; None for others."""
        lacking = (name for name in self._prefixes if name not in self._modules)
        return next((name for name in lacking if module.startswith(tuple(self._prefixes[name]))), None)

    def nearest(self, module: str) -> str | None:
        """The known name that begins and ends most like an unknown one, in the same spelling."""
        rests = {component: min(self._rests(component, module), key=len) for component in self._modules}
        shortest = min(map(len, rests.values()), default=0)
        known = (
            module[: len(module) - shortest] + name
            for component, rest in rests.items()
            if len(rest) == shortest
            for name in self._modules[component]
        )
        return max(known, key=lambda name: _likeness(name, module), default=None)

    def _rests(self, component: str, module: str) -> Iterator[str]:
        """The name without each prefix of a component that it begins with."""
        for prefix in (*self._prefixes[component], *_ANYWHERE):
            if module.startswith(prefix):
                yield module.removeprefix(prefix)


def modules_of(weights: Iterable[str]) -> dict[str, None]:
    """The modules that tensors belong to, in their order."""
    return dict.fromkeys(name.rpartition(".")[0] for name in weights if name.endswith((".weight", ".bias")))


def _spellings(component: str, weights: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """A component's modules by their flattened names, without what could mean two."""
    modules = modules_of(weights)
    originals = original_unet_names(modules) if component == UNET else {}
    found: dict[str, str] = {}
    twice: set[str] = set()
    for module in modules:
        for name in {flat(name) for name in _names(module, originals.get(module))}:
            if found.setdefault(name, module) != module:
                twice.add(name)
    return {name: module for name, module in found.items() if name not in twice}


def _names(module: str, original: str | None) -> Iterator[str]:
    yield module
    if original is not None:
        yield original
    for name in (module, original or ""):
        if name.endswith("to_out.0"):
            yield name.removesuffix(".0")
    bare = module.removeprefix("text_model.")
    for name in (module, bare):  # transformers 5.6 and later leave `text_model.` out
        yield name
        yield re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", name)  # diffusers' before PEFT


def _likeness(name: str, other: str) -> int:
    """How many letters the beginnings and the ends have in common."""
    pairs = (zip(name, other, strict=False), zip(name[::-1], other[::-1], strict=False))
    return sum(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], letters)) for letters in pairs)
