"""What becomes of a graph before OpenVINO compiles it: it computes the same, and copies less."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from latentrt.engines.openvino import nets
from latentrt.engines.openvino.lowering import constant, lower
from latentrt.engines.openvino.nets import OpenvinoNet
from latentrt.engines.package import Package
from latentrt.engines.tuning.runs import measured_inputs
from latentrt.runtime.model import SHIPPED

openvino = pytest.importorskip("openvino")
op: Any = pytest.importorskip("openvino.opset13")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 6), np.float32)
WEIGHT = RNG.standard_normal((8, 6), np.float32)  # (2N, C)
BIAS = RNG.standard_normal(8, np.float32)


@dataclass
class Layer:
    """A gated layer as a graph: what is special in it, and whether two products take its place."""

    lowered: bool
    axis: int = -1
    parts: int = 2
    bias: np.ndarray | None = None
    rounded: bool = False
    dynamic: bool = False
    cast: bool = True

    def build(self) -> tuple[Any, dict[str, np.ndarray]]:
        shape = [-1, -1, 6] if self.dynamic else list(X.shape)
        x = op.parameter(shape, np.float32, "x")
        weights: dict[str, np.ndarray] = {}

        def stored(array: np.ndarray) -> Any:
            node = constant(array)
            weights[node.get_friendly_name()] = array
            return op.convert(node, "f32") if self.cast else node

        weight = stored(WEIGHT)
        if self.rounded:
            weight = op.multiply(weight, op.constant(np.float32(2)))
        turned = op.transpose(weight, op.constant(np.array([1, 0])))
        total = op.add(op.matmul(x, turned, False, False), stored(BIAS if self.bias is None else self.bias))
        split = op.split(total, op.constant(np.array(self.axis)), self.parts)
        value, gate = split.output(0), split.output(1)
        product = op.multiply(value, op.gelu(gate, "erf"))
        return openvino.Model([product], [x], "layer"), weights


def run(model: Any) -> np.ndarray:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([X])[0]


def kinds(model: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


@pytest.mark.parametrize(
    "layer",
    [
        Layer(lowered=True),
        Layer(lowered=True, axis=2),
        Layer(lowered=True, dynamic=True),
        Layer(lowered=True, cast=False),
        Layer(lowered=False, axis=0),
        Layer(lowered=False, parts=4),
        Layer(lowered=False, bias=np.ones(1, np.float32)),
        Layer(lowered=False, rounded=True),
    ],
    ids=str,
)
def test_halves_are_computed_apart(layer: Layer) -> None:
    model, weights = layer.build()
    wanted = run(model)
    lower(model, weights)
    assert kinds(model)["Split"] == (not layer.lowered)
    assert kinds(model)["MatMul"] == 1 + layer.lowered
    np.testing.assert_allclose(run(model), wanted, rtol=1e-6, atol=1e-6)


def test_halves_have_no_copy_of_the_weights() -> None:
    model, weights = Layer(lowered=True).build()
    lower(model, weights)
    constants = [node.data for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    halves = [array for array in constants if array.shape == (4, 6)]
    assert len(halves) == 2
    assert all(np.shares_memory(array, WEIGHT) for array in halves)


@pytest.mark.parametrize("net", ["unet", "unet_controlled", "vae_decoder"])
def test_the_demo_computes_the_same(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package.open(SHIPPED["demo"])
    inputs = measured_inputs(package, net)
    found = OpenvinoNet(package, net)
    splits = kinds(found._model)["Split"]
    with monkeypatch.context() as patched:
        patched.setattr(nets, "lower", lambda *_: None)
        plain = OpenvinoNet(package, net)
    assert splits == 0
    assert kinds(plain._model)["Split"] == (0 if net == "vae_decoder" else 4)
    wanted = plain(**inputs)
    for name, array in found(**inputs).items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-5)
