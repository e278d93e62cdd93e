"""The engine's key: everything that decides an engine's bytes, or whether they may be used here.

Two requests share an engine when every field is equal. `digest` names the engine's folder in the store
(`engine_store.py`), and `differences` is what a miss says. The values are plain JSON, so a key costs no heavy
import, and whoever reads a manifest can see why an engine was not taken.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from ..backends import BACKENDS

if TYPE_CHECKING:
    from ..package import Package

SCHEMA = 2  # of the key and of the store's manifest; 1 also had a field for weights that can be refitted
RECIPE = 1  # of our own building code: raise it when the same graph and flags would give another engine

_HASHES = {"graph": False, "weights": True, "contract": False}  # name -> may be empty
_MAY_BE_EMPTY = ("hardware_compatibility",)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def canonical_json(data: object) -> bytes:
    """The one spelling of `data` as JSON. Raises TypeError or ValueError for what JSON cannot express."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def canonical_sha256(data: object) -> str:
    """The sha256 (hex) of `canonical_json`, for instance of a NetSpec's `to_json()`."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def is_sha256(text: str) -> bool:
    """Whether `text` is spelled like a sha256 in lower-case hex."""
    return _SHA256.fullmatch(text) is not None


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(f"{what} is out of range or of the wrong type")


def _is_line(value: object) -> bool:
    # A miss is reported in one line, so no value may hold a line break or a terminal's control characters.
    return isinstance(value, str) and bool(value) and value.isprintable()


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Everything that decides an engine's bytes or validity.

    `graph` and `weights` are the sha256 of the .onnx and of its weights file ("" for a graph without one);
    `contract` is `canonical_sha256` of the NetSpec; `backend_version` is exact; `compute_capability` is
    `sm_89`, or `portable` for an engine built ahead of time, or `ampere_plus`; `gpu` is `DeviceFacts.kind`,
    or `any`; `driver` is its major version, or `any`; `platform` is like `linux-x86_64`. `profiles` are
    canonical texts in the engine's order, `flags` the builder's flags in alphabetical order.
    `workspace_limit` is in bytes, 0 for the library's own default; `hardware_compatibility` may be "".
    """

    net: str
    graph: str
    weights: str
    dtype: str
    contract: str
    backend: str
    backend_version: str
    compute_capability: str
    gpu: str
    driver: str
    platform: str
    profiles: tuple[str, ...]
    flags: tuple[str, ...]
    optimization_level: int
    workspace_limit: int
    hardware_compatibility: str
    recipe: int = RECIPE
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Raise ValueError for values no engine could have."""
        for item in fields(self):
            self._check(item.name, str(item.type), getattr(self, item.name))
        _require(self.dtype in ("fp16", "fp32"), "dtype")
        _require(self.backend in BACKENDS, "backend")
        _require(self.flags == tuple(sorted(set(self.flags))), "flags (sorted, each once)")

    def _check(self, name: str, kind: str, value: Any) -> None:
        if name in _HASHES:
            empty = _HASHES[name] and value == ""
            _require(empty or (isinstance(value, str) and is_sha256(value)), name)
        elif kind == "str":
            _require(_is_line(value) or (name in _MAY_BE_EMPTY and value == ""), name)
        elif kind == "int":
            _require(isinstance(value, int) and not isinstance(value, bool) and value >= 0, name)
        else:
            _require(isinstance(value, tuple) and all(map(_is_line, cast(tuple[object, ...], value))), name)

    @property
    def digest(self) -> str:
        """The sha256 (hex) of the key's canonical JSON: the name of the engine's folder."""
        return canonical_sha256(self.to_json())

    def differences(self, other: EngineKey) -> tuple[str, ...]:
        """The names of the fields in which two keys differ, in the order of declaration."""
        names = (item.name for item in fields(self))
        return tuple(name for name in names if getattr(self, name) != getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """As the manifest stores it."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**plain, "profiles": list(self.profiles), "flags": list(self.flags)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineKey:
        """The reverse of `to_json`. Raises ValueError for missing, unknown or impossible fields."""
        names = {item.name for item in fields(cls)}
        _require(isinstance(data, Mapping) and set(data) == names, "the set of fields")
        values: dict[str, Any] = dict(data)
        for name in ("profiles", "flags"):
            _require(isinstance(values[name], list), name)
            values[name] = tuple(cast(list[Any], values[name]))
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device that an engine is for: three fields of its key."""

    compute_capability: str
    gpu: str
    driver: str


ANYWHERE = Target(compute_capability="portable", gpu="any", driver="any")


def package_key(
    package: Package,
    net: str,
    *,
    backend: str,
    version: str,
    target: Target,
    profiles: Iterable[str] = (),
    flags: Iterable[str] = (),
    optimization_level: int = 0,
    workspace_limit: int = 0,
    hardware_compatibility: str = "",
) -> EngineKey:
    """The key of a net of a package on this machine's platform; the other arguments are fields of the key."""
    manifest = package.manifest
    file = manifest.nets[net]
    return EngineKey(
        net=net,
        graph=manifest.files[file.graph].sha256,
        weights=_weights_sha256([manifest.files[name].sha256 for name in file.weights]),
        dtype=manifest.dtype,
        contract=canonical_sha256(file.spec.to_json()),
        backend=backend,
        backend_version=version,
        compute_capability=target.compute_capability,
        gpu=target.gpu,
        driver=target.driver,
        platform=f"{sys.platform}-{platform.machine().lower()}",
        profiles=tuple(profiles),
        flags=tuple(flags),
        optimization_level=optimization_level,
        workspace_limit=workspace_limit,
        hardware_compatibility=hardware_compatibility,
    )


def _weights_sha256(files: list[str]) -> str:
    """The sha256 of a net's weights: that of its file, or over those of its several files."""
    return canonical_sha256(files) if files[1:] else next(iter(files), "")


def miss_reason(wanted: EngineKey, built: Iterable[EngineKey]) -> str:
    """Say in one line why none of the `built` engines is the `wanted` one.

    Only an engine of the same net and backend, or of the same graph, explains anything; of those, the one
    that differs in the fewest fields (the first of several).
    """
    near = [
        key
        for key in built
        if key.graph == wanted.graph or (key.net == wanted.net and key.backend == wanted.backend)
    ]
    if not near:
        return f"no engine of {wanted.net} for {wanted.backend} has been built yet"
    nearest = min(near, key=lambda key: len(wanted.differences(key)))
    parts = [
        f"{name} ({_shown(there, here)} there, {_shown(here, there)} here)"
        for name in wanted.differences(nearest)
        for there, here in [(getattr(nearest, name), getattr(wanted, name))]
    ]
    return f"the nearest engine, of {nearest.net}, differs in {', '.join(parts)}"


def _shown(value: Any, other: Any) -> str:
    """`value` in a few characters; a tuple without the items that `other` has too."""
    if isinstance(value, tuple):
        items = cast(tuple[str, ...], value)
        text = " ".join([item for item in items if item not in other] or items)
    else:
        text = str(value)
    if is_sha256(text):
        return f"{text[:12]}…"
    return (text if len(text) <= 60 else f"{text[:59]}…") or "none"
