"""Where the TensorRT libraries differ, in one table; everything else of our code serves all of them.

`tensorrt` 10.x, `tensorrt` 11.x and `tensorrt_rtx` share the names that the builder
and the runtime call. The library is imported only by `load`, and handed on as a parameter called `trt`.
Sources: the release notes of TensorRT 10.14 to 11.4 and of TensorRT-RTX 1.7; what needs a GPU was measured.

10.14 is the oldest because its parser is the first with `Attention` (onnx-tensorrt, release_10.14-GA).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from importlib.util import find_spec
from typing import Any, TypeAlias

from ..backends import BACKENDS
from ..errors import BackendError

# The library, as a value. Its stubs are not installable beside every release, so a test of its own checks the
# calls against them, by replacing this one alias.
Trt: TypeAlias = Any
Engine: TypeAlias = Any  # ICudaEngine

Version = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One row of the table.

    Attributes:
        backend: the name users know.
        line: which releases, for people.
        module: what is imported.
        distributions: what may have installed the module, for its version without importing it.
        oldest: the first release that serves.
        before: the first release that does not any more.
        builds_without_gpu: whether the builder runs without a device. Loading an engine never does.
        needs_strongly_typed_flag: whether precision comes from the graph only with this flag; the newer
            libraries know nothing else, and accept the flag.
        reported_share: how much of a build's time the library's progress covers. TensorRT-RTX reports the
            first 2 of 86 s (the UNet of SD 1.5) and then compiles in silence.
        cache: `timing` is kept in the store and speeds builds up, `runtime` belongs to the running engine.
        hardware_compatibility: whether `hardware_compatibility_level` has an effect.
        portable: whether an engine runs on several kinds of GPU; the key then says `portable`.
        compute_capabilities: of an engine that is portable; empty where it is the building device's.
    """

    backend: str
    line: str
    module: str
    distributions: tuple[str, ...]
    oldest: Version
    before: Version
    builds_without_gpu: bool
    needs_strongly_typed_flag: bool
    reported_share: float
    cache: str
    hardware_compatibility: bool
    portable: bool
    compute_capabilities: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        """The command that installs the library."""
        return BACKENDS[self.backend].install


_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")
_RTX = ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12")
# The name in `BuilderFlag` for engines whose marked weights may be replaced; every release here has it.
REFITTABLE = "REFIT_INDIVIDUAL"
# Names in `BuilderFlag` that need a device even where the builder does not.
FLAGS_NEEDING_GPU = ("REFIT_IDENTICAL", REFITTABLE, "STRIP_PLAN")

FLAVOURS: tuple[Flavour, ...] = (
    Flavour(
        backend="tensorrt",
        line="10.14 to 10.x",
        module="tensorrt",
        distributions=_TENSORRT,
        oldest=(10, 14),
        before=(11,),
        builds_without_gpu=False,
        needs_strongly_typed_flag=True,
        reported_share=1.0,
        cache="timing",
        hardware_compatibility=True,
        portable=False,
    ),
    Flavour(
        backend="tensorrt",
        line="11.x",
        module="tensorrt",
        distributions=_TENSORRT,
        oldest=(11,),
        before=(12,),
        builds_without_gpu=False,
        needs_strongly_typed_flag=False,
        reported_share=1.0,
        cache="timing",
        hardware_compatibility=True,
        portable=False,
    ),
    Flavour(
        backend="tensorrt-rtx",
        line="1.7 to 1.x",
        module="tensorrt_rtx",
        distributions=_RTX,
        oldest=(1, 7),
        before=(2,),
        builds_without_gpu=True,
        needs_strongly_typed_flag=True,
        reported_share=0.05,
        cache="runtime",
        hardware_compatibility=False,
        portable=True,
        compute_capabilities=("8.0", "8.6", "8.9", "12.0"),
    ),
)

ENGINE_BACKENDS = tuple(row.name for row in BACKENDS.values() if row.builds == "engines")  # best first


def installed_version(backend: str) -> str | None:
    """The exact version of a backend's library, None if it is not installed; nothing is imported.

    Raises:
        BackendError: there is no such backend.
    """
    row = _rows(backend)[0]
    if find_spec(row.module) is None:
        return None
    for name in row.distributions:
        try:
            return distribution_version(name)
        except PackageNotFoundError:
            continue
    return str(load(row).__version__)  # installed by other means than pip, as on JetPack


def installed_backends() -> tuple[str, ...]:
    """The names whose library is installed, of whatever version, best first."""
    return tuple(name for name in ENGINE_BACKENDS if find_spec(_rows(name)[0].module) is not None)


def flavour(backend: str, version: str | None = None) -> Flavour:
    """The row of a backend, picked by the installed version, or by `version`.

    Raises:
        BackendError: no such backend, or its library is missing, or of a release no row covers.
    """
    rows = _rows(backend)
    version = version or installed_version(backend)
    if version is None:
        raise BackendError(
            f"the backend {backend} needs the library {rows[0].module}, which is not installed",
            expected=f"{rows[0].module} {_lines(rows)}",
            fix=f"Install it: {rows[0].install}",
        )
    for row in rows:
        if row.oldest <= _numbers(version) < row.before:
            return row
    raise BackendError(
        f"{rows[0].module} {version} is installed",
        expected=f"a release this version of latentrt knows: {_lines(rows)}",
        fix=f"Install one: {rows[0].install.replace('install', 'install --upgrade', 1)}",
    )


def load(row: Flavour) -> Trt:
    """Import the library: seconds, and hundreds of megabytes of shared objects.

    Raises:
        BackendError: it is installed and cannot be imported.
    """
    try:
        return import_module(row.module)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"{row.module} cannot be imported ({error})",
            expected=f"a working installation of {row.module}",
            fix=f"Install it again: {row.install.replace('install', 'install --force-reinstall', 1)}",
        ) from error


def _rows(backend: str) -> list[Flavour]:
    rows = [row for row in FLAVOURS if row.backend == backend]
    if not rows:
        raise BackendError(
            f"the backend {backend!r} builds no engines",
            expected=" or ".join(ENGINE_BACKENDS),
            fix=f"Choose one of these: --backend {ENGINE_BACKENDS[0]}.",
        )
    return rows


def _lines(rows: Sequence[Flavour]) -> str:
    return " or ".join(row.line for row in rows)


def _numbers(version: str) -> Version:
    """The leading numbers of a version: 10.14.1.48.post1 is (10, 14, 1, 48)."""
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a library can do when an engine runs; it tells by itself, so this needs no version numbers.

    `compiles`: it makes its kernels at run time, and can keep them.
    """

    validity: bool
    statistics: bool
    compiles: bool
    tells_capturable: bool


def abilities(trt: Trt) -> Abilities:
    """Only tensorrt_rtx has all of these; tensorrt 11 has statistics, tensorrt 10 none."""
    return Abilities(
        validity=hasattr(trt, "EngineValidity"),
        statistics=hasattr(trt, "EngineStat"),
        compiles=hasattr(trt, "CudaGraphStrategy"),
        tells_capturable=hasattr(trt.IExecutionContext, "is_stream_capturable"),
    )
