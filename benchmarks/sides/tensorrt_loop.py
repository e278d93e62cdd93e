"""The package's graphs in TensorRT as Polygraphy builds and runs them: strongly typed, for a case's shapes.

Each engine is built when a case asks for it, its profile's least, best and most all the same, which is what
TensorRT is fastest with. The loop is the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from ...engines.cuda import facts
from ...engines.device import Shapes
from ...engines.errors import BackendError
from ...engines.spec import Array
from ...engines.tensorrt.flavour import flavour, installed_version
from ..machine import version_of
from .contract import OpenSide, Task, missing_modules, open_whole_package
from .plain_loop import Net, plain_side


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    if reason := missing_modules("tensorrt", "polygraphy") or facts.available():
        return reason
    try:
        flavour("tensorrt")
    except BackendError as error:
        return error.found
    return None


def open_side(task: Task) -> OpenSide:
    """The package; engines are built case by case. Raises NotAvailableError, PackageError."""
    package = open_whole_package(task)
    trt: Any = import_module("polygraphy.backend.trt")

    def open_net(name: str, shapes: Shapes) -> Net:
        """An engine of the graph for exactly these shapes, in a runner that is freed with the side."""
        profile = trt.Profile()
        for tensor, shape in shapes.items():
            profile.add(tensor, min=shape, opt=shape, max=shape)
        path = str(package.path(package.manifest.nets[name].graph))
        network = trt.network_from_onnx_path(path, strongly_typed=True)
        # Without this the builder refuses attention that no fused kernel has, such as the VAE's head of 512.
        network = trt.set_decomposable_attentions(network)
        engine = trt.engine_from_network(network, config=trt.CreateConfig(profiles=[profile]))
        return partial(_run, side.resources.enter_context(trt.TrtRunner(engine)))

    versions = {
        "tensorrt": installed_version("tensorrt") or "unknown",
        "polygraphy": version_of("polygraphy") or "unknown",
        "precision": "strongly typed",
        "profile": "min = opt = max, the case's shapes",
    }
    side = plain_side("tensorrt", package, open_net, versions)
    return side


def _run(runner: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs are not checked: Polygraphy says that costs time. Outputs are views of buffers it uses again."""
    return {name: np.array(array) for name, array in runner.infer(dict(feeds), check_inputs=False).items()}
