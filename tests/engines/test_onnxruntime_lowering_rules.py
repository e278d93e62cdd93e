"""Each rule of the lowering on a graph of a few nodes, run on the CPU against the graph as it was."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from tests.engines.contrib_oracle import attribute, executable, lowering, relative_l2, session, typed


def small(
    body: str,
    weights: Mapping[str, tuple[int, ...]],
    *,
    opset: int = 23,
    dtype: str = "float",
    x: str = "N,8,H,W",
) -> onnx.ModelProto:
    """A graph from `x` to `y` with random weights, typed like a package's."""
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g ({dtype}[{x}] x) => ({dtype} y) {{ {body} }}'
    )
    rng = np.random.default_rng(1)
    kind = {"float": np.float32, "float16": np.float16, "double": np.float64}[dtype]
    for name, shape in weights.items():
        array = rng.uniform(-1, 1, shape).astype(kind)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return typed(model)


def check(model: onnx.ModelProto, operators: list[str], *, bar: float = 1e-5, run: bool = True) -> None:
    """The operators of the lowered graph, those on weights aside, and its result at two sizes."""
    changed = lowering(model)
    stored = {item.name for item in changed.graph.initializer}
    assert [n.op_type for n in changed.graph.node if n.input and n.input[0] not in stored] == operators
    assert changed.graph.input[0] == model.graph.input[0]
    assert changed.graph.output[0].name == "y"
    if not run:
        return
    left, right = session(executable(changed)), session(model)
    item = right.get_inputs()[0]
    kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[item.type]
    for batch, height, width in ((1, 6, 4), (2, 5, 7)):
        known = {"N": batch, "H": height, "W": width}
        shape = [known[dim] if isinstance(dim, str) else dim for dim in item.shape]
        array = np.random.default_rng(2).standard_normal(shape).astype(kind)
        assert relative_l2(left.run(None, {"x": array})[0], right.run(None, {"x": array})[0]) <= bar


NORM = "n = GroupNormalization <num_groups = 4, epsilon = 0.001> (x, g, b)"
AFFINE = {"g": (8,), "b": (8,)}
SILU = "s = Sigmoid (n) y = Mul (s, n)"


@pytest.mark.parametrize(
    ("behind", "operators"),
    [
        (SILU, ["Transpose", "GroupNorm", "Transpose"]),
        ("m = Mul (n, n) y = Sigmoid (m)", ["Transpose", "GroupNorm", "Mul", "Sigmoid", "Transpose"]),
        (
            "s = Sigmoid (n) m = Mul (n, s) y = Add (m, n)",  # someone else sees n
            ["Transpose", "GroupNorm", "Sigmoid", "Mul", "Add", "Transpose"],
        ),
        (
            "s = Sigmoid (n) m = Mul (n, s) y = Add (m, s)",  # someone else sees its sigmoid
            ["Transpose", "GroupNorm", "Sigmoid", "Mul", "Add", "Transpose"],
        ),
    ],
)
def test_only_a_private_silu_is_fused(behind: str, operators: list[str]) -> None:
    if behind == SILU:
        behind = "s = Sigmoid (n) m = Mul (s, n) y = Identity (m)"
    check(small(f"{NORM} {behind}", AFFINE), operators)


def test_a_silu_that_is_an_output_stays() -> None:
    check(small(f"{NORM} {SILU}", AFFINE), ["Transpose", "GroupNorm", "Sigmoid", "Mul", "Transpose"])


@pytest.mark.parametrize(("alpha", "active"), [("", 1), ("<alpha = 2.0>", 0)])
def test_swish(alpha: str, active: int) -> None:
    model = small(f"{NORM} m = Swish {alpha} (n) y = Identity (m)", AFFINE, opset=24)
    norm = next(node for node in lowering(model).graph.node if node.op_type == "GroupNorm")
    assert attribute(norm, "activation") == active


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(12, 4), (1028, 2), (8, 3)],
    ids=["odd share", "share over 512", "no division"],
)
def test_what_the_kernel_does_not_take_stays(channels: int, groups: int) -> None:
    body = f"n = GroupNormalization <num_groups = {groups}> (x, g, b) y = Identity (n)"
    model = small(body, {"g": (channels,), "b": (channels,)}, x=f"N,{channels},H,W")
    check(model, ["GroupNormalization"], run=channels % groups == 0)


