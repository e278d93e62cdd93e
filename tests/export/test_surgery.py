import numpy as np
import onnx_ir as ir
import pytest

from latentrt.export.graphs import passes as surgery


def graph(
    body: str, inputs: str = "float[B,T,6] x", outputs: str = "float y", initializers: str = ""
) -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["":23]> g ({inputs}) => ({outputs}) {initializers} {{ {body} }}'
    )


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def shaped(model: ir.Model, name: str, *shape: int | str) -> ir.Value:
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
    return value


HEADS = """
    b = Shape <start = 0, end = 1> (x)
    t = Shape <start = 1, end = 2> (x)
    h = Constant <value = int64[1] {2}> ()
    w = Constant <value = int64[1] {3}> ()
    shape = Concat <axis = 0> (b, t, h, w)
    y = Reshape <allowzero = 1> (x, shape)
"""


def test_reshapes_become_constant() -> None:
    model = graph(HEADS, outputs="float[B,T,2,3] y")
    surgery.constant_reshapes(model)
    surgery.fold(model)
    assert operators(model) == ["Constant", "Reshape"]
    shape = model.graph[-1].inputs[1]
    assert shape is not None
    assert shape.const_value is not None
    assert shape.const_value.numpy().tolist() == [0, 0, 2, 3]
    assert model.graph[-1].attributes.get_int("allowzero") == 0


def test_reshapes_with_two_unknowns_keep_what_must_be_computed() -> None:
    body = HEADS.replace("(b, t, h, w)", "(b, t, n, w)").replace(
        "h = C", "n = Shape <start = 1, end = 2> (z) h = C"
    )
    model = graph(body, inputs="float[B,T,6] x, float[P,Q] z", outputs="float[B,Q,R,3] y")
    surgery.constant_reshapes(model)
    surgery.fold(model)
    concat = next(node for node in model.graph if node.op_type == "Concat")
    first = concat.inputs[0]
    assert first is not None
    assert first.const_value is not None
    assert first.const_value.numpy().tolist() == [0]
    assert operators(model).count("Shape") == 1


@pytest.mark.parametrize(
    "body",
    [
        "n = Shape(x) e = Expand(x, n) y = Relu(e)",
        "e = Cast <to = 1> (x) y = Relu(e)",
        "one = Constant <value = float[1] {1}> () e = Div(x, one) y = Relu(e)",
        "e = Identity(x) y = Relu(e)",
    ],
)
def test_operators_that_do_nothing_go(body: str) -> None:
    model = graph(body, outputs="float[B,T,6] y")
    shaped(model, "e", "B", "T", 6)
    surgery.infer_types(model)
    surgery.fold(model)
    surgery.drop_identities(model)
    assert operators(model) == ["Relu"]


def test_operators_that_do_something_stay() -> None:
    two = "two = Constant <value = float[1] {2}> ()"
    body = two + " e = Div(x, two) f = Cast <to = 10> (e) y = Cast <to = 1> (f)"
    model = graph(body, outputs="float[B,T,6] y")
    surgery.infer_types(model)
    surgery.drop_identities(model)
    assert operators(model) == ["Constant", "Div", "Cast", "Cast"]


def attention(mask: str) -> ir.Model:
    return graph(
        f"""
        rows = Constant <value = int64[1,1,3,1] {{0,1,2}}> ()
        columns = Constant <value = int64[1,1,1,3] {{{mask}}}> ()
        le = LessOrEqual(columns, rows)
        n = Constant <value = int64[4] {{2,1,3,3}}> ()
        full = Expand(le, n)
        y = Attention(x, x, x, full)
        """,
        inputs="float[2,2,3,4] x",
        outputs="float[2,2,3,4] y",
    )


def test_causal_masks_become_an_attribute() -> None:
    model = attention("0,1,2")
    surgery.causal_masks(model)
    assert operators(model) == ["Attention"]
    assert model.graph[0].attributes.get_int("is_causal") == 1


def test_other_masks_stay() -> None:
    model = attention("0,0,2")
    surgery.causal_masks(model)
    assert operators(model)[-1] == "Attention"
    assert model.graph[-1].inputs[3] is not None


def test_a_chain_of_unsqueezes_is_one() -> None:
    body = """
        one = Constant <value = int64[1] {1}> () last = Constant <value = int64[1] {-1}> ()
        a = Unsqueeze(x, one) y = Unsqueeze(a, last)
    """
    model = graph(body, inputs="float[B,6] x", outputs="float[B,1,6,1] y")
    shaped(model, "a", "B", 1, 6)
    surgery.merge_unsqueezes(model)
    assert [name for name in operators(model) if name != "Constant"] == ["Unsqueeze"]
    axes = model.graph[-1].inputs[1]
    assert axes is not None
    assert axes.const_value is not None
    assert axes.const_value.numpy().tolist() == [1, 3]


def test_nodes_are_named_after_modules() -> None:
    model = graph("a = Relu(x) b = Relu(a) y = Neg(b)", outputs="float[B,T,6] y")
    scopes = "['', 'net', \"net.__dict__['_modules']['down_blocks'].0\", \"{}\", 'relu']"
    for node in list(model.graph)[:2]:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes.format(
            "net.__dict__['_modules']['down_blocks'].0.act"
        )
    surgery.tidy(model)
    surgery.name_nodes(model)
    assert [node.name for node in model.graph] == [
        "down_blocks.0.act/Relu",
        "down_blocks.0.act/Relu.2",
        "Neg",
    ]
    assert not model.graph[0].metadata_props


def test_types_are_filled_in() -> None:
    body = """
        s = Shape(x) h = Cast <to = 10> (x) m = MatMul(h, h) l = CastLike(s, m)
        c = Constant <value = int64[1] {1}> () le = LessOrEqual(x, x) y = Cast <to = 1> (m)
    """
    model = graph(body, inputs="float[6,6] x", outputs="float[6,6] y")
    surgery.infer_types(model)
    types = {v.name: v.dtype for node in model.graph for v in node.outputs}
    assert types["s"] == types["c"] == ir.DataType.INT64
    assert types["h"] == types["m"] == types["l"] == ir.DataType.FLOAT16
    assert types["le"] == ir.DataType.BOOL


def test_folding_leaves_weights_alone(tmp_path: object) -> None:
    model = graph(
        "t = Transpose <perm = [1,0]> (w) y = MatMul(x, t)",
        initializers=f"<float[6,6] w = {{{','.join(['1'] * 36)}}}>",
    )
    weight = model.graph.initializers["w"]
    weight.const_value = ir.ExternalTensor(
        "weights.safetensors",
        0,
        144,
        ir.DataType.FLOAT,
        name="w",
        shape=ir.Shape([6, 6]),
        base_dir="/nowhere",
    )
    surgery.fold(model)
    surgery.lift(model)
    assert operators(model) == ["Transpose", "MatMul"]


def test_equal_constants_are_one() -> None:
    body = """
        a = Constant <value = float[1] {3}> () b = Constant <value = float[1] {3}> ()
        c = Mul(x, a) y = Add(c, b)
    """
    model = graph(body, outputs="float[B,T,6] y")
    surgery.lift(model)
    assert len(model.graph.initializers) == 1
    (value,) = model.graph.initializers.values()
    assert value.const_value is not None
    assert np.array_equal(value.const_value.numpy(), [3.0])
