"""Each rule that puts a kernel of ONNX Runtime's in place of several, on a graph of a few nodes.

The lowered graph is run against the graph as it was: MultiHeadAttention and SkipLayerNormalization by the
CPU's own kernels, the others as their documentation says (`contrib_oracle.py`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from latentrt.engines.onnxruntime.lowering.lower import REVISION
from latentrt.engines.onnxruntime.lowering.shapes import Dims, Flat, Size, shapes_of
from tests.engines.contrib_oracle import attribute, executable, lowering, relative_l2, session, typed

KINDS = {"float": np.float32, "float16": np.float16, "double": np.float64}
BARS = {"float": 1e-5, "float16": 3e-3}  # relative L2; fp16 rounds in other places
SIZES = ({"B": 1, "L": 6, "T": 5, "H": 4, "W": 3}, {"B": 3, "L": 7, "T": 2, "H": 3, "W": 5})
ROWS = {"x": "B,L,64"}
NUMBERS = {
    "split": (0, 0, 2, 32),
    "merge": (0, 0, 64),
    "rows": (0, -1, 64),
    "none": (0,),
    "rest": (-1,),
    "columns": (64,),
    "pairs": (0, 2, -1),
    "halves": (0, 0, 2, 32),
    "turned": (0, 2, 6, 32),
}


def graph(
    body: str,
    inputs: Mapping[str, str],
    weights: Mapping[str, tuple[int, ...]] | None = None,
    *,
    dtype: str = "float",
    outputs: Sequence[str] = ("y",),
) -> onnx.ModelProto:
    """A graph with random weights whose values have types and no shapes, like a package's."""
    given = ", ".join(
        f"{dtype}[{shape}] {name}" if shape else f"{dtype} {name}" for name, shape in inputs.items()
    )
    made = ", ".join(f"{dtype} {name}" for name in outputs)
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23]> g ({given}) => ({made}) {{ {body} }}'
    )
    rng = np.random.default_rng(1)
    for name, shape in (weights or {}).items():
        array = rng.uniform(-1, 1, shape).astype(KINDS[dtype])
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for name, numbers in NUMBERS.items():
        if f"{name}," in body or f"{name})" in body:
            model.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    if "quarter" in body:
        quarter = np.array(0.25, KINDS[dtype])
        model.graph.initializer.append(numpy_helper.from_array(quarter, "quarter"))
    return typed(model)


def computed(model: onnx.ModelProto) -> list[str]:
    """The operators, those on weights and on shapes aside."""
    aside = {item.name for item in model.graph.initializer}
    kinds: list[str] = []
    for node in model.graph.node:
        if all(name in aside for name in node.input) or node.op_type == "Shape":
            aside.update(node.output)
        else:
            kinds.append(node.op_type)
    return kinds


def check(model: onnx.ModelProto, operators: str, *, run: bool = True) -> onnx.ModelProto:
    """That the lowered graph has these operators, and gives what the graph gave; the lowered graph."""
    changed = lowering(model)
    assert computed(changed) == operators.split()
    if not run:
        return changed
    left, right = session(executable(changed)), session(model)
    dtype = {"tensor(float)": "float", "tensor(float16)": "float16"}[right.get_inputs()[0].type]
    for sizes in SIZES:
        rng = np.random.default_rng(2)
        feeds = {
            item.name: rng.standard_normal([sizes.get(str(dim), dim) for dim in item.shape]).astype(
                KINDS[dtype]
            )
            for item in right.get_inputs()
        }
        for found, wanted in zip(left.run(None, feeds), right.run(None, feeds), strict=True):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert relative_l2(found, wanted) <= BARS[dtype], sizes
    return changed


def unchanged(model: onnx.ModelProto) -> None:
    assert computed(lowering(model)) == computed(model)


def heads(name: str, source: str = "x") -> str:
    """Heads of a projection `name` of `source`."""
    return (
        f"{name}p = MatMul ({source}, w{name}) {name}r = Reshape ({name}p, split) "
        f"{name}h = Transpose <perm = [0, 2, 1, 3]> ({name}r) "
    )


