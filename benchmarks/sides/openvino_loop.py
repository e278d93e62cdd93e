"""The package's graphs in OpenVINO on the CPU, set as for one request at a time.

float32 is set: where a processor has bfloat16 (AMX, AVX512-BF16) that is the default, which is another
arithmetic than everyone else's in the same table. Shapes are fixed before compiling, which OpenVINO's own
guide to Stable Diffusion advises, so that a net is compiled when a case asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakValueDictionary

from ...engines.package import Package
from ...engines.spec import Array
from ...runtime.loop.device.buffers import shape_of
from ..case import Case, sizes_of
from .contract import OpenSide, Task
from .plain_loop import plain_side
from .requirements import missing_modules, open_plain_package

NAME = "openvino"
_DEVICE = "CPU"


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    del task
    return missing_modules("openvino")


def open_side(task: Task) -> OpenSide:
    """The package, to be compiled case by case. Raises NotAvailableError, PackageError."""
    import openvino

    package = open_plain_package(task)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if task.threads:
        settings["INFERENCE_NUM_THREADS"] = task.threads
    core: Any = openvino.Core()
    versions = {
        "openvino": str(openvino.__version__),
        "device": f"{_DEVICE}: {core.get_property(_DEVICE, 'FULL_DEVICE_NAME')}",
        "shapes": "static",
        **{name: str(value) for name, value in settings.items()},
    }
    compiler, resources = Compiler(core, package, settings), ExitStack()
    resources.callback(compiler.close)
    return plain_side(NAME, package, compiler, versions, resources)


class Compiler:
    """Nets for a case's shapes; the last of each kind, and one that is in use, are not compiled again."""

    def __init__(self, core: Any, package: Package, settings: Mapping[str, Any]) -> None:
        self._core, self._package, self._settings = core, package, settings
        self._in_use: WeakValueDictionary[tuple[Any, ...], OpenVinoNet] = WeakValueDictionary()
        self._latest: dict[str, OpenVinoNet] = {}

    def __call__(self, name: str, case: Case) -> OpenVinoNet:
        """Compile, or find."""
        manifest = self._package.manifest
        file, sizes = manifest.nets[name], sizes_of(case, manifest)
        shapes = {item.name: shape_of(item.shape, sizes) for item in file.spec.inputs}
        key = (name, *shapes.items())
        net = self._in_use.get(key)
        if net is None:
            self._latest.pop(name, None)  # before there are two in memory
            model = self._core.read_model(str(self._package.path(file.graph)))
            model.reshape(shapes)
            compiled = self._core.compile_model(model, _DEVICE, dict(self._settings))
            net = self._in_use[key] = OpenVinoNet(compiled, [output.name for output in file.spec.outputs])
        self._latest[name] = net
        return net

    def close(self) -> None:
        """Let go of every net. May be called twice."""
        self._latest.clear()


class OpenVinoNet:
    """A compiled net and its one request."""

    def __init__(self, compiled: Any, outputs: list[str]) -> None:
        self._request = compiled.create_infer_request()
        self._ports = {name: compiled.output(name) for name in outputs}

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; inputs are read where they lie, outputs are copies."""
        results = self._request.infer(dict(feeds), share_inputs=True)
        return {name: results[port] for name, port in self._ports.items()}
