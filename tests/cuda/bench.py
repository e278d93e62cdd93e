"""Nets of a package on a device of the stand-in, and what is asked of each; runs in the worker's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from latentrt.benchmarks.case import Case, sizes_of
from latentrt.benchmarks.gpu.sections import read_placement
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.errors import LatentrtError
from latentrt.engines.net_weights import part_shapes
from latentrt.engines.onnxruntime.lowering.lower import lower
from latentrt.engines.onnxruntime.nets import OnnxRuntimeDeviceNet, open_onnxruntime_net
from latentrt.engines.package import Package
from latentrt.engines.spec import Array, output_shapes
from latentrt.runtime.loop.device.programs import input_shapes
from tests.cuda.runtime import StandIn

Facts = dict[str, Any]


def cases_of(package: Package) -> tuple[Case, Case]:
    """The usual guided picture, and another that is not square."""
    case = Case.of(package.manifest, guidance_scale=5.0, steps=8, seed=1)
    multiple = package.manifest.size_multiple
    return case, replace(case, height=max(case.height * 3 // 4 // multiple, 1) * multiple)


class Bench:
    """A device of the stand-in, and nets on it."""

    def __init__(self, runtime: StandIn, package: Package) -> None:
        self.runtime, self.package = runtime, package
        self.device = CudaDevice()

    def close(self) -> None:
        """Free the device with all that is on it."""
        self.device.close()

    @contextmanager
    def opened(self, name: str, layout: str, profile: Path | None = None) -> Iterator[OnnxRuntimeDeviceNet]:
        """A net in a layout."""
        with TemporaryDirectory() as folder:
            graph = None if layout == "plain" else lower(self.package, name, Path(folder))
            net = open_onnxruntime_net(self.package, name, self.device, graph=graph, profile=profile)
        try:
            yield net
        finally:
            net.close()

    @contextmanager
    def bound(self, net: OnnxRuntimeDeviceNet, case: Case) -> Iterator[Callable[[], None]]:
        """What enqueues one run of the case, at addresses of its own."""
        shapes = input_shapes(net.spec, sizes_of(case, self.package.manifest))
        every = {**shapes, **output_shapes(net.spec, shapes)}
        with ExitStack() as until:
            addresses: dict[str, int] = {}
            for item in (*net.spec.inputs, *net.spec.outputs):
                addresses[item.name] = self.device.allocate(item.nbytes(every[item.name]))
                until.callback(self.device.free, addresses[item.name])
            binding = net.bind(shapes, addresses, 0)
            until.callback(binding.close)
            yield binding.enqueue

    def events(self, work: Callable[[], object]) -> dict[str, int]:
        """What the work makes the device do."""
        before = self.runtime.report()
        work()
        return self.runtime.report().since(before).events()

    def capture(self, work: Callable[[], None]) -> Facts:
        """Record the work and launch it: what was captured, what that forbids, and what the launch did."""
        before, error, replayed = self.runtime.report(), "", {}
        try:
            with self.device.capture() as graphs:
                work()
            replayed = self.events(graphs[0].launch)
            graphs[0].close()
        except LatentrtError as refused:
            error = refused.found
        found = self.runtime.report().since(before)
        kinds = {kind: found.of(kind) for kind in ("captured", "forbidden", "note")}
        return {**kinds, "error": error, "replayed": replayed}


def net_facts(bench: Bench, name: str, layout: str) -> Facts:
    """Everything the tests ask of one net in one layout."""
    usual, other = cases_of(bench.package)
    before = bench.runtime.report()
    facts: Facts = {}
    with bench.opened(name, layout) as net:
        facts["opening"] = bench.runtime.report().since(before).events()
        facts["on_host"] = inputs_on_host(net.session())
        with bench.bound(net, usual) as a, bench.bound(net, other) as b:
            facts["runs"] = [bench.events(a) for _ in range(4)]
            facts["capture"] = bench.capture(a)
            facts["shapes"] = [bench.events(work) for work in (a, b, b, a, a)]
    facts["left_open"] = bench.runtime.report().since(before).of("open")
    facts["placement"] = placement_of(bench, name, layout, usual)
    return facts


def changed(package: Package) -> Package:
    """The package with other values for every weight that adapters may change."""

    def change(weight: Array) -> Array:
        return weight.astype(np.float32) + np.float32(1e-3)

    parts = ("unet", "text_encoder", "text_encoder_2")
    return replace(
        package, changes={part: dict.fromkeys(part_shapes(package, part), change) for part in parts}
    )


def inputs_on_host(session: Any) -> list[str]:
    """The inputs that a session wants in the host's memory."""
    infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return [item.name for item, info in infos if info.name.lower() == "cpu"]


def placement_of(bench: Bench, name: str, layout: str, case: Case) -> Facts:
    """Where nodes ran, by the library's profile."""
    with TemporaryDirectory() as folder, bench.opened(name, layout, Path(folder)) as net:
        with bench.bound(net, case) as run:
            run()
        nodes, on_cpu, misplaced = read_placement(net.end_profile())
    return {"nodes": nodes, "on_cpu": on_cpu, **misplaced}