SPLIT = "r = Reshape (x, split) h = Transpose <perm = [0, 2, 1, 3]> (r)"
MERGED = "t = Transpose <perm = [0, 2, 1, 3]> (a) m = Reshape (t, merge) y = MatMul (m, wo)"
PROJECTIONS = dict.fromkeys(("wq", "wk", "wv", "wo"), (64, 64))
SELF = heads("q") + heads("k") + heads("v")


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("options", ["", "<scale = 0.3>", "<is_causal = 1>", "<softcap = 2.0>"])
def test_self_attention_splits_no_heads(options: str, dtype: str) -> None:
    model = graph(f"{SELF} a = Attention {options} (qh, kh, vh) {MERGED}", ROWS, PROJECTIONS, dtype=dtype)
    changed = check(model, "MatMul MatMul MatMul Attention MatMul")
    node = next(node for node in changed.graph.node if node.op_type == "Attention")
    assert (attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")) == (2, 2)


def test_self_attention_keeps_its_mask() -> None:
    model = graph(f"{SELF} a = Attention (qh, kh, vh, z) {MERGED}", {**ROWS, "z": "L,L"}, PROJECTIONS)
    check(model, "MatMul MatMul MatMul Attention MatMul")


def test_keys_and_values_may_come_from_elsewhere() -> None:
    body = heads("q") + heads("k", "c") + heads("v", "c")
    model = graph(f"{body} a = Attention (qh, kh, vh) {MERGED}", {**ROWS, "c": "B,T,64"}, PROJECTIONS)
    check(model, "MatMul MatMul MatMul Attention MatMul")


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (f"{SELF} a = Attention (qh, kh, vh, , pk, pv) {MERGED}", {"pk": "B,2,T,32", "pv": "B,2,T,32"}),
        (f"{heads('q') + heads('k')} a = Attention (qh, kh, v) {MERGED}", {"v": "B,2,L,32"}),
        (f"{SELF} a = Attention (qh, kh, vh) {MERGED} o = Neg (a)", {}),
        (f"{SELF} a = Attention (qh, kh, vh) {MERGED}".replace("merge", "pairs"), {}),
        (f"{SELF} a = Attention (qh, kh, vh) {MERGED}".replace("merge", "halves"), {}),
        (f"{SELF.replace('split', 'turned')} a = Attention (qh, kh, vh) {MERGED}", {"x": "B,6,64"}),
        (
            f"{SELF.replace('[0, 2, 1, 3]', '[0, 1, 2, 3]')} a = Attention (qh, kh, vh) {MERGED}",
            {"x": "B,2,64"},
        ),
        (
            f"{SELF} a = Attention (qh, kh, vh) {MERGED.replace('[0, 2, 1, 3]', '[0, 1, 2, 3]')}",
            {"x": "B,2,64"},
        ),
        (f"{SELF} a, b, c = Attention (qh, kh, vh) {MERGED}", {}),
        (f"{SELF.replace('[0, 2, 1, 3]', '[0, 1, 2, 3]')} a = Attention (qh, kh, vh) {MERGED}", {}),
        (f"{SELF} a = Attention (qh, kh, vh) {MERGED.replace('[0, 2, 1, 3]', '[0, 3, 1, 2]')}", {}),
        (f"{SELF} a = Attention (qh, kh, vh) y = ReduceSum <keepdims = 0> (a)", {}),
        ("qh = Neg (x) a = Attention (qh, qh, qh) y = Neg (a)", {}),
        (f"{SPLIT} a = Attention (h, h, h) {MERGED}", {"x": "B,L,8,8"}),
    ],
    ids=[
        *("cache", "heads", "seen", "pairs", "halves", "turned", "two rows", "two merged"),
        *("outputs", "rows", "merged", "unmerged", "four", "five"),
    ],
)
def test_other_attention_stays(body: str, inputs: Mapping[str, str]) -> None:
    outputs = ("y", "o") if "o = " in body else ("y",)
    model = graph(
        body, {**({"x": "B,2,L,32"} if "Neg (x)" in body else ROWS), **inputs}, PROJECTIONS, outputs=outputs
    )
    unchanged(model)


def test_attention_that_is_an_output_stays() -> None:
    body = f"{SELF} a = Attention (qh, kh, vh) {MERGED}"
    unchanged(graph(body, ROWS, PROJECTIONS, outputs=("y", "a")))


