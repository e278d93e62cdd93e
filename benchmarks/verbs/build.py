"""`latentrt bench build`: how long engines take to build, how much memory it takes, and how large they are.

Every net is built into a store that is thrown away, each in a process of its own, so that each peak memory is
its own. TensorRT-RTX builds without a GPU. For ONNX Runtime the choice of layouts is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...engines.backends import BACKENDS
from ...engines.cuda.facts import DeviceFacts, available, facts
from ...engines.errors import BackendError, LatentrtError
from ...engines.package import Package
from ...engines.profiles import Profile, default_profile
from ...engines.store.engine_store import EngineStore
from ...engines.tensorrt.build import build_package, built_nets
from ...engines.tensorrt.builder import BuildOptions
from ...engines.tuning.choice import tuned_nets
from ..machine import clocks, describe_machine
from ..records import Document, Row, Status
from ..sides.contract import OURS
from .latency import Progress, describe_model, silent

TOGETHER = "every net"
OPTIONS = BuildOptions()


@dataclass(frozen=True, kw_only=True)
class Builds:
    """What is built, `repeats` times: without `profiles` for the package's own size, without `nets` all.

    The backend is one of `engines.backends.BACKENDS`; ONNX Runtime builds layouts, not engines.
    """

    backend: str = "tensorrt-rtx"
    profiles: tuple[Profile, ...] = ()
    nets: tuple[str, ...] = ()
    repeats: int = 1

    @property
    def tunes(self) -> bool:
        """Whether layouts are measured, and no engines built."""
        return self.backend in BACKENDS and BACKENDS[self.backend].builds == "layouts"

    def profiles_of(self, package: Package) -> list[Profile]:
        """The profiles, or the default one."""
        return list(self.profiles) or [default_profile(package.manifest)]


def measure_build(package: Package, builds: Builds, *, progress: Progress = silent) -> Document:
    """A row for each net, with a sample for each round; and one for all nets together.

    A net that cannot be built has a row that FAILED (not available: its library or device is missing).

    Raises:
        UsageError: a net that the package does not have.
    """
    gpu = None if available() else facts()
    case: dict[str, Any] = {"backend": builds.backend}
    if not builds.tunes:
        profiles = [str(profile) for profile in builds.profiles_of(package)]
        case |= {"profiles": profiles, "weights": OPTIONS.weights.value}
    names = tuned_nets if builds.tunes else built_nets
    row = Row(side=OURS, workload=TOGETHER, case=case, stamp={**describe_machine(), **clocks()})
    rows = {name: replace(row, workload=name) for name in names(package, builds.nets)}
    for number in range(builds.repeats):
        for name in rows if number % 2 == 0 else reversed(rows):
            if rows[name].status == "ok":
                rows[name] = found = _built(rows[name], package, builds, gpu)
                progress(f"{name}: {found.reason or f'{found.samples[-1]:.1f} s'}")
    return Document(
        benchmark="build",
        model=describe_model(package),
        settings={"backend": builds.backend, "repeats": builds.repeats, "options": OPTIONS.to_json()},
        rows=(*rows.values(), _together(row, tuple(rows.values()))),
    )


def _built(row: Row, package: Package, builds: Builds, gpu: DeviceFacts | None) -> Row:
    """The row with one more sample, or why there is none. The peak memory is that of all rounds."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = build_net(row.workload, package, builds, EngineStore(Path(folder) / "store"), gpu)
    except LatentrtError as error:
        status: Status = "not available" if isinstance(error, BackendError) else "FAILED"
        return replace(row, status=status, reason=error.found, rounds=())
    rounds = (*row.rounds, (figures.pop("seconds"),))
    if "peak_rss_gb" in figures:
        figures["peak_rss_gb"] = max(figures["peak_rss_gb"], row.figures.get("peak_rss_gb", 0.0))
    return replace(row, rounds=rounds, figures=figures)


def build_net(
    net: str, package: Package, builds: Builds, store: EngineStore, gpu: DeviceFacts | None
) -> dict[str, Any]:
    """Build the engine of one net, or choose its layout: `seconds`, and the figures of its row.

    Raises:
        LatentrtError: whatever building raises.
    """
    if builds.tunes:
        (tuned,) = BACKENDS[builds.backend].tune_package()(package, store, nets=[net])
        kept = ("layout", "milliseconds", "relative_l2", "rejected")
        return {"seconds": tuned.entry.build_seconds, **{name: tuned.entry.facts[name] for name in kept}}
    profiles = builds.profiles_of(package)
    (built,) = build_package(package, builds.backend, profiles, OPTIONS, store, nets=[net], gpu=gpu)
    known = built.entry.facts
    return {
        "library": known["library"],
        "seconds": built.entry.build_seconds,
        "peak_rss_gb": round((known["peak_rss"] or 0) / 1e9, 3),
        "engine_mb": round(built.entry.size / 1e6, 2),
    }


def _together(row: Row, nets: Sequence[Row]) -> Row:
    """One net after the other, as `latentrt build` does it: times add up, the largest peak counts."""
    for net in nets:
        if net.status != "ok":
            return replace(row, status=net.status, reason=f"{net.workload}: {net.reason}")
    rounds = tuple((sum(turn, 0.0),) for turn in zip(*(net.samples for net in nets), strict=True))
    engines = [net.figures for net in nets if "engine_mb" in net.figures]
    if not engines:
        return replace(row, rounds=rounds)
    peak = max(figures["peak_rss_gb"] for figures in engines)
    size = round(sum(figures["engine_mb"] for figures in engines), 2)
    return replace(row, rounds=rounds, figures={"peak_rss_gb": peak, "engine_mb": size})
