"""Lowered graphs: read from a package, written, and given to a session with the package's own weights.

onnx-ir is imported on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...errors import BackendError, PackageError
from ...net_weights import engine_bytes
from ...package import Package
from ..session import CPU, LARGE, WEIGHTS_FOLDER, library, open_session, session_options, spare_memory
from .winograd import Kernel

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class LoweredGraph:
    """A graph in a layout other than `plain`: its bytes, and the weights that a session of it needs."""

    layout: str
    graph: bytes
    kernels: tuple[Kernel, ...]


def lowering_missing() -> str | None:
    """None if graphs can be lowered here, else the reason."""
    return None if find_spec("onnx_ir") else "onnx-ir is not installed"


def check_lowering() -> None:
    """Raise BackendError where graphs cannot be lowered, so that there is no layout but `plain`."""
    if reason := lowering_missing():
        raise BackendError(
            f"there is no layout but `plain`: {reason}",
            expected="the library that lowers graphs for ONNX Runtime",
            fix="Install it: pip install onnx-ir",
        )


def read_graph(package: Package, net: str) -> ir.Model:
    """The graph of one net, with its weights still in the package.

    Raises:
        BackendError: onnx-ir is not installed.
        PackageError: onnx-ir cannot read the graph.
    """
    check_lowering()
    import onnx_ir

    ir = cast(Any, onnx_ir)  # its own types of load and save are incomplete
    path = package.path(package.manifest.nets[net].graph)
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx-ir's own classes share no narrower base
        raise PackageError(
            f"onnx-ir cannot read {path} ({type(error).__name__}: {error})",
            expected="an ONNX graph of opset 23",
            fix="Export the package again: latentrt export CHECKPOINT -o PACKAGE",
        ) from error


def write_graph(model: ir.Model, path: Path) -> Path:
    """Write a graph whose weights stay in the package (see `give_weights`). Returns the path."""
    import onnx_ir

    path.parent.mkdir(parents=True, exist_ok=True)
    cast(Any, onnx_ir).save(model, path)
    return path


def give_weights(options: Any, package: Package, net: str) -> None:
    """Let a session of `options` find a net's weights, wherever its graph and they are."""
    if package.manifest.nets[net].weights:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(package.weights_folder(net)))


def open_changed(package: Package, net: str, model: ir.Model) -> Any:
    """A session on the CPU of a graph that was made of a net's, and names that one's weights.

    Raises:
        PackageError: ONNX Runtime refuses the graph.
        MemoryLimitError: its weights do not fit.
    """
    import onnx_ir

    options = session_options(None)
    spare_memory(options, engine_bytes(package, net))
    give_weights(options, package, net)
    path = package.path(package.manifest.nets[net].graph)
    content = cast(Any, onnx_ir).to_proto(model).SerializeToString()
    return open_session(path, options, [CPU], culprit=net, content=content)


def open_as_written(package: Package, net: str) -> Any:
    """A session on the CPU that computes what a net's graph says node by node, with nothing fused.

    Raises:
        PackageError: ONNX Runtime refuses the graph.
        MemoryLimitError: its weights do not fit.
    """
    options = session_options(None)
    options.graph_optimization_level = library().GraphOptimizationLevel.ORT_DISABLE_ALL
    # Weights are widened in every run: no arena keeps what that takes behind it.
    options.enable_cpu_mem_arena = engine_bytes(package, net) <= LARGE
    give_weights(options, package, net)
    return open_session(package.path(package.manifest.nets[net].graph), options, [CPU], culprit=net)
