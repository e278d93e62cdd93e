"""What PEFT's configuration of an adapter says: alphas by module, and how they are divided by ranks.

diffusers writes it into the file's metadata, JSON under `lora_adapter_metadata` with keys such as
`unet.lora_alpha` (`loaders/lora_base.py`). Ranks are those of the tensors, whatever is noted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, cast

from ..engines.errors import AdapterError

_METADATA = "lora_adapter_metadata"
# PEFT takes the names in a pattern for regular expressions; these are what it writes itself.
_PLAIN = re.compile(r"\^?[\w.\\-]+\$?")


@dataclass(frozen=True, kw_only=True)
class NotedScaling:
    """What is noted of one component.

    Attributes:
        alpha: of modules without one of their own; None for the rank.
        alphas: by module, or by the end of its name.
        stabilised: whether alpha is divided by the root of the rank (rsLoRA).
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict[str, float])
    stabilised: bool = False

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module, by diffusers' or transformers' name."""
        name = module.removeprefix("text_model.")
        for pattern, alpha in self.alphas.items():
            if f".{name}".endswith(f".{pattern.removeprefix('text_model.')}"):
                return alpha
        return self.alpha


def read_scalings(path: Path, metadata: Mapping[str, str]) -> dict[str, NotedScaling]:
    """What a file's metadata note, by component. Empty for files without.

    Raises:
        AdapterError: it is not the JSON that diffusers writes.
    """
    if _METADATA not in metadata:
        return {}
    try:
        noted: object = json.loads(metadata[_METADATA])
    except (ValueError, RecursionError) as error:
        _refuse(path, f"that is not JSON ({error})")
    if not isinstance(noted, dict):
        _refuse(path, "that is no object")
    values: dict[str, dict[str, Any]] = {}
    for key, value in cast(dict[str, object], noted).items():
        component, _, name = key.partition(".")
        values.setdefault(component, {})[name] = value
    return {component: _scaling(path, component, found) for component, found in values.items()}


def _scaling(path: Path, component: str, noted: Mapping[str, Any]) -> NotedScaling:
    patterns: object = noted.get("alpha_pattern") or dict[str, object]()
    if not isinstance(patterns, dict):
        _refuse(path, f"with {component}.alpha_pattern = {str(patterns)[:80]}")
    alphas: dict[str, float] = {}
    for name, alpha in cast(dict[str, object], patterns).items():
        if not _PLAIN.fullmatch(name):
            _refuse(path, f"with an alpha for the pattern {name[:80]!r}, which is no name")
        alphas[name.removeprefix("^").removesuffix("$").replace("\\", "")] = _number(path, name, alpha)
    alpha = noted.get("lora_alpha")
    return NotedScaling(
        alpha=None if alpha is None else _number(path, f"{component}.lora_alpha", alpha),
        alphas=alphas,
        stabilised=noted.get("use_rslora") is True,
    )


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        _refuse(path, f"with {name[:80]} = {str(value)[:80]}")
    return float(value)


def _refuse(path: Path, what: str) -> NoReturn:
    raise AdapterError(
        f"{path} has {_METADATA} {what}",
        expected="the object that diffusers writes, with numbers as alphas",
        fix="Have it written again by diffusers' save_lora_weights.",
    )
