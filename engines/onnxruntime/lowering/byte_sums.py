"""Whether ONNX Runtime adds products of bytes up right on this processor: seen on the largest sums there are.

What a processor lists is what it could do (`processors.adds_bytes`); this is what the library does with it.
A whole net cannot tell: two correct programs of a rounded one are as far apart (`tolerances.ROUNDING_TIMES`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BackendError
from ...spec import Array
from ..session import CPU, library, open_session, session_options
from .graph_images import CONTRIB

_ROWS = (1, 3, 64)  # a row alone has a kernel of its own
_DEPTH, _COLUMNS = 256, 48
_OPSET = 23


def check_sums() -> None:
    """Compare products of the largest bytes, and of random ones, with whole numbers.

    Raises:
        BackendError: a sum is another; onnx-ir is not installed.
    """
    random = np.random.default_rng(0)
    weight: Any = random.integers(-127, 128, (_DEPTH, _COLUMNS))
    weight[:, 0], weight[:, 1] = 127, -127
    session = open_session(
        Path("sums.onnx"),
        session_options(None),
        [CPU],
        culprit="sums",
        content=_graph(weight.astype(np.int8)),
    )
    for rows in _ROWS:
        data: Any = random.integers(0, 256, (rows, _DEPTH))
        data[0] = 255
        (found,) = session.run(["y"], {"q": data.astype(np.uint8)})
        if not np.array_equal(found, ((data - 128) @ weight).astype(np.float32)):  # below 2^24: exact
            raise BackendError(
                f"on this processor onnxruntime {library().__version__} has sums of bytes saturate",
                expected="sums in 32 bits",
                fix="Use the graph as it is.",
            )


def _graph(weight: Array) -> bytes:
    """A model of one product, of q (R, K) uint8 with a weight (K, N) int8."""
    import onnx_ir as ir

    q = ir.val("q", ir.DataType.UINT8, ["R", _DEPTH])
    ones = np.ones(_COLUMNS, np.float32)
    numbers = {"w": weight, "s": np.float32(1), "t": ones, "zero": np.uint8(128)}
    weights = [
        ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name))
        for name, array in numbers.items()
    ]
    node = ir.node("MatMulIntegerToFloat", [q, *weights], domain=CONTRIB)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["R", _COLUMNS])
    opsets = {"": _OPSET, CONTRIB: 1}
    graph = ir.Graph([q], [y], nodes=[node], initializers=weights, opset_imports=opsets, name="sums")
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
