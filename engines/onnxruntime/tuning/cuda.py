"""The layouts of ONNX Runtime's CUDA nets, measured on the device at hand and remembered in the engine store.

An entry of the store is one net on one kind of GPU, with one release of ONNX Runtime: `engine.bin` is the
graph of the layout that won, whose weights are still the package's, and the facts are the figures. `latentrt
build PACKAGE --backend onnxruntime-cuda` measures; opening a net only looks, so that it takes as long every
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from ...cuda.device import CudaDevice
from ...cuda.facts import DeviceFacts
from ...device import Device
from ...errors import BackendError, LatentrtError, UsageError
from ...package import Package
from ...profiles import NetProfile, fixed_profile, net_profiles
from ...store.engine_store import EngineStore, Miss
from ...store.entry import Entry
from ...store.key import EngineKey
from ...tensorrt.build import BuildProgress, OnProgress, engine_key
from ...tensorrt.options import BuildOptions
from ..backend import library
from ..nets import cuda_available, open_onnxruntime_net
from .choice import LAYOUTS, ROUNDS, TUNED_NETS, WARM_UP, Choice, Layout, choose_layout
from .trials import OpenNet, Report, Trials

BACKEND = "onnxruntime-cuda"


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Of engine: what is fast on one GPU need not be on another."""

    backend: str = BACKEND
    portable: bool = False


class Measure(Protocol):
    """Finds the fastest layout of a net."""

    def __call__(self, net: str, path: Path, report: Report) -> dict[str, Any]:
        """Write its graph to `path`; the figures that led to it."""
        ...


class KnownDevice(Device, Protocol):
    """A device that knows what it is."""

    @property
    def facts(self) -> DeviceFacts:
        """For the engine's key."""
        ...


@dataclass(frozen=True, kw_only=True)
class TunedNet:
    """A net whose layout is in the store now. `why` it had to be measured; "" where it was there before."""

    net: str
    entry: Entry
    why: str

    @property
    def layout(self) -> str:
        """The one that was chosen."""
        return str(self.entry.facts["layout"])


@dataclass(frozen=True, kw_only=True)
class StoredLayout:
    """What the store knows of a net.

    Attributes:
        layout: the one that was chosen; `plain` where nothing is known.
        graph: its graph; None where that is the package's own.
        why: nothing is known; "" otherwise.
    """

    layout: Layout
    graph: bytes | None
    why: str


def tuning_command(package: Package) -> str:
    """The command that measures."""
    return f"latentrt build {package.root} --backend {BACKEND}"


def lowering_missing() -> str | None:
    """None if graphs can be lowered here, else the reason."""
    return None if find_spec("onnx_ir") else "onnx-ir is not installed"


def measured_profile(package: Package, net: str) -> NetProfile:
    """The shapes a net is measured with: one picture of the package's default size, with guidance.

    `shapes[name][1]` is the shape of an input. Raises PackageError for a symbol this release does not know.
    """
    manifest = package.manifest
    size = manifest.defaults.width, manifest.defaults.height
    picture = fixed_profile(*size, batch=1, tokens=manifest.max_tokens)
    return net_profiles(net, manifest.nets[net].spec, [picture])[0]


def layout_key(package: Package, net: str, gpu: DeviceFacts, version: str | None = None) -> EngineKey:
    """Under which the store has a net's layout; `version` is the installed onnxruntime's unless given."""
    version = version or str(library().__version__)
    profiles = [measured_profile(package, net)]
    key = engine_key(package, net, _Kind(), version, profiles, BuildOptions(), gpu=gpu)
    # A release that knows other layouts has to measure again; a level of optimisation there is none.
    return replace(key, flags=tuple(sorted(LAYOUTS)), optimization_level=0)


def stored_layout(package: Package, net: str, store: EngineStore, gpu: DeviceFacts) -> StoredLayout:
    """What was measured here before; never raises for what is wrong with the store: `plain` needs none."""
    plain = LAYOUTS["plain"]
    try:
        found = store.find(layout_key(package, net, gpu))
        if isinstance(found, Miss):
            return StoredLayout(layout=plain, graph=None, why=found.reason)
        layout = LAYOUTS[str(found.facts.get("layout", ""))]
        graph = found.read()  # also of `plain`: `prune` goes by when an entry was read last
        return StoredLayout(layout=layout, graph=graph if layout.lowered else None, why="")
    except LatentrtError as error:
        return StoredLayout(layout=plain, graph=None, why=error.found)
    except KeyError as error:
        return StoredLayout(layout=plain, graph=None, why=f"the store names an unknown layout {error}")


