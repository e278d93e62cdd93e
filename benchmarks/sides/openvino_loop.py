"""The package's graphs in OpenVINO on the CPU, set as for one request at a time.

float32 is set: where a processor has bfloat16 (AMX, AVX512-BF16) that is the default, which is another
arithmetic than everyone else's in the same table. Shapes are fixed before compiling, which OpenVINO's own
guide to Stable Diffusion advises, so that a net is compiled when a case asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ...engines.device import Shapes
from ...engines.spec import Array
from .contract import OpenSide, Task, missing_modules, open_whole_package
from .plain_loop import Net, plain_side

_DEVICE = "CPU"


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    return missing_modules("openvino")


def open_side(task: Task) -> OpenSide:
    """The package, to be compiled case by case. Raises NotAvailableError, PackageError."""
    import openvino

    package = open_whole_package(task)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if task.threads:
        settings["INFERENCE_NUM_THREADS"] = task.threads
    core: Any = openvino.Core()

    def open_net(name: str, shapes: Shapes) -> Net:
        file = package.manifest.nets[name]
        model = core.read_model(str(package.path(file.graph)))
        model.reshape(dict(shapes))
        compiled = core.compile_model(model, _DEVICE, settings)
        return partial(_run, compiled, [output.name for output in file.spec.outputs])

    versions = {
        "openvino": str(openvino.__version__),
        "device": f"{_DEVICE}: {core.get_property(_DEVICE, 'FULL_DEVICE_NAME')}",
        "shapes": "static",
        **{name: str(value) for name, value in settings.items()},
    }
    return plain_side("openvino", package, open_net, versions)


def _run(compiled: Any, outputs: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """By the one request of a compiled net; inputs are read where they lie, outputs are copies."""
    results = compiled(dict(feeds), share_inputs=True)
    return {name: results[name] for name in outputs}