@pytest.mark.parametrize("share", [2, 512])
def test_the_ends_of_what_the_kernel_takes(share: int) -> None:
    body = "n = GroupNormalization <num_groups = 2> (x, g, b) y = Identity (n)"
    model = small(body, {"g": (2 * share,), "b": (2 * share,)}, x=f"N,{2 * share},H,W")
    check(model, ["Transpose", "GroupNorm", "Transpose"])


def test_other_types_and_opsets_stay() -> None:
    check(small(f"{NORM} y = Identity (n)", AFFINE, dtype="double"), ["GroupNormalization"], run=False)
    old = {"g": (4,), "b": (4,)}  # per group, before opset 21
    check(small(f"{NORM} y = Identity (n)", old, opset=20), ["GroupNormalization"])


def test_fp16_gets_gamma_and_beta_in_float() -> None:
    model = small(f"{NORM} s = Sigmoid (n) m = Mul (s, n) y = Identity (m)", AFFINE, dtype="float16")
    changed = lowering(model)
    norm = next(node for node in changed.graph.node if node.op_type == "GroupNorm")
    casts = {node.output[0]: attribute(node, "to") for node in changed.graph.node if node.op_type == "Cast"}
    assert [casts[name] for name in norm.input[1:]] == [TensorProto.FLOAT] * 2
    check(model, ["Transpose", "GroupNorm", "Transpose"], bar=2e-3)


def test_norms_that_share_gamma_each_get_a_float_one() -> None:
    body = f"{NORM} y = GroupNormalization <num_groups = 4, epsilon = 0.001> (n, g, b)"
    changed = lowering(small(body, AFFINE, dtype="float16"))
    casts = {node.output[0] for node in changed.graph.node if node.op_type == "Cast"}
    norms = [node for node in changed.graph.node if node.op_type == "GroupNorm"]
    assert len(norms) == 2
    assert all(name in casts for node in norms for name in node.input[1:])


PAIR = "c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w, v)"
WEIGHTS = {"w": (8, 8, 3, 3), "half": (8, 2, 3, 3), "v": (8,)}


@pytest.mark.parametrize(
    ("body", "operators"),
    [
        (  # strides
            "y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, v)",
            ["Transpose", "NhwcConv", "Transpose"],
        ),
        (  # the CUDA provider would hand it to the CPU
            "y = Conv <kernel_shape = [3, 3], pads = [0, 0, 1, 1]> (x, w, v)",
            ["Conv"],
        ),
        ('y = Conv <kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (x, w, v)', ["Conv"]),
        (  # residual, with one Transpose of x for both
            f"{PAIR} y = Add (c, x)",
            ["Transpose", "NhwcConv", "Add", "Transpose"],
        ),
        (
            f"{PAIR} d = Concat <axis = 1> (c, x) e = Shape <start = 2, end = 4> (d) "
            "h = Shape <start = 0, end = 2> (d) z = Concat <axis = 0> (h, e) "
            'r = Resize <mode = "nearest"> (d, , , z) y = Relu (r)',
            [
                *("Transpose", "NhwcConv", "Concat", "Shape", "Gather", "Shape", "Gather"),
                *("Concat", "Gather", "Resize", "Relu", "Transpose"),
            ],
        ),
        (  # only nearest takes any axes in CUDA
            f'{PAIR} z = Constant <value = float[4] {{1, 1, 2, 2}}> () y = Resize <mode = "linear"> (c, , z)',
            ["Transpose", "NhwcConv", "Transpose", "Resize"],
        ),
        (  # over pixels alone: an order of axes, kept by taking the other layout
            f"{PAIR} z = Constant <value = int64[2] {{2, 3}}> () y = ReduceMean (c, z)",
            ["Transpose", "NhwcConv", "Transpose", "ReduceMean"],
        ),
        (  # the weight of a grouped convolution is (M, C / group, kH, kW)
            "y = Conv <kernel_shape = [3, 3], group = 4> (x, half, v)",
            ["Transpose", "NhwcConv", "Transpose"],
        ),
    ],
)
def test_convolutions(body: str, operators: list[str]) -> None:
    check(small(body, WEIGHTS), operators)


def test_what_broadcasts_along_the_width_keeps_its_layout() -> None:
    body = f"{PAIR} y = Add (c, row)"
    check(small(body, {**WEIGHTS, "row": (4,)}, x="N,8,H,4"), ["Transpose", "NhwcConv", "Transpose", "Add"])


def test_double_convolutions_stay() -> None:
    check(small(PAIR.replace("c =", "y ="), WEIGHTS, dtype="double"), ["Conv"], run=False)