def test_attention_in_double_and_of_unknown_rank_stays() -> None:
    body = f"{SELF} a = Attention (qh, kh, vh) {MERGED}"
    unchanged(graph(body, ROWS, PROJECTIONS, dtype="double"))
    unchanged(graph(body, {"x": ""}, PROJECTIONS))


CONTEXT = {**ROWS, "k": "B,2,T,32", "v": "B,2,T,32"}


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("options", ["", "<scale = 0.3>"])
def test_cross_attention_takes_keys_and_values_as_they_come(options: str, dtype: str) -> None:
    model = graph(
        f"{heads('q')} a = Attention {options} (qh, k, v) {MERGED}", CONTEXT, PROJECTIONS, dtype=dtype
    )
    check(model, "MatMul MultiHeadAttention MatMul")


@pytest.mark.parametrize(
    ("call", "inputs"),
    [
        ("Attention <is_causal = 1> (qh, k, v)", {}),
        ("Attention <softcap = 2.0> (qh, k, v)", {}),
        ("Attention (qh, k, v, z)", {"z": "L,T"}),
        ("Attention (qh, k, v)", {"k": "B,1,T,32", "v": "B,1,T,32"}),  # a head for all
        ("Attention (qh, k, v)", {"v": "B,2,T,S"}),  # values of another size, perhaps
        ("Attention (qh, k, v)", {"k": ""}),
    ],
    ids=["causal", "softcap", "mask", "one head", "size", "rank"],
)
def test_other_cross_attention_stays(call: str, inputs: Mapping[str, str]) -> None:
    unchanged(graph(f"{heads('q')} a = {call} {MERGED}", {**CONTEXT, **inputs}, PROJECTIONS))


UPCAST = (
    "s = Cast <to = 1> (quarter) f = Cast <to = 1> (qh) i = Mul (f, s) "
    "u = Transpose <perm = [0, 1, 3, 2]> (kh) g = Cast <to = 1> (u) d = MatMul (i, g) "
    "e = Softmax <axis = -1> (d) p = Cast <to = 10> (e) a = MatMul (p, vh) "
)


def test_upcast_scores_are_left_to_the_kernel() -> None:
    changed = check(
        graph(f"{SELF} {UPCAST} {MERGED}", ROWS, PROJECTIONS, dtype="float16"),
        "MatMul MatMul MatMul Attention MatMul",
    )
    node = next(node for node in changed.graph.node if node.op_type == "Attention")
    assert attribute(node, "scale") == 0.25


@pytest.mark.parametrize(
    "changes",
    [
        [("i = Mul (f, s)", "i = Mul (f, f)")],
        [("g = Cast <to = 1> (u)", "n = Cast <to = 1> (u) g = Neg (n)")],
        [("[0, 1, 3, 2]", "[0, 1, 2, 3]")],
        [("a = MatMul (p, vh)", "n = Neg (vh) a = MatMul (p, n)")],
        [("axis = -1", "axis = 2")],
        [("Softmax <axis = -1> (d)", "Sigmoid (d)")],
        [("to = 1", "to = 11")],
        [("Cast <to = 10> (e)", "Cast <to = 16> (e) vb = Cast <to = 16> (vh)"), ("(p, vh)", "(p, vb)")],
    ],
    ids=["scale", "float32 keys", "keys", "values", "axis", "sigmoid", "double", "bfloat16"],
)
def test_other_islands_stay(changes: Sequence[tuple[str, str]]) -> None:
    body = UPCAST
    for old, new in changes:
        body = body.replace(old, new)
    unchanged(graph(f"{SELF} {body} {MERGED}", ROWS, PROJECTIONS, dtype="float16"))


@pytest.mark.parametrize(("heads_of", "size"), [(2, 12), (1, 264)])
def test_islands_of_heads_that_no_fused_kernel_takes_stay(heads_of: int, size: int) -> None:
    width = heads_of * size
    weights = dict.fromkeys(PROJECTIONS, (width, width))
    model = graph(f"{SELF} {UPCAST} {MERGED}", {"x": f"B,L,{width}"}, weights, dtype="float16")
    exchange(model, "split", np.array((0, 0, heads_of, size), np.int64))
    unchanged(model)


