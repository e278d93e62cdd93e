import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from latentrt.engines.errors import BackendError, PackageError
from latentrt.engines.onnxruntime.lowering.files import give_weights
from latentrt.engines.onnxruntime.lowering.lower import lower
from latentrt.engines.package import Package
from latentrt.engines.spec import shape_of
from tests.engines.contrib_oracle import attribute, executable, relative_l2, session

DEMO = Path(__file__).resolve().parents[2] / "demo" / "package"
LAST, FIRST, HEADS = (0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3)
SIZES = ({"H/8": 16, "W/8": 16, "B": 1, "N": 1}, {"H/8": 9, "W/8": 7, "B": 3, "N": 2})


@pytest.fixture(scope="module")
def demo() -> Package:
    return Package.open(DEMO)


@pytest.fixture(scope="module")
def lowered(demo: Package, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lowered")
    return {
        net: lower(demo, net, folder)
        for net in (
            "unet",
            "unet_controlled",
            "unet_whole",
            "unet_context",
            "vae_decoder",
            "vae_encoder",
            "text_encoder",
        )
    }


def graph_of(package: Package, net: str) -> onnx.ModelProto:
    return onnx.load(package.path(package.manifest.nets[net].graph), load_external_data=False)


def weights_of(package: Package, net: str) -> Path:
    return package.weights_folder(net)


def before_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the decoder's picture as floats for one more output: uint8 would hide, or magnify, differences."""
    for node in model.graph.node:
        if node.op_type == "Round":
            model.graph.output.append(helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, None))
    return model


