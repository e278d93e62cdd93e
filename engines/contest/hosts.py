"""Measures the backends that run nets on the host against each other; the engine store remembers.

`latentrt build MODEL --backend auto` measures, opening a model only looks (`fastest.py`). ONNX Runtime's nets
are in the layout that is known to be its fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backend import HostBackend, Net, find_backend
from ..package import Package
from ..spec import Array
from ..store.engine_store import BuiltEngine, EngineStore, OnProgress, Report, build_missing
from ..store.key import canonical_json
from ..tolerances import BF16, QUANTISED_RELATIVE_L2
from ..tuning.choice import Measured, allowed_distance, choice_facts, choose_layout, tuned_nets
from ..tuning.runs import measured_inputs, milliseconds
from .fastest import HOSTS, contest_key, hosts_of

HOST_ROUNDS = 4  # a UNet takes seconds: few rounds tell backends apart that differ by a tenth
_WARM_UP = 1

OpenNet = Callable[[str, Package, str], Net]


def open_net(backend: str, package: Package, net: str) -> Net:
    """A net in the backend of that name. Raises as `find_backend`, and what opening raises."""
    found = find_backend(backend)[1]
    assert isinstance(found, HostBackend), backend
    return found.open_net(package, net, threads=None)


def measure_hosts(
    package: Package,
    store: EngineStore,
    progress: OnProgress | None = None,
    *,
    rounds: int = HOST_ROUNDS,
    opened: OpenNet = open_net,
) -> tuple[BuiltEngine, ...]:
    """Make sure that the store has what the backends take for the UNet and the decoder, on this machine.

    Takes a dozen runs of each net, and while it lasts the memory of all backends' nets of one name. A backend
    whose output is not the first one's, within `allowed_distance` and the bar of its precision, is out.

    Raises:
        BackendError: the first backend cannot run here.
        StorageError: the store cannot be written.
        LatentrtError: whatever opening and running a net of the first backend raises.
    """

    def measure(net: str, path: Path, report: Report) -> dict[str, Any]:
        trials = _Trials(package, net, report, rounds, opened)
        choice = choose_layout(
            trials.measure,
            hosts_of(package),
            parity=allowed_distance(package, net),
            coarser={name: QUANTISED_RELATIVE_L2[BF16] for name in hosts_of(package) if name not in HOSTS},
            rounds=rounds,
            warm_up=_WARM_UP,
        )
        facts = choice_facts(choice)
        path.write_bytes(canonical_json(facts))
        return facts

    found = [store.find(contest_key(package, net, store)) for net in tuned_nets(package, ())]
    return build_missing(store, found, measure, progress)


@dataclass
class _Trials:
    """A net in each backend, with the same random inputs."""

    package: Package
    net: str
    report: Report
    rounds: int
    opened: OpenNet
    done: int = 0
    inputs: dict[str, Array] = field(default_factory=dict[str, Array])

    def measure(self, name: str) -> Measured:
        """Open the net in the backend of that name, and run it once. Raises LatentrtError."""
        self.report(f"opening {name}", 0.0)
        self.inputs = self.inputs or measured_inputs(self.package, self.net)
        with ExitStack() as stack:
            net = self.opened(name, self.package, self.net)
            stack.callback(net.close)
            outputs = net(**self.inputs)
            stack.pop_all()
        return Measured(outputs=outputs, run=lambda: self.time(name, net), close=net.close)

    def time(self, name: str, net: Net) -> float:
        """Milliseconds of one run."""
        self.done += 1
        total = (self.rounds + _WARM_UP) * len(hosts_of(self.package))
        self.report(f"timing {name}", min(self.done / total, 1.0))
        return milliseconds(lambda: net(**self.inputs))
