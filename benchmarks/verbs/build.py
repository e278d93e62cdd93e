"""`latentrt bench build`: how long engines take to build, how much memory it takes, and how large they are.

Every net is built into a store that is thrown away, each in a process of its own, so that each peak memory is
its own. TensorRT-RTX builds without a GPU. For ONNX Runtime the choice of layouts is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engines.backends import BACKENDS
from ...engines.cuda.facts import DeviceFacts, available, facts
from ...engines.errors import BackendError, LatentrtError
from ...engines.net_weights import engine_bytes
from ...engines.onnxruntime.tuning.choice import tuned_nets
from ...engines.package import Package
from ...engines.profiles import Profile, default_profile
from ...engines.store.engine_store import EngineStore
from ...engines.tensorrt.build import build_package, built_nets
from ...engines.tensorrt.options import BuildOptions
from ..machine import clocks, describe_machine
from ..records import Document, Row, Status
from ..sides.contract import OURS
from .latency import describe_model

Said = Callable[[str], None]

TOGETHER = "every net"


@dataclass(frozen=True, kw_only=True)
class Builds:
    """What is built.

    Attributes:
        backend: one of `engines.backends.BACKENDS`; ONNX Runtime builds layouts, not engines.
        profiles: the pictures that engines are for; none is the package's own size.
        options: of every build.
        nets: only these; none is all of them.
        folder: where the store lies meanwhile; None is the system's temporary folder.
        repeats: rounds, each into an empty store.
    """

    backend: str = "tensorrt-rtx"
    profiles: tuple[Profile, ...] = ()
    options: BuildOptions = field(default_factory=BuildOptions)
    nets: tuple[str, ...] = ()
    folder: Path | None = None
    repeats: int = 1

    @property
    def tunes(self) -> bool:
        """Whether layouts are measured, and no engines built."""
        return self.backend in BACKENDS and BACKENDS[self.backend].builds == "layouts"

    def profiles_of(self, package: Package) -> list[Profile]:
        """Those that were given, or the default one."""
        return list(self.profiles) or [default_profile(package.manifest)]


@dataclass(kw_only=True)
class _Net:
    """What was found about one net."""

    name: str
    seconds: list[float] = field(default_factory=list[float])
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    status: Status = "ok"
    reason: str = ""


def measure_build(package: Package, builds: Builds, *, said: Said = lambda line: None) -> Document:
    """A row for each net, with a sample for each round; and one for all nets together.

    A net that cannot be built has a row that FAILED (not available: its library or device is missing).

    Raises:
        UsageError: a net that the package does not have.
    """
    gpu = None if available() else facts()
    names = tuned_nets if builds.tunes else built_nets
    found = [_Net(name=name) for name in names(package, builds.nets)]
    for number in range(builds.repeats):
        for item in found if number % 2 == 0 else reversed(found):
            if item.status == "ok":
                _build(item, package, builds, gpu)
                said(f"{item.name}: {_line(item)}")
    machine, case = {**describe_machine(), **clocks()}, _case(package, builds)
    return Document(
        benchmark="build",
        model=describe_model(package),
        settings={"backend": builds.backend, "repeats": builds.repeats, "options": builds.options.to_json()},
        rows=tuple(_row(item, case, machine) for item in (*found, _together(found))),
    )


def _build(item: _Net, package: Package, builds: Builds, gpu: DeviceFacts | None) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=builds.folder) as folder:
            figures = build_net(item.name, package, builds, EngineStore(Path(folder) / "store"), gpu)
    except BackendError as error:
        item.status, item.reason = "not available", error.found
    except LatentrtError as error:
        item.status, item.reason = "FAILED", error.found
    else:
        item.seconds.append(figures.pop("seconds"))
        peak = max(figures.get("peak_rss_gb", 0.0), item.figures.get("peak_rss_gb", 0.0))
        item.figures = {**figures, "peak_rss_gb": peak} if peak else figures


def build_net(
    net: str, package: Package, builds: Builds, store: EngineStore, gpu: DeviceFacts | None
) -> dict[str, Any]:
    """Build the engine of one net, or choose its layout: `seconds`, and the figures of its row.

    Raises:
        LatentrtError: whatever building raises.
    """
    if builds.tunes:
        (tuned,) = BACKENDS[builds.backend].tune_package()(package, store, nets=[net])
        names = ("layout", "milliseconds", "relative_l2", "rejected")
        figures = {name: tuned.entry.facts[name] for name in names}
        return {"seconds": tuned.entry.build_seconds, **figures}
    profiles = builds.profiles_of(package)
    (built,) = build_package(package, builds.backend, profiles, builds.options, store, nets=[net], gpu=gpu)
    facts_of_build = built.entry.facts
    return {
        "profiles": facts_of_build["labels"],
        "seconds": built.entry.build_seconds,
        "parse_seconds": facts_of_build["parse_seconds"],
        "peak_rss_gb": round((facts_of_build["peak_rss"] or 0) / 1e9, 3),
        "weights_mb": round(engine_bytes(package, net) / 1e6, 2),
        "engine_mb": round(built.entry.size / 1e6, 2),
        "layers": facts_of_build["layers"],
        "library": facts_of_build["library"],
    }


def _line(item: _Net) -> str:
    if item.status != "ok":
        return f"{item.status}: {item.reason}"
    sizes = f", peak {item.figures['peak_rss_gb']:.2f} GB" if "peak_rss_gb" in item.figures else ""
    sizes += f", engine {item.figures['engine_mb']:.1f} MB" if "engine_mb" in item.figures else ""
    return f"{item.seconds[-1]:.1f} s{sizes}"


def _case(package: Package, builds: Builds) -> dict[str, Any]:
    if builds.tunes:
        return {"backend": builds.backend}
    profiles = [str(profile) for profile in builds.profiles_of(package)]
    return {"backend": builds.backend, "profiles": profiles, "weights": builds.options.weights.value}


def _together(found: Sequence[_Net]) -> _Net:
    """One after the other, as `latentrt build` does it: times add up, the largest peak counts."""
    missing = [item for item in found if item.status != "ok"]
    if missing:
        reason = f"{missing[0].name}: {missing[0].reason}"
        return _Net(name=TOGETHER, status=missing[0].status, reason=reason)
    seconds = [sum(turn, 0.0) for turn in zip(*(item.seconds for item in found), strict=True)]
    peaks = [item.figures["peak_rss_gb"] for item in found if "peak_rss_gb" in item.figures]
    sizes = [item.figures["engine_mb"] for item in found if "engine_mb" in item.figures]
    figures = {"peak_rss_gb": max(peaks), "engine_mb": round(sum(sizes), 2)} if peaks else {}
    return _Net(name=TOGETHER, seconds=seconds, figures=figures)


def _row(item: _Net, case: Mapping[str, Any], machine: Mapping[str, Any]) -> Row:
    return Row(
        side=OURS,
        workload=item.name,
        case=case,
        rounds=tuple((seconds,) for seconds in item.seconds) if item.status == "ok" else (),
        status=item.status,
        reason=item.reason,
        figures=item.figures,
        stamp=machine,
    )
