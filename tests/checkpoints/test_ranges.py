"""Ranges are measured where values are stored in fp16, and what reaches too far becomes an island."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from latentrt.checkpoints.graphs.hoist import hoist
from latentrt.checkpoints.graphs.weights import is_weight
from latentrt.checkpoints.precision import islands
from latentrt.checkpoints.precision.islands import LIMIT, find_islands, measure
from latentrt.engines.errors import NumericError
from latentrt.export.graphs import passes as surgery

from .test_islands import ATTENTION, HALF, OPERANDS, model_of, operands, run

FULL = ir.DataType.FLOAT


class Drive:
    """Calls a net on given inputs, once each."""

    def __init__(self, *calls: Mapping[str, Any]) -> None:
        self.calls = [{name: np.asarray(array, np.float32) for name, array in call.items()} for call in calls]
        self.outputs: list[np.ndarray] = []

    def __call__(self, call: Any) -> None:
        self.outputs = [call(arrays)[0] for arrays in self.calls]


SQUARES = "a = Mul(x, x) b = Neg(a) c = Sqrt(a) t = Reshape(b, s) d = Transpose(t) y = Add(c, x)"


def squares() -> ir.Model:
    model = model_of("s = Constant <value_ints = [1, -1]> ()" + SQUARES, "float16[2] x", "float16[2] y")
    model.graph[0].outputs[0].dtype = ir.DataType.INT64
    for name in ("t", "d"):
        next(v for node in model.graph for v in node.outputs if v.name == name).dtype = HALF
    return model


def test_the_largest_magnitude_over_all_calls() -> None:
    drive = Drive({"x": [-300, 2]}, {"x": [3, 400]}, {"x": [1, 1]})
    found = measure(squares(), "unet", drive)
    assert found == {"a": 160000, "b": 160000, "c": 400, "t": 160000, "d": 160000, "y": 800}
    assert np.array_equal(drive.outputs[0], [0, 4])  # in float32: fp16 has no 90000


def test_measuring_leaves_the_graph_as_it_was() -> None:
    model = squares()
    measure(model, "unet", Drive({"x": [1, 2]}))
    assert {value.dtype for node in model.graph for value in node.outputs} == {HALF, ir.DataType.INT64}
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_scores_count_although_they_are_inside() -> None:
    model = model_of(ATTENTION, OPERANDS, "float16[2,3,5,16] y")
    arrays = operands(100.0)
    q, k = (arrays[name].astype(np.float32) for name in ("q", "k"))
    found = measure(model, "unet", Drive(arrays))
    assert found.keys() == {"n/y/scores.out", "y"}
    assert found["n/y/scores.out"] == pytest.approx(0.25 * np.abs(q @ k.swapaxes(2, 3)).max(), rel=1e-5)


STORED = {"u": HALF, "v": FULL, "w": ir.DataType.BFLOAT16, "z": ir.DataType.DOUBLE}


def weighted(folders: Mapping[str, Path]) -> ir.Model:
    """x times 10 four times over: weights of four types, a file each, cast to fp16 where they are not."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["":23]> g (float16[1] x) => (float16[1] y)'
        " <float16[1] u = {0}, float[1] v = {0}, bfloat16[1] w = {0}, double[1] z = {0}> {"
        " v16 = Cast <to = 10> (v) w16 = Cast <to = 10> (w) z16 = Cast <to = 10> (z)"
        " a = Mul(x, u) b = Mul(a, v16) c = Mul(b, w16) y = Mul(c, z16) }"
    )
    surgery.infer_types(model)
    for node in model.graph:
        node.name = f"n/{node.outputs[0].name}"
    for name, folder in folders.items():
        kind, file = STORED[name], folder / f"{name}.safetensors"
        (folder / file.name).write_bytes(bytes(8) + np.array([10], kind.numpy()).tobytes())
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            file.name, 8, int(kind.itemsize), kind, name=name, shape=ir.Shape([1]), base_dir=folder
        )
    return model


