from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from latentrt.checkpoints.graphs.weights import WEIGHTS, attach, is_weight, stored_type, write_weights

HALF, FULL, BRAIN = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16


@pytest.mark.parametrize(
    ("source", "compute", "wanted"),
    [
        ("F32", HALF, HALF),
        ("F16", FULL, HALF),
        ("BF16", FULL, BRAIN),
        ("F64", FULL, FULL),
        ("F32", FULL, FULL),
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
    }
    types = {"half": HALF, "full": FULL, "brain": BRAIN, "turned": FULL, "scalar": FULL}
    slots = write_weights(tmp_path / WEIGHTS, tensors, types)
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert slots[name].offset % types[name].itemsize == 0
    full = np.fromfile(tmp_path / WEIGHTS, np.float32, 4, offset=slots["full"].offset)
    assert np.array_equal(full, tensors["full"].numpy())


def test_narrow_weights_are_widened_in_the_graph(tmp_path: Path) -> None:
    weight = torch.randn(4, 4).half()
    slots = write_weights(tmp_path / WEIGHTS, {"w": weight}, {"w": HALF})
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["":23]> g (float[2,4] x) => (float[2,4] y) <float[4,4] w = {'
        + ",".join(["0"] * 16)
        + "}> { a = MatMul(x, w) y = Add(a, x) }"
    )
    attach(model, tmp_path, slots)
    assert is_weight(model.graph.initializers["w"])
    assert model.graph.initializers["w"].dtype == HALF
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert (tmp_path / "model.onnx").stat().st_size < 1000
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": x})[0], x @ weight.float().numpy() + x, atol=1e-6)
