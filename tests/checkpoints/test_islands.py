from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from latentrt.checkpoints.graphs.attention import write_out_attention
from latentrt.checkpoints.precision import islands
from latentrt.export.graphs import passes as surgery

HALF = ir.DataType.FLOAT16


def model_of(body: str, inputs: str, outputs: str) -> ir.Model:
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["":23]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    surgery.infer_types(model)
    for node in model.graph:
        node.name = f"n/{node.outputs[0].name}"
    return model


def run(model: ir.Model, folder: Path, **arrays: np.ndarray) -> np.ndarray:
    path = folder / "island.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, arrays)[0])


SQUARES = "a = Mul(x, x) b = Mul(a, a) c = Sqrt(b) d = Sqrt(c) y = Add(d, x)"


def test_an_island_survives_what_fp16_does_not(tmp_path: Path) -> None:
    x = np.array([100.0, 2.0], np.float16)
    model = model_of(SQUARES, "float16[2] x", "float16[2] y")
    islands.run_in_fp32(model, ["n/b", "n/c"])
    assert islands.island_names(model) == ("n/b", "n/c")
    # One cast in and one out, none between.
    assert [node.op_type for node in model.graph].count("Cast") == 2
    assert np.allclose(run(model, tmp_path, x=x), [200.0, 4.0], rtol=2e-3)


def test_an_island_at_the_output_keeps_the_boundary(tmp_path: Path) -> None:
    model = model_of("a = Mul(x, x) y = Add(a, x)", "float16[2] x", "float16[2] y")
    islands.run_in_fp32(model, ["n/a", "n/y"])
    assert model.graph.outputs[0].name == "y"
    assert model.graph.outputs[0].dtype == HALF
    assert np.array_equal(run(model, tmp_path, x=np.array([2, 3], np.float16)), [6, 12])


def test_a_value_used_inside_and_outside(tmp_path: Path) -> None:
    model = model_of("a = Mul(x, x) b = Sqrt(a) y = Add(a, b)", "float16[2] x", "float16[2] y")
    islands.run_in_fp32(model, ["n/a", "n/b"])
    assert np.array_equal(run(model, tmp_path, x=np.array([2, 3], np.float16)), [6, 12])


ATTENTION = "y = Attention <scale = 0.25> (q, k, v)"
OPERANDS = "float16[2,3,5,16] q, float16[2,3,7,16] k, float16[2,3,7,16] v"


def operands(scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"q": (2, 3, 5, 16), "k": (2, 3, 7, 16), "v": (2, 3, 7, 16)}
    return {
        name: (random.standard_normal(shape) * (scale if name != "v" else 1)).astype(np.float16)
        for name, shape in shapes.items()
    }


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = 0.25 * q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True) @ v.astype(np.float64)


def test_written_out_attention_is_attention(tmp_path: Path) -> None:
    model = model_of(ATTENTION, OPERANDS, "float16[2,3,5,16] y")
    names = write_out_attention(model.graph, model.graph[0])
    assert "Attention" not in {node.op_type for node in model.graph}
    assert {node.name for node in model.graph} >= set(names)
    assert model.graph.outputs[0].name == "y"
    assert np.allclose(run(model, tmp_path, **operands()), by_hand(**operands()), atol=2e-3)


def test_upcast_attention_holds_scores_beyond_fp16(tmp_path: Path) -> None:
    model = model_of(ATTENTION, OPERANDS, "float16[2,3,5,16] y")
    islands.upcast_attention(model)
    assert islands.island_names(model) == ("n/y/scaled", "n/y/scores", "n/y/shares")
    found = run(model, tmp_path, **operands(300.0))
    assert np.isfinite(found).all()
    assert np.allclose(found, by_hand(**operands(300.0)), atol=2e-3)


def test_a_native_attention_in_an_island_is_written_out(tmp_path: Path) -> None:
    model = model_of(ATTENTION, OPERANDS, "float16[2,3,5,16] y")
    islands.run_in_fp32(model, ["n/y"])
    assert islands.island_names(model) == ("n/y/scaled", "n/y/scores", "n/y/shares", "n/y/values")
    assert np.allclose(run(model, tmp_path, **operands()), by_hand(**operands()), atol=1e-3)