def test_weights_are_read_where_they_lie_and_nothing_is_written(tmp_path: Path) -> None:
    """Several files, in several folders, which nobody may write to."""
    other = tmp_path / "other"
    other.mkdir()
    model = weighted({"u": tmp_path, "v": tmp_path, "w": other, "z": other})
    before = sorted(tmp_path.rglob("*"))
    for folder in (other, tmp_path):
        folder.chmod(0o555)
    try:
        found = measure(model, "unet", Drive({"x": [3]}))
    finally:
        for folder in (tmp_path, other):
            folder.chmod(0o755)
    assert found == {"a": 30, "b": 300, "c": 3000, "y": 30000}
    assert sorted(tmp_path.rglob("*")) == before
    assert all(is_weight(value) for value in model.graph.initializers.values())
    assert [node.op_type for node in model.graph].count("Cast") == 3


def test_weights_behind_links_are_read(tmp_path: Path) -> None:
    """As in Hugging Face's cache, where a snapshot has links to files that are called by their hashes."""
    snapshot, blobs = tmp_path / "snapshots" / "main" / "unet", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    model = weighted(dict.fromkeys(STORED, snapshot))
    for name in STORED:
        file = snapshot / f"{name}.safetensors"
        file.rename(blobs / f"hash-{name}")
        file.symlink_to(os.path.relpath(blobs / f"hash-{name}", snapshot))
    assert measure(model, "unet", Drive({"x": [3]}))["y"] == 30000


def test_hot_values_of_stored_types_become_islands(tmp_path: Path) -> None:
    model = weighted(dict.fromkeys(STORED, tmp_path))
    found = find_islands(model, "unet", Drive({"x": [6]}))
    assert [island.node for island in found.islands] == ["n/y"]
    assert run(model, tmp_path, x=np.array([6], np.float16)) == [60000]


def test_a_net_that_computes_in_float32_has_no_islands() -> None:
    model = model_of("a = Cast <to = 1> (x) y = Mul(a, a)", "float16[1] x", "float[1] y")
    found = find_islands(model, "image_noiser", Drive({"x": [3]}))
    assert (found.islands, found.largest, found.where) == ((), 0.0, "")


@pytest.mark.parametrize(("factor", "count"), [(0.99, 0), (1.01, 3)])
def test_an_island_begins_at_the_limit(factor: float, count: int) -> None:
    """The node that writes the hot value, and those that read it."""
    model = model_of("a = Mul(x, k) b = Sqrt(a) y = Div(b, a)", "float16[1] x, float16[1] k", "float16[1] y")
    found = find_islands(model, "unet", Drive({"x": [LIMIT / 64 * factor], "k": [64]}))
    assert len(found.islands) == count
    assert found.largest == pytest.approx(LIMIT * factor)
    assert found.where == "n/a"
    assert islands.island_names(model) == tuple(island.node for island in found.islands)
    assert all(island.largest == found.largest for island in found.islands)


def test_hot_scores_write_attention_out() -> None:
    model = model_of(ATTENTION, OPERANDS, "float16[2,3,5,16] y")
    found = find_islands(model, "unet", Drive(operands(300.0)))
    nodes = [island.node for island in found.islands]
    assert nodes == ["n/y/turned", "n/y/scaled", "n/y/scores", "n/y/shares"]
    assert found.where == "n/y/scores"
    assert "Attention" not in {node.op_type for node in model.graph}


def test_hot_values_of_attention_leave_the_scores_alone() -> None:
    body = "v = Mul(w, g) " + ATTENTION
    inputs = OPERANDS.replace("] v", "] w") + ", float16[1] g"
    arrays = operands()
    arrays = {"q": arrays["q"], "k": arrays["k"], "w": arrays["v"], "g": np.array([1.2e4])}
    model = model_of(body + " z = Mul(y, g2)", inputs + ", float16[1] g2", "float16[2,3,5,16] z")
    next(v for node in model.graph for v in node.outputs if v.name == "z").dtype = HALF
    found = find_islands(model, "unet", Drive({**arrays, "g2": np.array([1e-4])}))
    assert [island.node for island in found.islands] == ["n/v", "n/y/values", "n/z"]


