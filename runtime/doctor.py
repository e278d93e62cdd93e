"""What this machine can draw with, and what keeps it from more: `latentrt doctor`.

Whoever asks has an installation that may be broken anywhere, so every probe imports what it needs by itself,
and whatever it raises is a finding.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from ..engines.backends import BACKENDS, BackendRow
from ..engines.errors import LatentrtError
from ..engines.installed import install_command
from ..engines.processors import (
    control_groups,
    processor,
    processor_quota,
    schedulable_processors,
    usable_processors,
)

Facts = Mapping[str, Any]  # plain data, for JSON

_LIBRARIES = (
    *("numpy", "pillow", "tokenizers", "onnx-ir", "openvino", "cuda-bindings", "nvidia-ml-py"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    *("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    *("torch", "diffusers", "transformers", "onnx", "onnxscript"),
)
_NO_LIMIT = 2**60  # version 1 of control groups writes a number near 2^63 for none


@dataclass(frozen=True, kw_only=True)
class BackendFinding:
    """Whether a backend draws, and if not why.

    Attributes:
        name: of `engines.backends.BACKENDS`.
        what: library, version and device, for people; "" where it cannot run.
        seconds: that opening the shipped model and one step took; None where no picture was drawn.
        found, expected, fix: the parts of the error that drawing ends in; "" where there is none.
    """

    name: str
    what: str = ""
    seconds: float | None = None
    found: str = ""
    expected: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What `examine` found. The mappings are plain data; sizes are in bytes.

    Attributes:
        versions: of latentrt, Python, the system, and every library that is installed, by name.
        backends: one of each, the best first.
        auto: the backend that `backend="auto"` takes; "" where none can run.
        gpu: name, architecture, driver and memory of the first NVIDIA GPU; `found` where there is none.
        processors: name; how many the machine has, may be run on, may be used; the quota of a container.
        memory: total, available, and the limit of a container (None: there is none).
        store: the folder of engines: path, size, free, writable, what is in it, and the engines by backend.
        shipped: the model `demo`: path, size, and what it was made to draw.
        problems: what else is wrong, a line each.
    """

    versions: Mapping[str, str]
    backends: tuple[BackendFinding, ...]
    auto: str
    gpu: Facts
    processors: Facts
    memory: Facts
    store: Facts
    shipped: Facts
    problems: tuple[str, ...]

    @property
    def can_draw(self) -> bool:
        """Whether any backend drew a picture."""
        return any(backend.seconds is not None for backend in self.backends)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"can_draw": self.can_draw, **asdict(self)}


def examine() -> Findings:
    """Look at everything, and draw a small picture with every backend that can run. Never raises."""
    problems = list[str]()

    def probe(look: Callable[[], Facts]) -> Facts:
        try:
            return look()
        except Exception as error:  # whatever it is, it is what the caller wants to know
            problems.append(f"{look.__name__.strip('_')}: {_in_words(error)}")
            return {}

    versions = probe(_versions)
    backends = tuple(_try(row) for row in BACKENDS.values())
    runs = [one.name for one in backends if one.what and BACKENDS[one.name].builds == "layouts"]
    problems += probe(_wheels).values()
    return Findings(
        versions=versions,
        backends=backends,
        auto=next(iter(runs), ""),
        gpu=probe(_gpu),
        processors=probe(_processors),
        memory=probe(memory),
        store=probe(_store),
        shipped=probe(_shipped),
        problems=tuple(problems),
    )


def _try(row: BackendRow) -> BackendFinding:
    what = ""
    try:
        backend = row.load()
        if (refused := backend.refusal()) is not None:
            raise refused
        what = str(backend.describe())
        began = perf_counter()
        from .pipeline import Pipeline

        with Pipeline.open("demo", backend=row.name) as pipe:
            pipe("", num_inference_steps=1, seed=0, output_type="latent")
    except LatentrtError as error:
        return BackendFinding(
            name=row.name, what=what, found=error.found, expected=error.expected, fix=error.fix
        )
    except Exception as error:  # NumPy, Pillow or a library of the backend is broken
        return BackendFinding(
            name=row.name,
            what=what,
            found=_in_words(error),
            expected="libraries that can be imported",
            fix=f"Install them anew: {install_command(row.extra, '--force-reinstall')}",
        )
    return BackendFinding(name=row.name, what=what, seconds=round(perf_counter() - began, 3))


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _versions() -> dict[str, str]:
    from ..engines.onnxruntime.wheels import WHEELS

    found = {"latentrt": "not installed", "python": platform.python_version(), "system": platform.platform()}
    for name in ("latentrt", *WHEELS, *_LIBRARIES):
        with suppress(Exception):  # PackageNotFoundError, and whatever a damaged METADATA leads to
            found[name] = str(version(name))
    return found


def _wheels() -> dict[str, str]:
    from ..engines.onnxruntime.wheels import several_wheels

    text = several_wheels()
    return {"several wheels": text} if text else {}


def _gpu() -> Facts:
    from ..engines.cuda import facts

    if refused := facts.refusal():
        return {"found": refused.found, "driver": facts.Nvml("").driver()}
    gpu = facts.facts()
    return {
        "name": gpu.name,
        "architecture": gpu.sm,
        "driver": gpu.driver,
        "cuda": gpu.cuda,
        "memory": gpu.total,
        "shares_memory_with_host": gpu.unified,
    }


def _processors() -> Facts:
    return {
        "name": processor(),
        "machine": os.cpu_count(),
        "schedulable": schedulable_processors(),
        "quota": processor_quota(),
        "usable": usable_processors(),
    }


def memory() -> Facts:
    """Bytes of memory: `total`, `available`, and the `limit` of the control groups; None where not known."""
    total = available = None
    with suppress(OSError, ValueError, LookupError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, available = sizes["MemTotal"], sizes["MemAvailable"]
    if total is None and sys.platform != "win32":
        with suppress(OSError, ValueError):
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = list[int]()
    for folder in control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max": no limit
                limits.append(int((folder / name).read_text(encoding="ascii")))
    limit = min(limits, default=_NO_LIMIT)
    return {"total": total, "available": available, "limit": limit if limit < _NO_LIMIT else None}


def _store() -> Facts:
    from ..engines.store.files import default_root, folder_bytes

    root = default_root()
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    engines = dict[str, int]()
    if root.is_dir():
        from ..engines.store.engine_store import EngineStore

        for entry in EngineStore(root).entries():
            engines[entry.key.backend] = engines.get(entry.key.backend, 0) + 1
    return {
        "path": str(root),
        "exists": root.is_dir(),
        "bytes": folder_bytes(root),
        "folders": {one.name: folder_bytes(one) for one in sorted(root.iterdir())} if root.is_dir() else {},
        "free": shutil.disk_usage(there).free,
        "writable": there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        "engines": engines,
    }


def _shipped() -> Facts:
    from ..engines.package import Package
    from .model import SHIPPED

    package = Package.open(SHIPPED["demo"])
    manifest = package.manifest
    return {
        "path": str(package.root),
        "bytes": sum(record.size for record in manifest.files.values()),
        "dtype": manifest.dtype,
        "width": manifest.defaults.width,
        "height": manifest.defaults.height,
    }