def feeds(package: Package, net: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    known = {"E": 3, "T": 77, "P": 2, "H": 64, "W": 8 * sizes["W/8"], **sizes}
    arrays = {}
    for item in package.manifest.nets[net].spec.inputs:
        shape = shape_of(item.shape, known)
        scale = {"timestep": 300, "input_ids": 40, "clip_skip": 0, "image": 90, "mask": 0.7}.get(item.name, 1)
        arrays[item.name] = (scale * np.abs(rng.standard_normal(shape))).astype(item.dtype)
    return arrays


@pytest.mark.parametrize(
    "net", ["unet", "unet_controlled", "unet_whole", "vae_decoder", "vae_encoder", "text_encoder"]
)
def test_lowered_demo_nets_compute_the_same(net: str, demo: Package, lowered: dict[str, Path]) -> None:
    folder = weights_of(demo, net)
    original = session(before_rounding(graph_of(demo, net)), folder)
    low = onnx.load(lowered[net], load_external_data=False)
    changed = session(before_rounding(executable(low)), folder)
    for sizes in SIZES:
        arrays = feeds(demo, net, sizes)
        wanted, found = original.run(None, arrays), changed.run(None, arrays)
        for name, left, right in zip((o.name for o in original.get_outputs()), found, wanted, strict=True):
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            if left.dtype == np.uint8:  # a value within 1e-5 of a half may round either way
                assert np.abs(left.astype(int) - right).max() <= 1
            elif name != "mean":  # the mean of values around 0 cancels; they are compared themselves
                assert relative_l2(left, right) <= 1e-5, (name, sizes)


def permutations(model: onnx.ModelProto) -> Counter[tuple[int, ...]]:
    """The Transposes of what is computed, by permutation; those of weights are folded at load."""
    stored = {item.name for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in stored:
            stored.add(node.output[0])
    return Counter(
        tuple(node.attribute[0].ints)
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] not in stored
    )


# The latent comes in NCHW and, in a UNet, the prediction leaves so: one Transpose each. The decoder's picture
# leaves in NHWC. Everything else was the attention's heads, which are not split any more.
@pytest.mark.parametrize(
    ("net", "before", "after", "norms", "silus", "convolutions"),
    [
        ("unet", {LAST: 4, FIRST: 4, HEADS: 24}, {LAST: 1, FIRST: 1}, 21, 17, 33),
        ("unet_whole", {LAST: 4, FIRST: 4, HEADS: 32}, {LAST: 1, FIRST: 1}, 21, 17, 33),
        ("vae_decoder", {LAST: 1, (0, 2, 1): 4, HEADS: 4}, {LAST: 1}, 22, 21, 29),
    ],
)
def test_every_group_norm_and_convolution_is_lowered(
    net: str,
    before: dict[tuple[int, ...], int],
    after: dict[tuple[int, ...], int],
    norms: int,
    silus: int,
    convolutions: int,
    demo: Package,
    lowered: dict[str, Path],
) -> None:
    assert permutations(graph_of(demo, net)) == before
    model = onnx.load(lowered[net], load_external_data=False)
    assert permutations(model) == after
    kinds = Counter((node.domain, node.op_type) for node in model.graph.node)
    assert kinds["com.microsoft", "GroupNorm"] + kinds["com.microsoft", "SkipGroupNorm"] == norms
    assert kinds["com.microsoft", "NhwcConv"] == convolutions
    assert not {("", "GroupNormalization"), ("", "Conv")} & set(kinds)
    norm_nodes = [node for node in model.graph.node if node.op_type.endswith("GroupNorm")]
    assert len([node for node in norm_nodes if attribute(node, "activation")]) == silus


def boundary(model: onnx.ModelProto) -> list[tuple[str, onnx.TypeProto]]:
    return [(item.name, item.type) for item in (*model.graph.input, *model.graph.output)]


@pytest.mark.parametrize("net", ["unet", "unet_whole", "vae_decoder", "text_encoder"])
def test_boundary_and_weights_stay(net: str, demo: Package, lowered: dict[str, Path]) -> None:
    original, path = graph_of(demo, net), lowered[net]
    model = onnx.load(path, load_external_data=False)
    assert boundary(model) == boundary(original)

    def external(model: onnx.ModelProto) -> dict[str, list[tuple[str, str]]]:
        return {
            item.name: [(entry.key, entry.value) for entry in item.external_data]
            for item in model.graph.initializer
            if item.external_data
        }

    assert external(model) == external(original)
    assert external(model)
    inline = sum(len(item.raw_data) for item in model.graph.initializer)
    assert inline < 2000, "shapes and scalars"
    assert {file.suffix for file in path.parent.iterdir()} == {".onnx"}
    demo.verify()


def test_onnxruntime_accepts_the_operators_and_lacks_only_their_kernels(
    demo: Package, lowered: dict[str, Path]
) -> None:
    """Schemas are checked before kernels are looked for, and a CPU build has the schemas."""
    for net in ("unet", "unet_whole", "vae_decoder", "vae_encoder"):
        with pytest.raises(Exception, match="NOT_IMPLEMENTED") as caught:
            open_lowered(lowered[net], demo, net)
        assert "NhwcConv(1)" in str(caught.value)
    model = onnx.load(lowered["unet"], load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "GroupNorm")
    node.attribute.append(helper.make_attribute("no_such", 1))
    with pytest.raises(Exception, match="Unrecognized attribute: no_such"):
        session(model, weights_of(demo, "unet"))


def open_lowered(path: Path, package: Package, net: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    give_weights(options, package, net)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_weights_are_found_in_the_package(demo: Package, lowered: dict[str, Path]) -> None:
    path = lowered["unet_context"]  # holds nothing to lower, so it runs on the CPU as it is
    arrays = feeds(demo, "unet_context", SIZES[0])
    with pytest.raises(Exception, match="External data path"):
        ort.InferenceSession(str(path), ort.SessionOptions(), providers=["CPUExecutionProvider"])
    found = open_lowered(path, demo, "unet_context").run(None, arrays)
    wanted = session(graph_of(demo, "unet_context"), weights_of(demo, "unet_context"))
    np.testing.assert_array_equal(found[0], wanted.run(None, arrays)[0])


def test_a_net_without_weights_needs_no_entry(package: Package) -> None:
    bare = replace(package.manifest.nets["unet"], weights=())
    package = replace(package, manifest=replace(package.manifest, nets={"unet": bare}))
    give_weights(None, package, "unet")


def test_onnx_ir_missing(demo: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.engines.onnxruntime.lowering.files.find_spec", lambda _: None)
    with pytest.raises(BackendError, match="pip install onnx-ir"):
        lower(demo, "unet", tmp_path)


def test_unreadable_graph(package: Package, tmp_path: Path) -> None:
    package.path("unet/loop.onnx").write_bytes(b"\xff" * 9)
    with pytest.raises(PackageError, match="onnx-ir cannot read"):
        lower(package, "unet", tmp_path)


def test_importing_it_needs_no_graph_library() -> None:
    code = "import sys; sys.modules['onnx_ir'] = sys.modules['onnx'] = None\n"
    code += "import latentrt.engines.onnxruntime.lowering.lower"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