def test_an_island_that_is_scaled_by_a_negative_number_stays() -> None:
    """The operator's scale has to be positive (core/providers/cuda/llm/attention.cc, the constructor)."""
    model = graph(f"{SELF} {UPCAST} {MERGED}", ROWS, PROJECTIONS, dtype="float16")
    exchange(model, "quarter", np.array(-0.25, np.float16))
    unchanged(model)


def exchange(model: onnx.ModelProto, name: str, content: Any) -> None:
    """Give a weight other content."""
    item = next(item for item in model.graph.initializer if item.name == name)
    item.CopyFrom(numpy_helper.from_array(content, name))


def geglu(width: int, *, axis: int = 2, gelu: str = "Gelu", behind: str = "") -> str:
    return (
        f"h = MatMul (x, w) b = Add (h, c) l, r = Split <axis = {axis}, num_outputs = 2> (b) "
        f"g = {gelu} (r) z = Mul (l, g) y = MatMul (z, o) {behind}"
    )


def gates(width: int) -> dict[str, tuple[int, ...]]:
    return {"w": (64, width), "c": (width,), "o": (width // 2, 8)}


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("width", [2560, 5120, 6144, 10240, 12288])
def test_geglu_is_one_kernel(width: int, dtype: str) -> None:
    check(graph(geglu(width), ROWS, gates(width), dtype=dtype), "MatMul BiasSplitGelu MatMul")


@pytest.mark.parametrize(
    "model",
    [
        graph(geglu(1280), ROWS, gates(1280)),
        graph(geglu(2560, axis=1), {"x": "L,64"}, gates(2560)),
        graph(geglu(2560, axis=3), {"x": "B,2,L,64"}, gates(2560)),
        graph(geglu(2560, gelu='Gelu <approximate = "tanh">'), ROWS, gates(2560)),
        graph(geglu(2560, gelu="Relu"), ROWS, gates(2560)),
        graph(geglu(2560).replace("Mul (l, g)", "Add (l, g)"), ROWS, gates(2560)),
        graph(geglu(2560).replace("Mul (l, g)", "Mul (g, g)"), ROWS, gates(2560)),
        graph(geglu(2560, behind="s = Neg (l)"), ROWS, gates(2560), outputs=("y", "s")),
        graph(geglu(2560, behind="s = Neg (g)"), ROWS, gates(2560), outputs=("y", "s")),
        graph(geglu(2560), ROWS, gates(2560), outputs=("y", "z")),
        graph(geglu(2560), ROWS, gates(2560), dtype="double"),
    ],
    ids=[
        "width",
        "2-D",
        "4-D",
        "tanh",
        "relu",
        "add",
        "square",
        "seen half",
        "seen gate",
        "output",
        "double",
    ],
)
def test_other_gates_stay(model: onnx.ModelProto) -> None:
    unchanged(model)


NORM = "n = LayerNormalization <epsilon = 0.01> (s, g, e) y = MatMul (n, wo)"
AFFINE = {"g": (64,), "e": (64,), "c": (64,), "wq": (64, 64), "wo": (64, 64)}
PAIR = {**ROWS, "r": "B,L,64"}


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize(
    "terms",
    [
        "p = MatMul (x, wq) b = Add (p, c) s = Add (b, r)",
        "p = MatMul (x, wq) b = Add (c, p) s = Add (r, b)",
        "p = MatMul (x, wq) s = Add (p, r)",
        "p = MatMul (x, wq) b = Add (p, r) s = Add (b, x)",
        "p = MatMul (x, wq) b = Add (p, r) d = Relu (b) s = Add (p, d)",
    ],
    ids=["biased", "the other way round", "without bias", "three", "no weight"],
)
def test_a_layer_norm_takes_the_sum_before_it(terms: str, dtype: str) -> None:
    before = "MatMul" + (" Add" if "b = Add (p, r)" in terms else "") + (" Relu" if "Relu" in terms else "")
    model = graph(f"{terms} {NORM}", PAIR, AFFINE, dtype=dtype)
    check(model, f"{before} SkipLayerNormalization MatMul")
    seen = graph(
        f"o = Neg (s) {terms} {NORM}".replace("o = Neg (s)", "") + " o = Neg (s)",
        PAIR,
        AFFINE,
        dtype=dtype,
        outputs=("y", "o"),
    )
    changed = check(seen, f"{before} SkipLayerNormalization MatMul Neg")
    node = next(node for node in changed.graph.node if node.op_type == "SkipLayerNormalization")
    assert len(node.output) == 4
    assert not any(node.output[1:3])


def test_what_widens_a_column_is_no_bias() -> None:
    body = f"b = Add (z, c) s = Add (b, r) {NORM}"
    check(graph(body, {"z": "B,L,1", "r": "B,L,64"}, AFFINE), "Add SkipLayerNormalization MatMul")


def test_a_sum_is_made_before_whoever_uses_it() -> None:
    body = f"p = MatMul (x, wq) s = Add (p, r) o = Neg (s) {NORM}"
    check(graph(body, PAIR, AFFINE, outputs=("y", "o")), "MatMul SkipLayerNormalization Neg MatMul")


def test_of_two_norms_of_a_sum_one_takes_it() -> None:
    body = f"s = Add (x, r) k = LayerNormalization (s, g, e) {NORM} z = MatMul (k, wo)"
    model = graph(body, PAIR, AFFINE, outputs=("y", "z"))
    changed = lowering(model)
    assert sorted(computed(changed)) == ["LayerNormalization", "MatMul", "MatMul", "SkipLayerNormalization"]
    check(model, " ".join(computed(changed)))


def test_a_norm_that_is_an_output_keeps_its_name() -> None:
    body = "s = Add (x, r) y = LayerNormalization (s, g, e)"
    changed = check(graph(body, PAIR, AFFINE), "SkipLayerNormalization")
    assert changed.graph.output[0].name == "y"


@pytest.mark.parametrize(
    "model",
    [
        graph(f"s = Add (x, r) {NORM}", {**ROWS, "r": "1,L,64"}, AFFINE),
        graph(f"s = Add (x, r) {NORM}", {**ROWS, "r": "M,L,64"}, AFFINE),
        graph(f"s = Add (x, r) {NORM}", {**ROWS, "r": ""}, AFFINE),
        graph(f"s = Add (x, r) {NORM}", {"x": "B,2,L,64", "r": "B,2,L,64"}, AFFINE),
        graph(f"s = Mul (x, r) {NORM}", PAIR, AFFINE),
        graph(f"s = Add (x, c) {NORM}", PAIR, AFFINE),
        graph(
            f"s = Add (x, r) {NORM}".replace("epsilon", "axis = 1, epsilon"),
            {"x": "B,64,64", "r": "B,64,64"},
            AFFINE,
        ),
        graph(f"s = Add (x, r) {NORM}", PAIR, AFFINE, outputs=("y", "s")),
        graph(f"s = Add (x, r) {NORM}", PAIR, AFFINE, dtype="double"),
        graph(f"s = Add (x, r) {NORM}".replace(", e)", ")"), PAIR, AFFINE),
        graph(f"s = Add (x, r) {NORM}", PAIR, {**AFFINE, "g": (1,)}),
        graph(f"s = Add (x, r) {NORM}".replace("epsilon", "stash_type = 11, epsilon"), PAIR, AFFINE),
        graph(f"s = Add (x, r) {NORM}".replace("n = L", "n, o = L"), PAIR, AFFINE, outputs=("y", "o")),
    ],
    ids=[
        *("row", "other rows", "unknown", "4-D", "product", "bias", "axis", "output", "double"),
        *("no beta", "one gamma", "stash", "mean"),
    ],
)
def test_other_layer_norms_stay(model: onnx.ModelProto) -> None:
    unchanged(model)


IMAGE = {"x": "B,8,H,W"}
CONV = "Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"
GROUPS = "GroupNormalization <num_groups = 4, epsilon = 0.001> (s, g, e)"
OVER_PIXELS = "k = Constant <value = int64[2] {2, 3}> () u = Unsqueeze (t, k)"
CHANNELS = {"w": (8, 8, 3, 3), "v": (8,), "g": (8,), "e": (8,)}


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_a_group_norm_takes_the_residual(dtype: str) -> None:
    terms = f"a = {CONV} (x, w, v) b = {CONV} (a, w, v) s = Add (a, b)"
    body = f"{terms} n = {GROUPS} i = Sigmoid (n) m = Mul (n, i) y = {CONV} (m, w, v)"
    check(
        graph(body, IMAGE, CHANNELS, dtype=dtype),
        "Transpose NhwcConv NhwcConv SkipGroupNorm NhwcConv Transpose",
    )
    seen = f"{body} z = {CONV} (s, w, v)"
    check(
        graph(seen, IMAGE, CHANNELS, dtype=dtype, outputs=("y", "z")),
        "Transpose NhwcConv NhwcConv SkipGroupNorm NhwcConv Transpose NhwcConv Transpose",
    )


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize(
    ("row", "operators"),
    [
        ("B,8", "Transpose NhwcConv Unsqueeze SkipGroupNorm Transpose Neg"),
        ("1,8", "Transpose NhwcConv Unsqueeze Reshape SkipGroupNorm Transpose Neg"),
    ],
)
def test_a_group_norm_takes_the_time_embedding(row: str, operators: str, dtype: str) -> None:
    body = f"a = {CONV} (x, w, v) {OVER_PIXELS} s = Add (a, u) n = {GROUPS} y = Neg (n)"
    changed = lowering(graph(body, {**IMAGE, "t": row}, CHANNELS, dtype=dtype))
    assert sorted(computed(changed)) == sorted(operators.split())
    check(graph(body, {**IMAGE, "t": row}, CHANNELS, dtype=dtype), " ".join(computed(changed)))


def test_time_embeddings_of_as_many_channels_share_the_zeros() -> None:
    first = f"a = {CONV} (x, w, v) {OVER_PIXELS} s = Add (a, u) n = {GROUPS}"
    body = f"{first} b = {CONV} (n, w, v) z = Add (b, u) y = {GROUPS.replace('(s', '(z')}"
    changed = lowering(graph(body, {**IMAGE, "t": "1,8"}, CHANNELS))
    kinds = [node.op_type for node in changed.graph.node]
    assert (kinds.count("SkipGroupNorm"), kinds.count("ConstantOfShape")) == (2, 1)
    check(graph(body, {**IMAGE, "t": "1,8"}, CHANNELS), " ".join(computed(changed)))


@pytest.mark.parametrize(
    ("terms", "inputs"),
    [
        (f"a = {CONV} (x, w, v) s = Add (a, t)", {"t": "B,8,1,W"}),
        (f"a = {CONV} (x, w, v) s = Add (a, t)", {"t": "N,8,1,1"}),
        (f"a = {CONV} (x, w, v) s = Add (a, t)", {"t": "1,8,H,W"}),
    ],
)
def test_a_group_norm_leaves_other_sums(terms: str, inputs: Mapping[str, str]) -> None:
    kinds = computed(lowering(graph(f"{terms} n = {GROUPS} y = Neg (n)", {**IMAGE, **inputs}, CHANNELS)))
    assert "GroupNorm" in kinds
    assert "Add" in kinds


def test_a_bias_and_a_residual_are_one_kernel() -> None:
    body = "p = MatMul (x, wq) b = Add (p, c) s = Add (b, r) y = Neg (s)"
    for dtype in ("float", "float16"):
        check(graph(body, PAIR, AFFINE, dtype=dtype), "MatMul BiasAdd Neg")
    unchanged(graph(body, {**ROWS, "r": "1,L,64"}, AFFINE))
    unchanged(graph(body.replace("Add (p, c)", "Neg (p)"), PAIR, AFFINE))
    unchanged(graph(body, PAIR, AFFINE, outputs=("y", "s")))
    unchanged(graph(body, PAIR, AFFINE, outputs=("y", "b")))
    unchanged(graph(body, {"x": "L,64", "r": "L,64"}, AFFINE))


def test_a_bias_is_found_behind_a_reshape() -> None:
    """As a projection of pixels stands before the residual of an image."""
    project = "p = MatMul (f, wq) b = Add (p, c)"
    size = "h = Shape <start = 1, end = 2> (i) z = Concat <axis = 0> (none, h, rest, columns)"
    behind = f"{size} t = Reshape (b, z) s = Add (t, i) y = Neg (s)"
    given = {"i": "B,H,W,64"}
    model = graph(f"f = Reshape (i, rows) {project} {behind}", given, AFFINE)
    check(model, "Reshape MatMul Reshape BiasAdd Reshape Neg")
    model = graph(f"f = Neg (x) {project} {behind}", {"x": "B,P,64", **given}, AFFINE)
    assert "BiasAdd" not in computed(lowering(model))  # nothing proves that P pixels are H times W


# sha256 of what becomes of `test_the_revision_says_what_is_made`'s graphs, by revision
MADE = {2: "8297f23bb8fb521981d101f1cf07d6e1dfbf4eeba10ebef9a60e47120f4cc44d"}


def test_the_revision_says_what_is_made() -> None:
    """Graphs in engine stores are found by the revision, so another graph has to have another one."""
    bodies = [
        graph(f"{SELF} a = Attention (qh, kh, vh) {MERGED}", ROWS, PROJECTIONS),
        graph(f"{heads('q')} a = Attention (qh, k, v) {MERGED}", CONTEXT, PROJECTIONS),
        graph(f"{SELF} {UPCAST} {MERGED}", ROWS, PROJECTIONS, dtype="float16"),
        graph(geglu(2560), ROWS, gates(2560)),
        graph(f"p = MatMul (x, wq) b = Add (p, c) s = Add (b, r) {NORM}", PAIR, AFFINE),
        graph("p = MatMul (x, wq) b = Add (p, c) s = Add (b, r) y = Neg (s)", PAIR, AFFINE),
        *(
            graph(
                f"a = {CONV} (x, w, v) {OVER_PIXELS} s = Add (a, u) y = {GROUPS}",
                {**IMAGE, "t": row},
                CHANNELS,
            )
            for row in ("B,8", "1,8")
        ),
    ]
    made = hashlib.sha256()
    for body in bodies:
        for node in lowering(body).graph.node:
            made.update(node.SerializeToString(deterministic=True))
    assert made.hexdigest() == MADE.get(REVISION), (
        f"lowering makes other graphs than revision {REVISION} did: raise REVISION of lowering/lower.py,"
        f" and record it: MADE = {{{REVISION + 1}: {made.hexdigest()!r}}}"
    )


def shapes(
    body: str, inputs: Mapping[str, str], weights: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Dims]:
    found = shapes_of(ir.from_proto(graph(body, inputs, weights)).graph)
    return {value.name or "": dims for value, dims in found.items()}


def test_shapes_are_what_operators_prove() -> None:
    found = shapes(
        "a = Transpose <perm = [0, 2, 1]> (x) b = Concat <axis = 1> (a, a) y = MatMul (a, x)", ROWS
    )
    assert (found["a"], found["b"]) == (("B", 64, "L"), ("B", 128, "L"))
    assert found["y"] == ("B", 64, 64)
    found = shapes(
        "f = Reshape (x, rows) k = Constant <value = int64[4] {0, 5, -1, 64}> () y = Reshape (f, k)",
        {"x": "B,H,W,64"},
    )
    assert found["f"] == ("B", Flat("H", "W"), 64)
    assert found["y"] == ("B", "H", "W", 64)
    assert "a" not in shapes("a = Neg (x) y = Add (a, x)", ROWS)


def test_what_operators_do_not_prove_is_a_size_of_its_own() -> None:
    found = shapes("a = Add (x, r) y = MatMul (a, r)", {"x": "B,L,64", "r": "M,L,64"})
    assert [isinstance(size, Size) for size in found["a"]] == [True, False, False]
    assert "y" not in found
    found = shapes("a, b = Split <axis = 2> (x, rows) y = Neg (a)", ROWS)
    assert "a" not in found
    for options, kept in (
        ("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", True),
        ("kernel_shape = [3, 3], pads = [0, 0, 0, 0]", False),
        ("kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]", False),
    ):
        found = shapes(f"a = Conv <{options}> (x, w) y = Neg (a)", IMAGE, {"w": (8, 8, 3, 3)})
        assert (found["a"] == ("B", 8, "H", "W")) is kept
    found = shapes("a, b = LayerNormalization (x, g, e) y = Add (a, b)", ROWS, {"g": (64,), "e": (64,)})
    assert (found["a"], "b" in found) == (("B", "L", 64), False)  # b, the mean, has one column


def test_an_operator_of_another_domain_proves_nothing() -> None:
    model = ir.from_proto(graph("a = Neg (x) y = Neg (a)", ROWS))
    for domain in ("com.microsoft", ""):
        node = model.graph.node(0)
        node.domain, node.op_type = domain, "Sigmoid"
        assert (node.outputs[0] in shapes_of(model.graph)) is (domain == "")
