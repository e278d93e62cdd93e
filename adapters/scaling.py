"""What PEFT's configuration of an adapter says: alphas by module, and how they are divided by ranks.

diffusers writes it into the file's metadata, JSON under `lora_adapter_metadata` with keys such as
`unet.lora_alpha` (`loaders/lora_base.py`); PEFT itself writes `adapter_config.json` beside the file. Ranks
are those of the tensors, whatever is noted.
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
EVERY = ""  # in place of a component: what is noted of whatever the file changes
# PEFT takes the names in a pattern for regular expressions; these are what it writes itself.
_PLAIN = re.compile(r"\^?[\w.\\-]+\$?")


@dataclass(frozen=True, kw_only=True)
class NotedScaling:
    """What is noted of one component.

    Attributes:
        alpha: of modules without one of their own; None for the rank.
        alphas: by module, or by the end of its name.
        stabilised: whether alpha is divided by the root of the rank (rsLoRA).
        with_magnitudes: whether modules have magnitudes (DoRA).
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict[str, float])
    stabilised: bool = False
    with_magnitudes: bool = False

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module, by diffusers' or transformers' name."""
        name = module.removeprefix("text_model.")
        for pattern, alpha in self.alphas.items():
            if f".{name}".endswith(f".{pattern.removeprefix('text_model.')}"):
                return alpha
        return self.alpha


def read_config(path: Path) -> bytes:
    """What PEFT wrote beside its `adapter_model.safetensors`; empty where there is nothing.

    Raises:
        AdapterError: it cannot be read.
    """
    config = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not config.is_file():
        return b""
    try:
        return config.read_bytes()
    except OSError as error:
        _refuse(str(config), f"cannot be read ({error.strerror})")


def read_scalings(path: Path, metadata: Mapping[str, str], config: bytes) -> dict[str, NotedScaling]:
    """What is noted, by component: in a file's metadata, else in `config` (`read_config`) for EVERY one.

    Raises:
        AdapterError: it is not the JSON that diffusers and PEFT write.
    """
    if _METADATA in metadata:
        where = f"{path} has {_METADATA}"
        values: dict[str, dict[str, Any]] = {}
        for key, value in _object(where, metadata[_METADATA]).items():
            component, _, name = key.partition(".")
            values.setdefault(component, {})[name] = value
        return {component: _scaling(where, component, found) for component, found in values.items()}
    if not config:
        return {}
    where = f"{path} has an adapter_config.json"
    return {EVERY: _scaling(where, "config", _object(where, config))}


def _object(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        noted: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(where, f"that is not JSON ({error})")
    if not isinstance(noted, dict):
        _refuse(where, "that is no object")
    return cast(dict[str, Any], noted)


def _scaling(where: str, component: str, noted: Mapping[str, Any]) -> NotedScaling:
    patterns: object = noted.get("alpha_pattern") or dict[str, object]()
    if not isinstance(patterns, dict):
        _refuse(where, f"with {component}.alpha_pattern = {str(patterns)[:80]}")
    alphas: dict[str, float] = {}
    for name, alpha in cast(dict[str, object], patterns).items():
        if not _PLAIN.fullmatch(name):
            _refuse(where, f"with an alpha for the pattern {name[:80]!r}, which is no name")
        alphas[name.removeprefix("^").removesuffix("$").replace("\\", "")] = _number(where, name, alpha)
    alpha = noted.get("lora_alpha", noted.get("alpha"))  # of LoRA, of its relatives
    return NotedScaling(
        alpha=None if alpha is None else _number(where, f"{component}.lora_alpha", alpha),
        alphas=alphas,
        stabilised=noted.get("use_rslora") is True,
        with_magnitudes=noted.get("use_dora") is True,
    )


def _number(where: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        _refuse(where, f"with {name[:80]} = {str(value)[:80]}")
    return float(value)


def _refuse(where: str, what: str) -> NoReturn:
    raise AdapterError(
        f"{where} {what}",
        expected="the object that diffusers or PEFT writes, with numbers as alphas",
        fix="Have the adapter written again by diffusers' save_lora_weights, or PEFT's save_pretrained.",
    )
