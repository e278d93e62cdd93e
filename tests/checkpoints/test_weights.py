from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.checkpoints.files.component import read_headers, read_tensors
from latentrt.checkpoints.graphs.weights import (
    STORED,
    WEIGHTS,
    attach,
    is_weight,
    stored_type,
    write_weights,
)
from latentrt.checkpoints.stored_types import convert
from latentrt.engines.backends import BACKENDS

HALF, FULL, BRAIN = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16


@pytest.mark.parametrize(
    ("source", "compute", "wanted"),
    [
        ("F32", HALF, HALF),
        ("F16", FULL, HALF),
        ("BF16", FULL, BRAIN),
        ("F64", FULL, FULL),
        ("F32", FULL, FULL),
        ("F8_E4M3", HALF, ir.DataType.FLOAT8E4M3FN),
        ("F8_E5M2", FULL, ir.DataType.FLOAT8E5M2),
    ],
)
def test_never_wider_than_the_checkpoint(source: str, compute: ir.DataType, wanted: ir.DataType) -> None:
    assert stored_type(source, compute) == wanted


def test_the_file_is_safetensors_and_slots_point_into_it(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "full": torch.randn(4),
        "brain": torch.randn(2, 2).bfloat16(),
        "turned": torch.randn(3, 4).T,
        "scalar": torch.tensor(2.5),
        "double": torch.randn(3, dtype=torch.float64),
        "small": torch.randn(3).to(torch.float8_e4m3fn),
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "source.safetensors"
    )
    arrays = read_tensors(read_headers(tmp_path / "source.safetensors"))
    arrays["turned"] = tensors["turned"].numpy()  # which is not contiguous
    types = {"half": HALF, "full": FULL, "brain": BRAIN, "turned": FULL, "scalar": HALF, "double": FULL}
    types["small"] = ir.DataType.FLOAT8E4M3FN
    slots = write_weights(tmp_path / WEIGHTS, arrays, types)
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == tensors.keys()
    wanted = {**tensors, "scalar": tensors["scalar"].half(), "double": tensors["double"].float()}
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double())
        assert slots[name].offset % types[name].itemsize == 0
    full = np.fromfile(tmp_path / WEIGHTS, np.float32, 4, offset=slots["full"].offset)
    assert np.array_equal(full, tensors["full"].numpy())


@pytest.mark.parametrize("options", ["default", "without prepacking"])
@pytest.mark.parametrize("compute", ["float16", "float"])
@pytest.mark.parametrize("stored", STORED)
def test_weights_of_any_type_serve_graphs_of_any_type(
    tmp_path: Path, stored: str, compute: str, options: str
) -> None:
    """Stored wider or narrower than the graph computes: a Cast stands behind the weight."""
    kind = HALF if compute == "float16" else FULL
    random = np.random.default_rng(0)
    weight = convert(random.standard_normal((4, 4)), stored)
    slots = write_weights(tmp_path / WEIGHTS, {"w": weight}, {"w": STORED[stored]})
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["":23]> g ({compute}[2,4] x) => ({compute}[2,4] y)'
        f" <{compute}[4,4] w = {{" + ",".join(["0"] * 16) + "}> { a = MatMul(x, w) y = Add(a, x) }"
    )
    attach(model, slots)
    assert is_weight(model.graph.initializers["w"])
    assert model.graph.initializers["w"].dtype == STORED[stored]
    assert [node.op_type for node in model.graph].count("Cast") == (kind != STORED[stored])
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert (tmp_path / "model.onnx").stat().st_size < 1000
    x = random.standard_normal((2, 4)).astype(kind.numpy())
    settings = ort.SessionOptions()
    if options != "default":
        settings.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    exact = x.astype(np.float64)
    wanted = exact @ weight.astype(np.float64) + exact
    assert np.allclose(session.run(None, {"x": x})[0], wanted, atol=5e-3 if kind == HALF else 1e-6)


def test_backends_say_what_they_read_by_these_names() -> None:
    assert BACKENDS["onnxruntime"].reads == set(STORED)
    assert all(row.reads <= set(STORED) for row in BACKENDS.values())


@pytest.mark.parametrize("stored", ["F16", "F32"])
def test_a_weight_that_is_transposed_is_widened_behind_that(tmp_path: Path, stored: str) -> None:
    """ONNX Runtime keeps what it folds on the way: a narrow copy is half as large."""
    weight = convert(np.arange(12.0).reshape(4, 3), stored)
    slots = write_weights(tmp_path / WEIGHTS, {"w": weight}, {"w": STORED[stored]})
    zeros = ",".join(["0"] * 12)
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["":23]> g (float[2,3] x) => (float[2,4] y)'
        f" <float[4,3] w = {{{zeros}}}> {{ t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }}"
    )
    attach(model, slots)
    casts = ["Cast"] if stored == "F16" else []
    assert [node.op_type for node in model.graph] == ["Transpose", *casts, "MatMul"]
    ir.save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x = np.ones((2, 3), np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], x @ weight.astype(np.float32).T)