def test_causal_attention_can_be_an_island(tmp_path: Path) -> None:
    body = "y = Attention <scale = 0.25, is_causal = 1> (q, k, v)"
    model = model_of(body, OPERANDS.replace("7,16", "5,16"), "float16[2,3,5,16] y")
    arrays = {name: array[:, :, :5] for name, array in operands(30.0).items()}
    find_islands(model, "text_encoder", Drive({**arrays, "q": arrays["q"] * 12}))
    assert "n/y/masked" in islands.island_names(model)
    q, k, v = (torch.from_numpy(array).double() for array in arrays.values())
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    assert np.allclose(run(model, tmp_path, **arrays), wanted.numpy(), atol=2e-3)


def test_islands_that_touch_have_no_cast_between(tmp_path: Path) -> None:
    """An older island reads a hot value, and another writes one: rounding either would overflow."""
    body = (
        "a = Mul(x, k) f = Cast <to = 1> (a) r = Sqrt(f) m = Mul(f, r) h = Cast <to = 10> (m) b = Neg(h)"
        " i = Mul(b, small) y = Mul(i, small)"
    )
    model = model_of(body, "float16[1] x, float16[1] k, float16[1] small", "float16[1] y")
    arrays = {"x": [200], "k": [400], "small": [2**-13]}
    found = find_islands(model, "unet", Drive(arrays))
    assert [island.node for island in found.islands] == ["n/a", "n/b", "n/i"]
    assert islands.island_names(model) == ("n/a", "n/r", "n/m", "n/b", "n/i")
    wide = {value.name for node in model.graph for value in node.outputs if value.dtype == FULL}
    assert {"a", "m", "b"} <= wide
    assert [node.op_type for node in model.graph].count("Cast") == 4  # x, k, small on their way in; i out
    halves = {name: np.array(array, np.float16) for name, array in arrays.items()}
    assert run(model, tmp_path, **halves) == pytest.approx(-(8e4**1.5) * 2**-26, rel=1e-3)


@pytest.mark.parametrize("x", [np.inf, np.nan])
def test_a_net_that_is_not_finite(x: float) -> None:
    model = model_of("a = Mul(x, x) y = Add(a, x)", "float16[3] x", "float16[3] y")
    with pytest.raises(NumericError, match=r"unet: \w is not finite in float32"):
        find_islands(model, "unet", Drive({"x": [1, 2, x]}))


def test_an_output_that_fp16_cannot_hold() -> None:
    model = model_of("y = Mul(x, x)", "float16[1] x", "float16[1] y")
    with pytest.raises(NumericError, match=r"its output y reaches 9e\+04.*--dtype fp32"):
        find_islands(model, "unet", Drive({"x": [300]}))


def test_the_time_embedding_of_an_island_stays_a_table() -> None:
    """A cast for a hot sum does not become an invariant of its own."""
    body = "t = Cast <to = 10> (timestep) e = Neg(t) u = Unsqueeze(e, axes) c = Neg(encoder_hidden_states)"
    body += " s = Add(sample, u) out = Mul(s, c)"
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["":23]> g (float16[B,4] sample, float[B] timestep,'
        f" float16[B,4,4] encoder_hidden_states) => (float16[B,4] out) <int64[1] axes = {{1}}> {{ {body} }}"
    )
    surgery.infer_types(model)
    for node in model.graph:
        node.name, node.outputs[0].shape = f"n/{node.outputs[0].name}", ir.Shape(["B"])
    islands.run_in_fp32(model, ["n/s"])
    assert [(item.dtype, item.shape) for item in hoist(model)["unet_time"][1].outputs] == [
        ("float16", ("S",))
    ]
