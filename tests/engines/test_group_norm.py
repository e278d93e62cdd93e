"""Group normalisation and GEGLU as they are lowered for the CPU, against torch in float64, and whole nets."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines.onnxruntime.lowering.fused import lower_geglus, lower_group_norms
from latentrt.engines.onnxruntime.nets import OnnxRuntimeNet
from latentrt.engines.onnxruntime.tuning.cpu import lower_for_cpu
from latentrt.engines.onnxruntime.tuning.cpu_layouts import CPU_LAYOUTS
from latentrt.engines.package import Package
from latentrt.engines.spec import DTYPES
from latentrt.engines.tolerances import relative_l2

DEMO = Path(__file__).parents[2] / "demo" / "package"


@pytest.fixture(scope="module")
def demo() -> Package:
    return Package.open(DEMO)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any] | None],
    weights: dict[str, Any],
    *,
    opset: int = 23,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model whose values between its nodes have types and no shapes, as those of a package."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
        value_info=[
            helper.make_tensor_value_info(name, kind, None)
            for node in nodes
            for name in node.output
            if name != "y" and node.op_type in ("Add", "GroupNormalization")
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def norm_model(channels: int, groups: int, shape: list[Any] | None, **more: Any) -> onnx.ModelProto:
    rng = np.random.default_rng(channels)
    weights = {
        "gamma": (1 + rng.standard_normal(channels)).astype(np.float32),
        "beta": rng.standard_normal(channels).astype(np.float32),
    }
    nodes = [
        helper.make_node("GroupNormalization", ["x", *weights], ["n"], num_groups=groups, epsilon=1e-6),
        helper.make_node("Neg", ["n"], ["y"]),
    ]
    return model_of(nodes, {"x": shape}, weights, **more)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


@pytest.mark.parametrize(
    ("shape", "groups", "mean"),
    [
        ((2, 64, 16, 16), 4, 0.0),
        ((2, 64, 5, 3), 4, 10.0),
        ((3, 6, 7), 2, 10.0),
        ((1, 8, 1, 1), 2, 0.0),
        ((2, 320, 64, 64), 32, 0.0),  # the largest of SD 1.5's UNet
        ((2, 320, 64, 64), 32, 30.0),
    ],
)
def test_it_is_torchs_group_norm(shape: tuple[int, ...], groups: int, mean: float) -> None:
    model = norm_model(shape[1], groups, ["B", shape[1], *("H", "W")[: len(shape) - 2]])
    graph = onnx_ir.from_proto(model)
    assert lower_group_norms(graph) == 1
    made = onnx_ir.to_proto(graph)
    assert "GroupNormalization" not in kinds(made)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) + np.float32(mean)
    weights = [
        torch.from_numpy(numpy_helper.to_array(item).copy()).double() for item in model.graph.initializer
    ]
    wanted = torch.nn.functional.group_norm(torch.from_numpy(x).double(), groups, *weights, eps=1e-6)
    found = run(made, {"x": x})
    assert found.shape == shape
    assert relative_l2(-found, wanted.numpy()) < 1e-5


@pytest.mark.parametrize(
    "model",
    [
        norm_model(8, 2, None),  # of unknown rank
        norm_model(8, 2, ["B", 8]),
        norm_model(8, 2, ["B", 8, "D", "H", "W"]),
        norm_model(8, 2, ["B", 8, "H", "W"], kind=TensorProto.FLOAT16),
        norm_model(2, 2, ["B", 8, "H", "W"], opset=18),  # gamma and beta of a group
        model_of(
            [helper.make_node("GroupNormalization", ["x", "g", "b"], ["y"], num_groups=2)],
            {"x": ["B", 8, "H", "W"], "g": [8], "b": [8]},
            {},
        ),
    ],
    ids=["rank", "vectors", "volumes", "half", "opset18", "computed"],
)
def test_other_norms_stay(model: onnx.ModelProto) -> None:
    graph = onnx_ir.from_proto(model)
    assert lower_group_norms(graph) == 0
    assert kinds(onnx_ir.to_proto(graph)) == kinds(model)


def ranked_model(made_by: list[onnx.NodeProto]) -> onnx.ModelProto:
    """The norm of a value that only its makers know."""
    weights = {
        "w": np.ones((4, 4, 1, 1), np.float32),
        "m": np.eye(4, dtype=np.float32),
        "half": np.array([0.5], np.float32),
        "gamma": np.ones(4, np.float32),
        "beta": np.zeros(4, np.float32),
        "target": np.array([0, 4, -1]),
        "back": np.array([0, 4, 3, -1]),
        "axes": np.array([2, 3]),
        "one": np.array([1]),
        "some": np.array([0, 4]),
        "rest": np.array([-1]),
    }
    norm = helper.make_node("GroupNormalization", ["v", "gamma", "beta"], ["y"], num_groups=2)
    used = {name for node in [*made_by, norm] for name in node.input}
    inputs: dict[str, list[Any] | None] = {"x": ["B", 4, 3, 5], "t": ["B", 4], "u": None}
    return model_of(
        [*made_by, norm],
        {name: shape for name, shape in inputs.items() if name in used},
        {name: array for name, array in weights.items() if name in used},
    )


def made(kind: str, inputs: str, output: str = "v", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


@pytest.mark.parametrize(
    "nodes",
    [
        [made("Conv", "x w")],
        [made("Reshape", "x target")],
        [made("Transpose", "x", perm=(0, 1, 3, 2))],
        [made("Unsqueeze", "t axes", "s"), made("Conv", "x w", "c"), made("Add", "c s")],
        [made("Conv", "x w", "c"), made("Mul", "half c")],
        [  # to a shape that is put together, (0, 4, H, -1)
            made("Shape", "x", "z", start=2, end=3),
            made("Squeeze", "z", "q"),
            made("Reshape", "q one", "h"),
            made("Concat", "some h rest", "k", axis=0),
            made("Reshape", "x k"),
        ],
        [made("Reshape", "x back", "s"), made("Concat", "s s", "c", axis=2), made("Sigmoid", "c")],
        [
            made("Transpose", "x", "c", perm=(0, 2, 3, 1)),
            made("MatMul", "c m", "d"),
            made("Transpose", "d", perm=(0, 3, 1, 2)),
        ],
    ],
)
def test_ranks_come_from_operators(nodes: list[onnx.NodeProto]) -> None:
    model = ranked_model(nodes)
    graph = onnx_ir.from_proto(model)
    assert lower_group_norms(graph) == 1
    rng = np.random.default_rng(2)
    shapes = {"x": (2, 4, 3, 5), "t": (2, 4)}
    feeds = {
        item.name: rng.standard_normal(shapes[item.name]).astype(np.float32) for item in model.graph.input
    }
    assert relative_l2(run(onnx_ir.to_proto(graph), feeds), run(model, feeds)) < 1e-5


@pytest.mark.parametrize(
    "nodes",
    [
        [made("Neg", "x")],
        [made("Identity", "u", "i"), made("Add", "x i")],
        [made("Identity", "u", "i"), made("Unsqueeze", "i axes")],
        [made("Identity", "u", "i"), made("MatMul", "x i")],
        [made("Shape", "x", "k"), made("Reshape", "x k")],
        [made("Squeeze", "x")],
        [  # all sizes at once
            made("Shape", "x", "z"),
            made("Squeeze", "z", "q"),
            made("Reshape", "q rest", "k"),
            made("Reshape", "x k"),
        ],
        [made("Shape", "x", "z"), made("Concat", "z", "k", axis=0), made("Reshape", "x k")],
    ],
)
def test_what_tells_no_rank_stays(nodes: list[onnx.NodeProto]) -> None:
    assert lower_group_norms(onnx_ir.from_proto(ranked_model(nodes))) == 0


C, D = 6, 5  # columns of x, and of a half


def geglu_model(
    *, axis: int = -1, approximate: str = "none", swapped: bool = False, seen: str = "", stored: bool = True
) -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    weights = {
        "w": rng.standard_normal((2 * D, C)).astype(np.float32),
        "c": rng.standard_normal(2 * D).astype(np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=(1, 0)),
        helper.make_node("MatMul", ["x", "wt"], ["p"]),
        helper.make_node("Add", ["c", "p"] if swapped else ["p", "c"], ["h"]),
        helper.make_node("Split", ["h"], ["a", "b"], axis=axis, num_outputs=2),
        helper.make_node("Gelu", ["b"], ["z"], approximate=approximate),
        helper.make_node("Mul", ["a", "z"], ["o"] if seen else ["y"]),
    ]
    if seen:  # somebody else sees what would be gone
        nodes += [helper.make_node("ReduceSum", [seen], ["s"], keepdims=0), made("Add", "o s", "y")]
    inputs: dict[str, list[Any] | None] = {"x": ["B", "L", C]}
    if not stored:
        weights.pop("w")
        inputs["w"] = [2 * D, C]
    return model_of(nodes, inputs, weights)


@pytest.mark.parametrize("options", [{}, {"axis": 2}, {"swapped": True}, {"seen": "a"}])
def test_it_is_torchs_geglu(options: dict[str, Any]) -> None:
    model = geglu_model(**options)
    graph = onnx_ir.from_proto(model)
    assert lower_geglus(graph) == 1
    proto = onnx_ir.to_proto(graph)
    assert "Gelu" not in kinds(proto)
    weight, bias = (
        torch.from_numpy(numpy_helper.to_array(item).copy()).double() for item in model.graph.initializer
    )
    x = np.random.default_rng(4).standard_normal((2, 7, C)).astype(np.float32)
    a, b = (torch.from_numpy(x).double() @ weight.T + bias).chunk(2, dim=-1)
    wanted = a * torch.nn.functional.gelu(b) + (a.sum() if options.get("seen") else 0)
    assert relative_l2(run(proto, {"x": x}), wanted.numpy()) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"axis": 1},
        {"approximate": "tanh"},
        {"seen": "p"},
        {"seen": "h"},
        {"seen": "b"},
        {"stored": False},
    ],
)
def test_other_gates_stay(options: dict[str, Any]) -> None:
    graph = onnx_ir.from_proto(geglu_model(**options))
    assert lower_geglus(graph) == 0


def inputs_of(package: Package, net: str, height: int, width: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    sizes = {"B": 2, "N": 2, "H/8": height, "W/8": width, "T": 77}
    return {
        item.name: rng.standard_normal(
            [sizes[size] if isinstance(size, str) else size for size in item.shape]
        ).astype(DTYPES[item.dtype])
        for item in package.manifest.nets[net].spec.inputs
    }


@pytest.mark.parametrize("net", ["unet", "vae_decoder"])
@pytest.mark.parametrize("layout", CPU_LAYOUTS[1:])
def test_a_whole_net_is_the_same(demo: Package, tmp_path: Path, net: str, layout: str) -> None:
    lowered = lower_for_cpu(demo, net, layout, tmp_path)
    assert bool(lowered.kernels) is (layout == "winograd")
    left = {node.op_type for node in onnx.load_model_from_string(lowered.graph).graph.node}
    assert not left & {"GroupNormalization", "Gelu", *(["Split"] if net == "vae_decoder" else [])}
    with OnnxRuntimeNet(demo, net) as plain, OnnxRuntimeNet(demo, net, lowered=lowered) as fast:
        assert (fast.memory.weights > plain.memory.weights) is (layout == "winograd")
        for height, width in ((8, 8), (5, 11)):
            feeds = inputs_of(demo, net, height, width)
            found, wanted = fast(**feeds), plain(**feeds)
            for name, array in wanted.items():
                if array.dtype == np.uint8:  # a value beside a half may be rounded to its other side
                    assert int(np.abs(found[name].astype(int) - array).max()) <= 1
                else:
                    assert relative_l2(found[name], array) < 1e-5
