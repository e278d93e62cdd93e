"""Reads graphs of a package to lower them, and writes what came of it. onnx-ir is imported on first use."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ...errors import BackendError, PackageError
from ...package import Package

if TYPE_CHECKING:
    import onnx_ir as ir


def read_graph(package: Package, net: str) -> ir.Model:
    """The graph of one net, with its weights still in the package.

    Raises:
        BackendError: onnx-ir is not installed.
        PackageError: onnx-ir cannot read the graph.
    """
    if find_spec("onnx_ir") is None:
        raise BackendError(
            "onnx-ir is not installed",
            expected="the library that lowers graphs for ONNX Runtime",
            fix="Install it: pip install onnx-ir.",
        )
    import onnx_ir

    ir = cast(Any, onnx_ir)  # its own types of load and save are incomplete
    path = package.path(package.manifest.nets[net].graph)
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx-ir's own classes share no narrower base
        raise PackageError(
            f"onnx-ir cannot read {path} ({type(error).__name__}: {error})",
            expected="an ONNX graph of opset 23",
            fix="Export the package again: latentrt export CHECKPOINT -o PACKAGE.",
        ) from error


def write_graph(model: ir.Model, path: Path) -> Path:
    """Write a graph beside nothing: its weights stay where they are. Returns the path."""
    import onnx_ir

    path.parent.mkdir(parents=True, exist_ok=True)
    cast(Any, onnx_ir).save(model, path)
    return path
