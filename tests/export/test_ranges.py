"""Ranges are measured where values are stored in fp16, and what reaches too far becomes an island."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.graphs.hoist import hoist
from latentrt.checkpoints.precision import islands
from latentrt.checkpoints.precision.calibration import PROMPTS, STEPS, Calibration, token_ids
from latentrt.checkpoints.precision.islands import LIMIT, find_islands, measure
from latentrt.engines.errors import CheckpointError, NumericError
from latentrt.export.graphs import passes as surgery
from latentrt.checkpoints.precision.calibration import CALIBRATIONS, components
from latentrt.export.nets.build import NETS
from tests.recipes import RECIPES, make_checkpoint

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


def test_the_largest_magnitude_over_all_calls(tmp_path: Path) -> None:
    drive = Drive({"x": [-300, 2]}, {"x": [3, 400]}, {"x": [1, 1]})
    found = measure(squares(), "unet", tmp_path, drive)
    assert found == {"a": 160000, "b": 160000, "c": 400, "t": 160000, "d": 160000, "y": 800}
    assert np.array_equal(drive.outputs[0], [0, 4])  # in float32: fp16 has no 90000
    assert list(tmp_path.iterdir()) == []


def test_measuring_leaves_the_graph_as_it_was(tmp_path: Path) -> None:
    model = squares()
    measure(model, "unet", tmp_path, Drive({"x": [1, 2]}))
    assert {value.dtype for node in model.graph for value in node.outputs} == {HALF, ir.DataType.INT64}
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_scores_count_although_they_are_inside(tmp_path: Path) -> None:
    model = model_of(ATTENTION, OPERANDS, "float16[2,3,5,16] y")
    arrays = operands(100.0)
    q, k = (arrays[name].astype(np.float32) for name in ("q", "k"))
    found = measure(model, "unet", tmp_path, Drive(arrays))
    assert found.keys() == {"n/y/scores.out", "y"}
    assert found["n/y/scores.out"] == pytest.approx(0.25 * np.abs(q @ k.swapaxes(2, 3)).max(), rel=1e-5)


def test_a_net_that_computes_in_float32_has_no_islands(tmp_path: Path) -> None:
    model = model_of("a = Cast <to = 1> (x) y = Mul(a, a)", "float16[1] x", "float[1] y")
    found = find_islands(model, "image_noiser", tmp_path, Drive({"x": [3]}))
    assert (found.islands, found.largest, found.where) == ((), 0.0, "")


@pytest.mark.parametrize(("factor", "count"), [(0.99, 0), (1.01, 3)])
def test_an_island_begins_at_the_limit(tmp_path: Path, factor: float, count: int) -> None:
    """The node that writes the hot value, and those that read it."""
    model = model_of("a = Mul(x, k) b = Sqrt(a) y = Div(b, a)", "float16[1] x, float16[1] k", "float16[1] y")
    found = find_islands(model, "unet", tmp_path, Drive({"x": [LIMIT / 64 * factor], "k": [64]}))
    assert len(found.islands) == count
    assert found.largest == pytest.approx(LIMIT * factor)
    assert found.where == "n/a"
    assert islands.island_names(model) == tuple(island.node for island in found.islands)
    assert all(island.largest == found.largest for island in found.islands)


def test_hot_scores_write_attention_out(tmp_path: Path) -> None:
    model = model_of(ATTENTION, OPERANDS, "float16[2,3,5,16] y")
    found = find_islands(model, "unet", tmp_path, Drive(operands(300.0)))
    nodes = [island.node for island in found.islands]
    assert nodes == ["n/y/turned", "n/y/scaled", "n/y/scores", "n/y/shares"]
    assert found.where == "n/y/scores"
    assert "Attention" not in {node.op_type for node in model.graph}


def test_hot_values_of_attention_leave_the_scores_alone(tmp_path: Path) -> None:
    body = "v = Mul(w, g) " + ATTENTION
    inputs = OPERANDS.replace("] v", "] w") + ", float16[1] g"
    arrays = operands()
    arrays = {"q": arrays["q"], "k": arrays["k"], "w": arrays["v"], "g": np.array([1.2e4])}
    model = model_of(body + " z = Mul(y, g2)", inputs + ", float16[1] g2", "float16[2,3,5,16] z")
    next(v for node in model.graph for v in node.outputs if v.name == "z").dtype = HALF
    found = find_islands(model, "unet", tmp_path, Drive({**arrays, "g2": np.array([1e-4])}))
    assert [island.node for island in found.islands] == ["n/v", "n/y/values", "n/z"]


def test_causal_attention_can_be_an_island(tmp_path: Path) -> None:
    body = "y = Attention <scale = 0.25, is_causal = 1> (q, k, v)"
    model = model_of(body, OPERANDS.replace("7,16", "5,16"), "float16[2,3,5,16] y")
    arrays = {name: array[:, :, :5] for name, array in operands(30.0).items()}
    find_islands(model, "text_encoder", tmp_path, Drive({**arrays, "q": arrays["q"] * 12}))
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
    found = find_islands(model, "unet", tmp_path, Drive(arrays))
    assert [island.node for island in found.islands] == ["n/a", "n/b", "n/i"]
    assert islands.island_names(model) == ("n/a", "n/r", "n/m", "n/b", "n/i")
    wide = {value.name for node in model.graph for value in node.outputs if value.dtype == FULL}
    assert {"a", "m", "b"} <= wide
    assert [node.op_type for node in model.graph].count("Cast") == 4  # x, k, small on their way in; i out
    halves = {name: np.array(array, np.float16) for name, array in arrays.items()}
    assert run(model, tmp_path, **halves) == pytest.approx(-(8e4**1.5) * 2**-26, rel=1e-3)


@pytest.mark.parametrize("x", [np.inf, np.nan])
def test_a_net_that_is_not_finite(tmp_path: Path, x: float) -> None:
    model = model_of("a = Mul(x, x) y = Add(a, x)", "float16[3] x", "float16[3] y")
    with pytest.raises(NumericError, match=r"unet: \w is not finite in float32"):
        find_islands(model, "unet", tmp_path, Drive({"x": [1, 2, x]}))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_fp16_cannot_hold(tmp_path: Path) -> None:
    model = model_of("y = Mul(x, x)", "float16[1] x", "float16[1] y")
    with pytest.raises(NumericError, match=r"its output y reaches 9e\+04.*--dtype fp32"):
        find_islands(model, "unet", tmp_path, Drive({"x": [300]}))


def test_a_weight_that_fp16_cannot_hold(tmp_path: Path) -> None:
    source = make_checkpoint(RECIPES["tiny1"], tmp_path / "tiny1", dtype=torch.float32)
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.bias"][3] = -7e4
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(source)
    with pytest.raises(CheckpointError, match=r"'decoder.conv_in.bias' has values up to 7e\+04"):
        NETS["vae_decoder"].build(checkpoint, torch.float16)
    NETS["vae_decoder"].build(checkpoint, torch.float32)


@pytest.mark.parametrize(("dtype", "fix"), [(torch.float16, "--dtype fp32"), (torch.float32, "damaged")])
def test_a_weight_that_float32_cannot_hold(tmp_path: Path, dtype: torch.dtype, fix: str) -> None:
    source = make_checkpoint(RECIPES["tiny1"], tmp_path / "tiny1", dtype=torch.float32)
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"].double()
    tensors["decoder.conv_in.bias"][3] = -1e39
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'decoder.conv_in.bias' has values up to 1e\+39") as error:
        NETS["vae_decoder"].build(Checkpoint.open(source), dtype)
    assert fix in error.value.fix


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


class Recorded:
    """Stands in for a net: remembers its inputs and returns what it is told."""

    def __init__(self, output: Any) -> None:
        self.output, self.calls = output, []

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self.calls.append(dict(arrays))
        return [self.output(arrays)]


def test_calibration_draws_a_picture(checkpoint: Path) -> None:
    calibration = Calibration(Checkpoint.open(checkpoint))
    contexts = np.arange(4, dtype=np.float32)[:, None, None] * np.ones((4, 77, 80), np.float32)
    text, unet = Recorded(lambda _: contexts), Recorded(lambda arrays: arrays["sample"] * 0.5)
    vae = Recorded(lambda _: None)
    for component, net in {"text_encoder": text, "unet": unet, "vae_decoder": vae}.items():
        CALIBRATIONS[component](calibration, net)
    (ids,) = (call["input_ids"] for call in text.calls)
    assert (ids.shape, ids.dtype) == ((4, 77), np.int32)
    assert (ids[:, 0] == 698).all()
    assert [call["timestep"].tolist() for call in unet.calls] == [[t, t] for t in (999, 666, 333, 0)]
    assert len(unet.calls) == STEPS
    assert [call["encoder_hidden_states"][:, 0, 0].tolist() for call in unet.calls] == [
        [0, 1],
        [0, 2],
        [0, 3],
        [0, 1],
    ]
    for call in unet.calls:
        assert call["sample"].shape == (2, 4, 8, 8)
        assert 0.1 < call["sample"].std() <= 1.001
        assert np.array_equal(*call["sample"])
    assert [call["latent"].shape for call in vae.calls] == [(1, 4, 8, 8)] * 2


def test_calibration_without_the_net_before(checkpoint: Path) -> None:
    unet, vae = Recorded(lambda arrays: arrays["sample"]), Recorded(lambda _: None)
    Calibration(Checkpoint.open(checkpoint)).denoise(unet)
    assert unet.calls[0]["encoder_hidden_states"].shape == (2, 77, 80)
    Calibration(Checkpoint.open(checkpoint)).decode(vae)
    assert 0.9 < vae.calls[0]["latent"].std() < 1.1


def test_the_prompts_of_calibration(checkpoint: Path) -> None:
    source = Checkpoint.open(checkpoint)
    ids = token_ids(source, "text_encoder")
    assert ids.shape == (len(PROMPTS), 77)
    words = json.loads((checkpoint / "tokenizer" / "vocab.json").read_text())
    first, last = words["<|startoftext|>"], words["<|endoftext|>"]
    assert ids[0].tolist() == [first, *[last] * 76]
    assert list(ids[:, 0]) == [first] * 3
    assert last not in ids[2, :-1]  # the long one fills it


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_named_at_export(
    checkpoint: Path, tmp_path: Path, part: str, bad: float, dtype: torch.dtype
) -> None:
    """A broken merge: one value. The advice is not another dtype."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (weights,) = (copy / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = next(
        name for name in tensors if name.endswith("norm1.weight" if part != "vae" else "conv_in.bias")
    )
    tensors[name].view(-1)[3] = bad
    save_file(tensors, weights)
    opened = Checkpoint.open(copy)
    nets = components(opened)
    with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' has 1 values of") as error:
        _ = [NETS[net].build(opened, dtype) for net in nets]
    assert str(copy / part) in error.value.found
    assert "--dtype fp32" not in error.value.fix
