"""The package's graphs in plain ONNX Runtime sessions on the CPU, as anyone would open them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from ...engines.onnxruntime import session as onnxruntime
from ...engines.onnxruntime.nets import CPU
from .contract import OpenSide, Task, missing_modules, open_plain_package
from .plain_loop import PLAIN_NETS, Net, plain_side

NAME = "onnxruntime"


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    del task
    return missing_modules("onnxruntime")


def open_side(task: Task) -> OpenSide:
    """A session for each net: default options but for the threads. Raises NotAvailableError, PackageError."""
    package = open_plain_package(task)
    options = onnxruntime.library().SessionOptions()  # what a user gets: not the settings of our own sessions
    options.log_severity_level = 3
    options.intra_op_num_threads = task.threads or onnxruntime.usable_processors()
    nets: dict[str, Net] = {}
    for name in PLAIN_NETS:
        file = package.manifest.nets[name]
        session = onnxruntime.open_session(package.path(file.graph), options, [CPU], culprit=name)
        nets[name] = partial(_run, session, [output.name for output in file.spec.outputs])
    resources = ExitStack()
    resources.callback(nets.clear)
    versions = {
        "onnxruntime": str(onnxruntime.library().__version__),
        "provider": CPU,
        "threads": str(options.intra_op_num_threads),
        "graph_optimization": str(options.graph_optimization_level.name),
    }
    return plain_side(NAME, package, lambda name, case: nets[name], versions, resources)


def _run(session: Any, outputs: list[str], feeds: Any) -> dict[str, Any]:
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))
