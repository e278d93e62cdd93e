"""What the engine store knows of the backends that run nets on the host, looked up when a model is opened.

`hosts.py` measures. Every start passes here and most machines have measured nothing, so the store is imported
only where it has entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..backends import BACKENDS
from ..errors import LatentrtError
from ..onnxruntime.session import library
from ..onnxruntime.tuning.cpu_layouts import known_layout
from ..package import Package
from ..processors import multiplies_bfloat16, processor, usable_processors
from ..store.files import default_root, has_engines
from ..tuning.choice import MARGIN, TUNED_NETS

if TYPE_CHECKING:
    from ..store.engine_store import EngineStore
    from ..store.key import EngineKey

# The first is what the others are compared with, and what "auto" takes where nothing was measured.
HOSTS = tuple(row.name for row in BACKENDS.values() if not row.on_device and not row.approximate)
_COARSE = tuple(row.name for row in BACKENDS.values() if row.approximate)  # all of them in bfloat16
_WORTH = 0.01  # the share of a picture's time from which a second library is worth its memory
_REVISION = 1  # raised when a net of one of them is opened in another way


def hosts_of(package: Package) -> tuple[str, ...]:
    """The backends that may draw a package on this processor, those that compute exactly first."""
    return (*HOSTS, *_COARSE) if package.manifest.quantised and multiplies_bfloat16() else HOSTS


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What draws a model the fastest, and what a picture takes with each backend.

    Attributes:
        nets: the backend of each net that was measured, of `hosts_of`; more than one where that is worth it.
        milliseconds: by backend, of those that computed every net right: the model's own number of calls of
            the UNet, with guidance, and the decoder once. By `name`, too, where that is several backends.
    """

    nets: Mapping[str, str]
    milliseconds: Mapping[str, float]

    @property
    def name(self) -> str:
        """The backend of what is measured first, the UNet, and of other nets where theirs is another one."""
        (_, usual), *others = self.nets.items()
        return ", ".join((usual, *(f"{net} on {name}" for net, name in others if name != usual)))

    @property
    def reason(self) -> str:
        """The figures in words."""
        times = "; ".join(f"{value / 1000:.3g} s with {name}" for name, value in self.milliseconds.items())
        return f"a picture takes {times}"


def contest_key(package: Package, net: str, store: EngineStore) -> EngineKey:
    """The key of what was measured with a net on this machine.

    Another release of either library, and another layout of ONNX Runtime's net, is another key.
    """
    from ..store.key import Target, package_key

    onnxruntime = str(library().__version__)
    layout = known_layout(package, net, onnxruntime, store)
    defaults = package.manifest.defaults
    return package_key(
        package,
        net,
        backend=HOSTS[-1],
        version=f"{version('openvino')}, onnxruntime {onnxruntime}",
        target=Target(
            compute_capability="cpu", gpu=f"{processor()}, {usable_processors()} cores", driver="any"
        ),
        profiles=(f"{defaults.width}x{defaults.height}",),
        flags=sorted((f"contest {_REVISION}", *hosts_of(package), f"layout {layout}")),
    )


def fastest_host(package: Package, store: EngineStore | None = None) -> Standing | None:
    """What draws this model the fastest on this machine; None where that was not measured.

    Whatever is wrong with the store, nothing is raised. `store` is the user's own unless given.
    """
    if store is None and not has_engines(default_root()):
        return None
    from ..store.engine_store import EngineStore, Miss

    with suppress(LatentrtError, OSError, ValueError, KeyError, TypeError, ImportError):
        store = store or EngineStore()
        facts = dict[str, Mapping[str, Any]]()
        for net in (net for net in TUNED_NETS if net in package.manifest.nets):
            found = store.find(contest_key(package, net, store))
            if isinstance(found, Miss):
                return None
            found.read()  # `prune` goes by when an entry was read last
            facts[net] = found.facts
        return standing(package, facts) if facts else None
    return None


def standing(package: Package, facts: Mapping[str, Mapping[str, Any]]) -> Standing:
    """Add up what was measured of each net (`choice.choice_facts`). Raises KeyError for other facts."""
    calls = {"unet": package.manifest.defaults.num_inference_steps}
    measured = {
        net: {name: calls.get(net, 1) * float(took) for name, took in one["milliseconds"].items()}
        for net, one in facts.items()
    }
    totals = {
        name: sum(times[name] for times in measured.values())
        for name in hosts_of(package)
        if all(name in times for times in measured.values())
    }
    single = _first_within_margin(totals)
    one = Standing(nets=dict.fromkeys(measured, single), milliseconds=totals)
    best = {net: _first_within_margin(times) for net, times in measured.items()}
    took = sum(measured[net][name] for net, name in best.items())
    if took > totals[single] * (1 - _WORTH):
        return one
    several = replace(one, nets=best)
    return replace(several, milliseconds={**totals, several.name: took})


def _first_within_margin(times: Mapping[str, float]) -> str:
    """The first of those, the simplest first, that take as good as no longer than the fastest."""
    most = min(times.values()) * (1 + MARGIN)
    return next(name for name, took in times.items() if took <= most)