def tune_package(
    package: Package,
    store: EngineStore,
    progress: OnProgress | None = None,
    *,
    nets: Iterable[str] = (),
    device: KnownDevice | None = None,
    open_net: OpenNet = open_onnxruntime_net,
    rounds: int = ROUNDS,
) -> tuple[TunedNet, ...]:
    """Make sure that the store has the fastest layout of every net that has a choice.

    Takes seconds, and while it lasts the memory of three sessions of one net.

    Args:
        package: the package.
        store: where the choices go.
        progress: told how far it is.
        nets: only these of TUNED_NETS.
        device: to measure on, which stays open; the first CUDA device unless given.
        open_net: opens a net there.
        rounds: how often each layout is timed.

    Raises:
        BackendError: there is no GPU, or onnx-ir is not installed.
        UsageError: a name in `nets` that has no choice.
        StorageError: the store cannot be written.
        LatentrtError: whatever opening and running the package's own graph raises.
    """
    names = tuned_nets(package, nets)
    with ExitStack() as stack:
        if device is None:
            device = _cuda_device()
            stack.callback(device.close)
        if reason := lowering_missing():
            raise BackendError(
                f"there is no layout but `plain` to measure: {reason}",
                expected="onnx-ir, which lowers graphs, beside onnxruntime-gpu",
                fix='Install it: pip install "latentrt[cuda]".',
            )
        bench = _Bench(package=package, device=device, open_net=open_net, rounds=rounds)
        return ensure_layouts(
            store, names, lambda net: layout_key(package, net, bench.device.facts), bench.measure, progress
        )


def ensure_layouts(
    store: EngineStore,
    names: Iterable[str],
    key_of: Callable[[str], EngineKey],
    measure: Measure,
    progress: OnProgress | None,
) -> tuple[TunedNet, ...]:
    """Make sure that the store has a layout of every net of `names`; `measure` is asked for what it has not.

    Raises:
        StorageError: the store cannot be written.
        LatentrtError: whatever `measure` raises.
    """
    nets = tuple(names)
    tuned: list[TunedNet] = []
    for index, net in enumerate(nets):

        def report(phase: str, fraction: float, net: str = net, index: int = index) -> None:
            if progress is not None:
                progress(BuildProgress(net=net, index=index, total=len(nets), phase=phase, fraction=fraction))

        key = key_of(net)
        found = store.find(key)
        if not isinstance(found, Miss):
            tuned.append(TunedNet(net=net, entry=found, why=""))
            continue

        def build(path: Path, net: str = net, report: Report = report) -> dict[str, Any]:
            return measure(net, path, report)

        entry = store.get_or_build(key, build, waiting=lambda said, report=report: report(said, 0.0))
        tuned.append(TunedNet(net=net, entry=entry, why=found.reason))
    return tuple(tuned)


def tuned_nets(package: Package, nets: Iterable[str]) -> tuple[str, ...]:
    """Those of `nets` (none: all) that have a choice. Raises UsageError for one that has none."""
    every = tuple(net for net in TUNED_NETS if net in package.manifest.nets)
    wanted = tuple(nets)
    if unknown := [name for name in wanted if name not in every]:
        raise UsageError(
            f"the net {unknown[0]!r} has no layouts to choose from",
            expected=", ".join(every) or "a package with a UNet or a decoder",
            fix="Leave --nets out to measure all of them.",
        )
    return tuple(net for net in every if not wanted or net in wanted)


def _cuda_device() -> CudaDevice:
    if reason := cuda_available():
        raise BackendError(
            f"layouts are measured on the GPU that runs them, and onnxruntime cannot use one here: {reason}",
            expected="onnxruntime-gpu, an NVIDIA driver and a CUDA device",
            fix='Run it on the machine that has the GPU, after: pip install "latentrt[cuda]".',
        )
    return CudaDevice()


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """One call of `tune_package`."""

    package: Package
    device: KnownDevice
    open_net: OpenNet
    rounds: int

    def measure(self, net: str, path: Path, report: Report) -> dict[str, Any]:
        """Write the graph of the fastest layout; the figures."""
        profile = measured_profile(self.package, net)
        with TemporaryDirectory() as folder:
            trials = Trials(
                self.package,
                profile,
                self.device,
                self.open_net,
                Path(folder),
                report=report,
                rounds=self.rounds + WARM_UP,
            )
            with trials:
                choice = choose_layout(trials.measure, rounds=self.rounds)
            path.write_bytes(trials.graph(LAYOUTS[choice.layout]).read_bytes())
        return choice_facts(choice)


def choice_facts(choice: Choice) -> dict[str, Any]:
    """What the store keeps of a choice."""
    return {
        "layout": choice.layout,
        "milliseconds": {name: round(value, 4) for name, value in choice.milliseconds.items()},
        "relative_l2": {name: float(f"{value:.3g}") for name, value in choice.relative_l2.items()},
        "rejected": dict(choice.rejected),
    }
