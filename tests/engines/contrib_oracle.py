"""The contrib operators that only CUDA has, spelled in standard ones: so ONNX Runtime's CPU can run them.

Written from the operators' documentation (docs/ContribOperators.md of microsoft/onnxruntime), not from our
lowering:

    GroupNorm       gamma (x - mean) / sqrt(variance + epsilon) + beta, NHWC; SiLU of it if `activation` is 1
    SkipGroupNorm   GroupNorm of x + skip + bias, and that sum; skip may be (N, 1, 1, C) or (N, C)
    NhwcConv        a convolution whose input is NHWC and whose weight is (M, kH, kW, C / group)
    BiasAdd         x + bias + skip
    BiasSplitGelu   left * gelu(right) of the halves of x + bias
    MatMulIntegerToFloat   a_scale b_scale (A - a_zero_point) B + bias; the CPU has a kernel, whose sums
                    saturate on some processors, so it is one of `exact`

SkipLayerNormalization and MultiHeadAttention have kernels on the CPU, and are left to them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper, parser, shape_inference

from latentrt.engines.onnxruntime.lowering.lower import lower_model

DOMAIN = "oracle"  # ONNX Runtime prefers its own schema in com.microsoft to a function of the model

_GROUP_NORM = """
<domain: "oracle", opset_import: ["" : 23]>
GroupNorm <epsilon, groups, activation, channels_last> (X, gamma, beta) => (Y) {
    keep = Constant <value = int64[3] {0, 0, 0}> ()
    rest = Constant <value = int64[1] {-1}> ()
    g = Constant <value_int: int = @groups> ()
    g1 = Reshape (g, rest)
    split = Concat <axis = 0> (keep, g1, rest)
    x32 = Cast <to = 1> (X)
    x5 = Reshape (x32, split)
    axes = Constant <value = int64[3] {1, 2, 4}> ()
    mean = ReduceMean <keepdims = 1> (x5, axes)
    centred = Sub (x5, mean)
    square = Mul (centred, centred)
    variance = ReduceMean <keepdims = 1> (square, axes)
    eps = Constant <value_float: float = @epsilon> ()
    safe = Add (variance, eps)
    deviation = Sqrt (safe)
    normal5 = Div (centred, deviation)
    shape = Shape (X)
    normal = Reshape (normal5, shape)
    scaled = Mul (normal, gamma)
    plain = Add (scaled, beta)
    gate = Sigmoid (plain)
    silu = Mul (plain, gate)
    active = Constant <value_int: int = @activation> ()
    chosen = Cast <to = 9> (active)
    result = Where (chosen, silu, plain)
    Y = CastLike (result, X)
}
"""
_NHWC_CONV = """
<domain: "oracle", opset_import: ["" : 23]>
NhwcConv <auto_pad, kernel_shape, dilations, strides, pads, group> (X, W, B) => (Y) {
    x = Transpose <perm = [0, 3, 1, 2]> (X)
    w = Transpose <perm = [0, 3, 1, 2]> (W)
    y = Conv <auto_pad: string = @auto_pad, kernel_shape: ints = @kernel_shape, dilations: ints = @dilations,
              strides: ints = @strides, pads: ints = @pads, group: int = @group> (x, w, B)
    Y = Transpose <perm = [0, 2, 3, 1]> (y)
}
"""

_SKIP_GROUP_NORM = """
<domain: "oracle", opset_import: ["" : 23, "oracle" : 1]>
SkipGroupNorm{kind} <epsilon, groups, activation, channels_last> (X, gamma, beta, skip{bias}) => (Y, S) {{
    shape = Shape (X)
    n = Shape <start = 0, end = 1> (X)
    c = Shape <start = 3, end = 4> (X)
    rest = Constant <value = int64[1] {{-1}}> ()
    rows = Concat <axis = 0> (n, rest, c)
    x3 = Reshape (X, rows)
    skip3 = Reshape (skip, rows)
    {terms}
    sum3 = Add (biased, skip3)
    S = Reshape (sum3, shape)
    Y = oracle.GroupNorm <epsilon: float = @epsilon, groups: int = @groups, activation: int = @activation,
                          channels_last: int = @channels_last> (S, gamma, beta)
}}
"""
_BIAS_ADD = """
<domain: "oracle", opset_import: ["" : 23]>
BiasAdd (X, bias, skip) => (Y) {
    biased = Add (X, bias)
    Y = Add (biased, skip)
}
"""
_BIAS_SPLIT_GELU = """
<domain: "oracle", opset_import: ["" : 23]>
BiasSplitGelu (X, bias) => (Y) {
    biased = Add (X, bias)
    left, right = Split <axis = 2, num_outputs = 2> (biased)
    gate = Gelu (right)
    Y = Mul (left, gate)
}
"""
_MATMUL_INTEGER_TO_FLOAT = """
<domain: "oracle", opset_import: ["" : 23]>
MatMulIntegerToFloat{kind} (A, B, a_scale, b_scale, a_zero_point{bias}) => (Y) {{
    a = Cast <to = 11> (A)
    b = Cast <to = 11> (B)
    zero = Cast <to = 11> (a_zero_point)
    centred = Sub (a, zero)
    sums = MatMul (centred, b)
    data_scale = Cast <to = 11> (a_scale)
    weight_scale = Cast <to = 11> (b_scale)
    scale = Mul (data_scale, weight_scale)
    scaled = Mul (sums, scale)
    {terms}
    Y = Cast <to = 1> (y)
}}
"""
_EXACT = {
    "": _MATMUL_INTEGER_TO_FLOAT.format(kind="", bias="", terms="y = Identity (scaled)"),
    "Bias": _MATMUL_INTEGER_TO_FLOAT.format(
        kind="Bias",
        bias=", no_zero_point, bias",
        terms="wide = Cast <to = 11> (bias)\n    y = Add (scaled, wide)",
    ),
}
_FUNCTIONS = {
    "GroupNorm": _GROUP_NORM,
    "NhwcConv": _NHWC_CONV,
    "SkipGroupNorm": _SKIP_GROUP_NORM.format(kind="", bias="", terms="biased = Identity (x3)"),
    "SkipGroupNormBias": _SKIP_GROUP_NORM.format(kind="Bias", bias=", bias", terms="biased = Add (x3, bias)"),
    "BiasAdd": _BIAS_ADD,
    "BiasSplitGelu": _BIAS_SPLIT_GELU,
}


def executable(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose contrib operators without a kernel on the CPU are functions of the model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.domain == "com.microsoft" and node.op_type in _FUNCTIONS:
            node.domain = DOMAIN
            if node.op_type == "SkipGroupNorm":
                node.op_type += "Bias" if len(node.input) == 5 else ""
                node.output.extend([f"{node.output[0]}/sum"] * (2 - len(node.output)))
    copy.functions.extend(map(parser.parse_function, _FUNCTIONS.values()))
    copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return copy


def exact(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose products of bytes are functions of the model, with sums in float64."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            node.domain = DOMAIN
            if len(node.input) == 7:
                node.op_type += "Bias"
    copy.functions.extend(map(parser.parse_function, _EXACT.values()))
    copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return copy


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose values have types and no shapes, like a package's."""
    model = shape_inference.infer_shapes(model)
    known = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    kind = model.graph.input[0].type.tensor_type.elem_type
    for value in model.graph.value_info:
        value.type.tensor_type.ClearField("shape")
    for node in model.graph.node:  # inference stops behind GroupNormalization
        if node.output[0] not in known and node.op_type not in ("Shape", "Constant", "Concat"):
            model.graph.value_info.append(helper.make_tensor_value_info(node.output[0], kind, None))
    return model


def lowering(model: onnx.ModelProto) -> onnx.ModelProto:
    """What `lower_model` makes of a graph."""
    changed = ir.from_proto(model)
    lower_model(changed)
    return ir.to_proto(changed)


def session(model: onnx.ModelProto, weights: Path | None = None) -> ort.InferenceSession:
    """A CPU session; `weights` is the folder that external data is relative to."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def relative_l2(found: Any, wanted: Any) -> float:
    """|found - wanted| / |wanted| in float64."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """The value of a node's attribute."""
    return next(helper.get_attribute_value(item) for item in node.attribute if item.name == name)
