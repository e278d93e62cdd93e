"""A smallest possible package: one net, y = x + bias, its weight in a safetensors file."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from latentrt.engines.package import Manifest, NetFile, Package, write_manifest
from latentrt.engines.spec import NetSpec, TensorSpec

BIAS = np.arange(4, dtype=np.float32)
SPEC = NetSpec(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("B", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("B", 4)),),
)


def external(location: str, offset: int, length: int) -> onnx.TensorProto:
    """A weight that lies in another file."""
    tensor = TensorProto(name="bias", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def add_graph(weight: onnx.TensorProto) -> onnx.ModelProto:
    """The graph y = x + bias."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "bias"], ["y"], name="add")],
        "add",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 4])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def write_graph(path: Path, weight: onnx.TensorProto) -> None:
    """Write the graph; `onnx.save` would refuse some of the paths the tests need."""
    path.write_bytes(add_graph(weight).SerializeToString())


def write_tiny_package(root: Path) -> Package:
    """A package with the net `unet`."""
    (root / "unet").mkdir(parents=True)
    save_file({"bias": BIAS}, root / "unet" / "weights.safetensors")
    size = (root / "unet" / "weights.safetensors").stat().st_size
    write_graph(root / "unet" / "loop.onnx", external("weights.safetensors", size - 16, 16))
    net = NetFile(graph="unet/loop.onnx", weights=("unet/weights.safetensors",), spec=SPEC)
    return write_manifest(
        root,
        Manifest(
            name="tiny",
            family="sd1",
            dtype="fp32",
            latent_channels=4,
            context_width=8,
            scheduler={"_class_name": "DDIMScheduler"},
            nets={"unet": net},
        ),
    )
