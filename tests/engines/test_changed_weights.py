"""Nets with other weights than their package stores, against graphs with those weights written into them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from latentrt.engines.errors import NumericError, PackageError
from latentrt.engines.net_weights import part_shapes, stored_transposed
from latentrt.engines.onnxruntime.nets import OnnxRuntimeNet, open_onnxruntime_net
from latentrt.engines.onnxruntime.session import CPU
from latentrt.engines.onnxruntime.tuning.cpu import lower_for_cpu
from latentrt.engines.package import Package
from latentrt.engines.spec import DTYPES, NETS, Array
from latentrt.runtime.model import SHIPPED
from tests.engines.host_device import HostDevice

DEMO = Package.open(SHIPPED["demo"])
SIZES = {"B": 2, "E": 1, "N": 1, "P": 2, "S": 3, "T": 77, "H": 64, "W": 64, "H/8": 8, "W/8": 8}


def inputs(net: str, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    found = dict[str, Array]()
    for item in DEMO.manifest.nets[net].spec.inputs:
        shape = [SIZES[dim] if isinstance(dim, str) else dim for dim in item.shape]
        values: Any = random.standard_normal(shape) if item.dtype.startswith("float") else np.zeros(shape)
        found[item.name] = values.astype(DTYPES[item.dtype])
    return found


def changed(weight: Array) -> Array:
    wide = weight.astype(np.float32)
    return wide + np.float32(1e-3) * np.arange(wide.size, dtype=np.float32).reshape(wide.shape) / wide.size


def written(net: str, names: set[str]) -> dict[str, Array]:
    """The outputs of the package's graph with the changed weights in it, by ONNX Runtime alone."""
    path = DEMO.path(DEMO.manifest.nets[net].graph)
    model = onnx.load(path)
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(changed(numpy_helper.to_array(tensor)), tensor.name))
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    outputs = [item.name for item in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, inputs(net)), strict=True))


def with_changes(part: str, names: set[str]) -> Package:
    return replace(DEMO, changes={part: dict.fromkeys(names, changed)})


@pytest.mark.parametrize("net", ["text_encoder", "unet_context", "unet_time", "unet", "vae_decoder"])
@pytest.mark.parametrize("which", ["all", "matrices", "biases"])
def test_a_net_computes_with_what_it_was_given(net: str, which: str) -> None:
    part = NETS[net].part
    ranks = {"all": {1, 2, 4}, "matrices": {2, 4}, "biases": {1}}[which]
    names = {name for name, shape in part_shapes(DEMO, part).items() if len(shape) in ranks}
    plain, wanted = OnnxRuntimeNet(DEMO, net)(**inputs(net)), written(net, names)
    found = OnnxRuntimeNet(with_changes(part, names), net)(**inputs(net))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    touched = any(not np.array_equal(plain[name], found[name]) for name in wanted)
    assert touched or (net == "unet_context" and which == "biases"), "its projections have no biases"


def test_nothing_is_changed_without_changes() -> None:
    package = with_changes("unet", {"conv_in.weight"})
    plain = OnnxRuntimeNet(DEMO, "unet_time")(**inputs("unet_time"))
    found = OnnxRuntimeNet(package, "unet_time")(**inputs("unet_time"))
    assert all(np.array_equal(found[name], plain[name]) for name in plain)
    assert not package.changes_of("vae_decoder")
    assert not package.changes_of("step")


@pytest.mark.parametrize("layout", ["fused", "winograd"])
def test_a_lowered_net_computes_with_them_too(layout: str, tmp_path: Path) -> None:
    names = set(part_shapes(DEMO, "unet"))
    lowered = lower_for_cpu(DEMO, "unet", layout, tmp_path)
    found = OnnxRuntimeNet(with_changes("unet", names), "unet", lowered=lowered)(**inputs("unet"))
    wanted = written("unet", names)["prediction"]
    assert np.linalg.norm(found["prediction"] - wanted) < 1e-5 * np.linalg.norm(wanted)
    kernels = {kernel.weight for kernel in lowered.kernels}
    assert bool(kernels) == (layout == "winograd")


def test_a_net_on_a_device_computes_with_them_too() -> None:
    names, device = set(part_shapes(DEMO, "unet")), HostDevice()
    net = open_onnxruntime_net(with_changes("unet", names), "unet_time", device, provider=CPU)
    outputs = net.session().run(None, inputs("unet_time"))
    for found, wanted in zip(outputs, written("unet_time", names).values(), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_what_is_beyond_fp16_is_named() -> None:
    """In fp32 too: such a weight would draw noise."""
    for beyond, dtype in ((1e5, "fp16"), (np.nan, "fp16"), (np.inf, "fp16"), (-1e5, "fp32")):
        change = {"conv_in.bias": lambda weight, beyond=beyond: np.full(weight.shape, beyond, np.float32)}
        manifest = replace(DEMO.manifest, dtype=dtype)
        package = replace(DEMO, manifest=manifest, changes={"unet": change})
        with pytest.raises(NumericError, match=r"the weight conv_in\.bias reaches"):
            OnnxRuntimeNet(package, "unet")


def test_weights_that_are_gone_are_said() -> None:
    def lost(weight: Array) -> Array:
        raise OSError("the disk is gone")

    with pytest.raises(PackageError, match="has no weights that adapters could change"):
        OnnxRuntimeNet(replace(DEMO, changes={"unet": {"conv_in.bias": lost}}), "unet")


def test_transposed_weights_are_known_by_the_graph() -> None:
    """As `checkpoints.graphs.weights.attach` writes them, and not where a graph turns weights to use them."""
    nodes = [
        helper.make_node(
            "Transpose", ["text_projection.weight"], ["a"], name="text_projection.weight/transpose"
        ),
        helper.make_node("Transpose", ["to_q.weight"], ["b"], name="val_3"),
        helper.make_node("Cast", ["a"], ["c"], name="text_projection.weight/transpose.out/cast", to=1),
        helper.make_node("Constant", [], ["d"], value_int=1),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert stored_transposed(model.SerializeToString(), Path("g.onnx")) == {"text_projection.weight"}
    with pytest.raises(PackageError, match="not a readable ONNX graph"):
        stored_transposed(b"\x3a\x02\x0a\x05", Path("g.onnx"))
