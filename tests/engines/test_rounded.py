"""Rounded products as products of bytes, against the graphs they are made of, computed node by node."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.utils import Extractor

from latentrt.engines import processors
from latentrt.engines.errors import BackendError, PackageError
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.lowering import byte_sums, rounded
from latentrt.engines.onnxruntime.lowering.byte_sums import check_sums
from latentrt.engines.onnxruntime.lowering.files import open_as_written, read_graph
from latentrt.engines.onnxruntime.lowering.rounded import lower_rounded
from latentrt.engines.onnxruntime.tuning import cpu as cpu_tuning
from latentrt.engines.onnxruntime.tuning import cpu_layouts
from latentrt.engines.onnxruntime.tuning.cpu import lower_for_cpu, tune_package
from latentrt.engines.onnxruntime.tuning.cpu_layouts import (
    CPU_LAYOUTS,
    INT8,
    LoweredGraph,
    cpu_key,
    layouts_of,
    lowered_graph,
)
from latentrt.engines.package import Package
from latentrt.engines.processors import adds_bytes
from latentrt.engines.spec import Array
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tolerances import NET_RELATIVE_L2, relative_l2
from latentrt.engines.tuning.choice import Choice, allowed_distance
from latentrt.engines.tuning.runs import measured_inputs
from latentrt.export.quantised.inputs import drawn_pictures
from latentrt.export.quantised.ranges import Inputs
from latentrt.export.quantised.write import quantise_package
from latentrt.runtime.model import SHIPPED
from tests.engines.contrib_oracle import exact

DEMO = Package.open(SHIPPED["demo"])
VERSION = onnxruntime.__version__
LEVELS = onnxruntime.GraphOptimizationLevel
# Two products of these and of uint8 fit 16 bits: 2 * 64 * 255 < 2^15. So no processor's sums saturate.
NARROW = 64
PIXELS = 2 * 16 * 16
SCALE = 0.02
ZERO = np.int8(0)


@pytest.fixture(scope="module")
def calls() -> list[Inputs]:
    return [call for picture in drawn_pictures(DEMO) for call in picture.calls]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The demo with its UNet in int8."""
    return quantise_package(DEMO, tmp_path_factory.mktemp("rounded") / "int8", format="int8").package


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStore:
    """The user's own store, which is empty."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return EngineStore()


# ── single products ────────────────────────────────────────────────────────────────────────────────────


class Products:
    """A graph of products that read the same rounded data `x`."""

    def __init__(self, *shape: Any, zero: Any = ZERO) -> None:
        self.random = np.random.default_rng(0)
        self.shape = shape
        self.weights: dict[str, Array] = {"s": np.array(SCALE, np.float32), "z": np.array(zero)}
        self.nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        ]
        self.outputs: list[str] = []

    def weight(self, *shape: int, axis: int, perm: tuple[int, ...] = ()) -> str:
        """The name of a weight that is scaled back, by channels of an axis of what is stored."""
        name = f"w{len(self.nodes)}"
        self.weights[name] = self.random.integers(-NARROW, NARROW + 1, shape).astype(np.int8)
        self.weights[f"{name}/s"] = self.random.uniform(0.001, 0.1, shape[axis]).astype(np.float32)
        self._add("DequantizeLinear", [name, f"{name}/s"], f"{name}/d", axis=axis)
        return self._add("Transpose", [f"{name}/d"], f"{name}/t", perm=perm) if perm else f"{name}/d"

    def vector(self, size: int) -> str:
        name = f"b{len(self.nodes)}"
        self.weights[name] = self.random.standard_normal(size).astype(np.float32)
        return name

    def product(self, kind: str, weight: str, bias: str = "", data: str = "d", **attributes: Any) -> str:
        name = f"y{len(self.nodes)}"
        inputs = [data, weight, *([bias] if bias and kind == "Conv" else [])]
        self._add(kind, inputs, name, **attributes)
        if bias and kind == "MatMul":
            name = self._add("Add", [bias, name], f"{name}/biased")
        self.outputs.append(name)
        return name

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    @property
    def model(self) -> onnx.ModelProto:
        def value(name: str, shape: Any) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "g",
            [value("x", self.shape)],
            [value(name, None) for name in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        opset = [helper.make_opsetid("", 23)]
        return shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opset, ir_version=10))

    def data(self, *shape: int) -> Array:
        """Data of which a few are beyond what the scale reaches, on both sides."""
        made: Any = self.random.standard_normal(shape) * 1.2
        return made.astype(np.float32)


def lowered(model: onnx.ModelProto, pixels: int = PIXELS) -> tuple[onnx.ModelProto, int]:
    graph = onnx_ir.from_proto(model)
    count = lower_rounded(graph, pixels)
    return onnx_ir.to_proto(graph), count


def session_of(model: onnx.ModelProto, level: Any = LEVELS.ORT_ENABLE_ALL, **settings: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = level
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def kinds_of(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def check_same(products: Products, *shapes: tuple[int, ...], pixels: int = PIXELS) -> onnx.ModelProto:
    """All products are lowered, and compute what they did; the lowered graph."""
    graph, count = lowered(products.model, pixels)
    assert count == len(products.outputs)
    assert not {"MatMul", "Conv", "DequantizeLinear", "ConvInteger"} & set(kinds_of(graph))
    wanted_by, found_by = session_of(products.model, LEVELS.ORT_DISABLE_ALL), session_of(graph)
    for shape in shapes:
        data = products.data(*shape)
        assert np.abs(data).max() > 128 * SCALE, "some are out of reach"
        for found, wanted in zip(
            found_by.run(None, {"x": data}), wanted_by.run(None, {"x": data}), strict=True
        ):
            assert found.shape == wanted.shape
            assert relative_l2(found, wanted) < 1e-6
    return graph


def test_queries_keys_and_values_share_their_data() -> None:
    products = Products("B", "L", 48)
    for perm in ((1, 0), ()):
        shape, axis = ((40, 48), 0) if perm else ((48, 40), 1)
        for bias in ("", products.vector(40)):
            products.product("MatMul", products.weight(*shape, axis=axis, perm=perm), bias)
    graph = check_same(products, (2, 33, 48), (1, 7, 48), (3, 64, 48))
    kinds = kinds_of(graph)
    assert (kinds["QuantizeLinear"], kinds["MatMulIntegerToFloat"]) == (1, 4)
    assert "Add" not in kinds, "biases are the products' own"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("side", "attributes", "bands"),
    [
        (1, {}, 1),
        (1, {"strides": [2, 2]}, 3),
        (3, {"pads": [1, 1, 1, 1]}, 1),
        (3, {"pads": [1, 1, 1, 1]}, 5),
        (3, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, 1),
        (3, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, 4),
        (3, {"pads": [0, 0, 1, 1], "strides": [2, 2]}, 2),
        (3, {}, 2),
    ],
)
def test_convolutions_are_products_of_columns(
    side: int, attributes: dict[str, Any], bands: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = attributes.get("strides", [1])[0]
    size = side**2 * 32 * PIXELS // step**2
    monkeypatch.setattr(rounded, "_MOST_COLUMNS", -(-size // bands))
    products = Products("B", 32, "H", "W")
    kernel = products.weight(24, 32, side, side, axis=0)
    products.product("Conv", kernel, products.vector(24) if bias else "", **attributes)
    graph = check_same(products, (2, 32, 16, 16), (1, 32, 9, 14), (3, 32, 7, 5), (1, 32, 3, 12))
    assert kinds_of(graph)["MatMulIntegerToFloat"] == bands


def test_convolutions_share_their_image() -> None:
    products = Products("B", 32, "H", "W")
    for side, pads in ((3, [1, 1, 1, 1]), (1, [0, 0, 0, 0]), (3, [1, 1, 1, 1])):
        products.product("Conv", products.weight(24, 32, side, side, axis=0), pads=pads)
    kinds = kinds_of(check_same(products, (2, 32, 8, 8)))
    assert (kinds["QuantizeLinear"], kinds["Pad"]) == (1, 1)
    assert kinds["Transpose"] == 3 + 1 + 3, "weights, the image, and what comes out"


def test_bands_follow_the_size_of_images() -> None:
    """Half the side has a quarter of the columns; behind a Resize it is the whole side again."""
    products = Products("B", 32, "H", "W")

    def conv(data: str, **attributes: Any) -> str:
        weight = products.weight(32, 32, 3, 3, axis=0)
        return products.product("Conv", weight, data=data, pads=[1, 1, 1, 1], **attributes)

    def again(data: str, number: int) -> str:
        for kind, before, after in (
            ("Quantize", data, f"q{number}"),
            ("Dequantize", f"q{number}", f"d{number}"),
        ):
            products.nodes.append(helper.make_node(f"{kind}Linear", [before, "s", "z"], [after]))
        return f"d{number}"

    half = again(conv("d", strides=[2, 2]), 1)
    products.weights["scales"] = np.array([1, 1, 2, 2], np.float32)
    products.nodes.append(helper.make_node("Resize", [conv(half), "", "scales"], ["large"]))
    conv(again("large", 2))
    pixels = 4 * rounded._MOST_COLUMNS // (9 * 32)
    graph, count = lowered(products.model, pixels)
    assert count == 3
    parts = [
        len(node.input) for node in graph.graph.node if node.op_type == "Concat" and len(node.input) == 4
    ]
    assert parts == [4], "one at full size; the others have a quarter of it, a band each"
    assert kinds_of(graph)["MatMulIntegerToFloat"] == 1 + 1 + 4


@pytest.mark.parametrize(
    "attributes",
    [
        {"group": 2},
        {"dilations": [2, 2]},
        {"strides": [1, 2]},
        {"strides": [3, 3]},
        {"auto_pad": "SAME_UPPER"},
    ],
)
def test_other_convolutions_stay(attributes: dict[str, Any]) -> None:
    products = Products("B", 32, "H", "W")
    weight = products.weight(24, 32 // attributes.get("group", 1), 3, 3, axis=0)
    products.product("Conv", weight, **attributes)
    graph, count = lowered(products.model)
    assert count == 0
    assert graph == onnx_ir.to_proto(onnx_ir.from_proto(products.model))


@pytest.mark.parametrize(
    "kind", ["five", "uint8", "shifted", "whole", "input axis", "weight alone", "data alone", "half", "shape"]
)
def test_other_roundings_stay(kind: str) -> None:
    matrix = Products("B", "L", 48)
    if kind == "five":
        products = Products("B", 32, "H", "W")
        products.product("Conv", products.weight(24, 32, 5, 5, axis=0))
    elif kind in ("uint8", "shifted"):
        products = Products("B", "L", 48, zero=np.uint8(0) if kind == "uint8" else np.int8(3))
        products.product("MatMul", products.weight(48, 40, axis=1))
    elif kind == "half":
        products = matrix
        products.product("MatMul", products.weight(48, 40, axis=1))
        for name, array in products.weights.items():
            products.weights[name] = array.astype(np.float16) if array.dtype == np.float32 else array
        model = products.model
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        assert lowered(model)[1] == 0
        return
    else:
        products = matrix
        weight = products.weight(48, 48, axis=0 if kind == "input axis" else 1)
        if kind == "whole":
            products.weights["w2/s"] = np.array(0.5, np.float32)
        elif kind == "data alone":
            weight = "plain"
            products.weights["plain"] = np.ones((48, 48), np.float32)
        elif kind == "shape":
            products.weights["w2"] = np.ones((2, 48, 48), np.int8)
        products.product("MatMul", weight, data="x" if kind == "weight alone" else "d")
    assert lowered(products.model)[1] == 0


# ── a whole net ────────────────────────────────────────────────────────────────────────────────────────


def int8_graph(package: Package, folder: Path, net: str = "unet") -> onnx.ModelProto:
    return onnx.load_from_string(lower_for_cpu(package, net, INT8, folder).graph)


def with_weights(model: onnx.ModelProto, package: Package) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.load_external_data_for_model(copy, str(package.weights_folder("unet")))
    return copy


def test_every_product_of_the_unet_is_what_it_was(package: Package, calls: list[Inputs]) -> None:
    """Each on the data that the graph itself has there, so that no difference is carried on."""
    plain = onnx.load(package.path(package.manifest.nets["unet"].graph), load_external_data=False)
    plain = with_weights(plain, package)
    graph = read_graph(package, "unet")
    lower_rounded(graph, PIXELS)  # and nothing else, so that all other values have their names
    made = with_weights(onnx_ir.to_proto(graph), package)
    products = [node for node in made.graph.node if node.op_type == "MatMulIntegerToFloat"]
    places = package.manifest.quantised["rounded"]
    assert len(products) == len(places)
    data = sorted({node.input[0] for node in plain.graph.node if node.op_type == "QuantizeLinear"})
    assert data == sorted({node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"})
    kept = {name for node in made.graph.node for name in node.output}
    users = {name: node for node in plain.graph.node for name in node.input}
    results = [name if name in kept else users[name].output[0] for name in places]  # a bias is taken in
    for name in (*data, *results):
        plain.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    del made.graph.value_info[:]
    for name in (*data, *results):
        made.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    values = session_of(plain, LEVELS.ORT_DISABLE_ALL).run([*data, *results], dict(calls[0]))
    feeds = dict(zip(data, values, strict=False))
    cut = Extractor(made).extract_model(data, results)
    session = session_of(exact(cut))
    for name, found, wanted in zip(results, session.run(results, feeds), values[len(data) :], strict=True):
        assert relative_l2(found, wanted) < 1e-6, name


def test_the_unet_predicts_what_it_did(package: Package, calls: list[Inputs], tmp_path: Path) -> None:
    """Values beside a half go to their other side, and that is all: sums are exact here on any processor."""
    wanted = open_as_written(package, "unet").run(["prediction"], dict(calls[0]))[0]
    session = session_of(exact(with_weights(int8_graph(package, tmp_path), package)))
    found = session.run(["prediction"], dict(calls[0]))[0]
    assert relative_l2(found, wanted) <= allowed_distance(package, "unet")


@pytest.mark.skipif(not adds_bytes(), reason="sums of this processor's products saturate")
def test_the_unet_predicts_what_it_did_with_bytes(
    package: Package, calls: list[Inputs], tmp_path: Path
) -> None:
    wanted = open_as_written(package, "unet").run(["prediction"], dict(calls[0]))[0]
    session = session_of(with_weights(int8_graph(package, tmp_path), package))
    found = session.run(["prediction"], dict(calls[0]))[0]
    assert relative_l2(found, wanted) <= allowed_distance(package, "unet")


def test_what_onnxruntime_runs_of_it(package: Package, tmp_path: Path) -> None:
    model = with_weights(int8_graph(package, tmp_path), package)
    optimised = tmp_path / "optimised.onnx"
    session_of(model, LEVELS.ORT_ENABLE_EXTENDED, optimized_model_filepath=str(optimised))
    kinds = kinds_of(onnx.load(optimised))
    places = len(package.manifest.quantised["rounded"])
    assert kinds["MatMulIntegerToFloat"] == places
    assert not {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DequantizeLinear"} & set(
        kinds
    )
    left = len(package.manifest.quantised["left_out"]) + 2  # and what enters and leaves the net
    assert sum(kinds[kind] for kind in ("Conv", "MatMul", "FusedConv", "FusedMatMul", "Gemm")) <= left
    assert kinds["MultiHeadAttention"] > 0


def test_the_pattern_that_is_fused_is_this_operator() -> None:
    """MatMulInteger, Cast, Mul and Add, as in ONNX Runtime's documentation of its fusion."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.integers(-NARROW, NARROW, (48, 40)).astype(np.int8),
        "t": random.uniform(0.001, 0.1, 40).astype(np.float32),
        "bias": random.standard_normal(40).astype(np.float32),
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "t"], ["scale"]),
        helper.make_node("Mul", ["wide", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["y"]),
    ]
    direct = [
        nodes[0],
        helper.make_node(
            "MatMulIntegerToFloat", ["q", "w", "s", "t", "z", "", "bias"], ["y"], domain="com.microsoft"
        ),
    ]
    data = random.standard_normal((5, 48)).astype(np.float32)
    found: list[Array] = []
    for body in (nodes, direct):
        graph = helper.make_graph(
            body,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["L", 48])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        found += session_of(helper.make_model(graph, opset_imports=opsets, ir_version=10)).run(
            None, {"x": data}
        )
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-6)


# ── where it is offered ────────────────────────────────────────────────────────────────────────────────


X86 = (
    "processor\t: 0\nmodel name\t: Some  CPU\nflags\t\t: fpu avx2 {}\nbugs\t\t: none\n\nflags\t\t: amx_int8\n"
)
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd {}\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (X86.format("avx512f avx512bw"), False),
        (X86.format("avx512f avx512_vnni"), True),
        (X86.format("avx_vnni fsrm"), True),
        (X86.format("amx_int8"), True),
        (X86.format("not_avx_vnni"), False),
        (ARM.format("aes crc32"), False),
        (ARM.format("asimddp i8mm"), True),
        ("model name\t: avx_vnni\n", False),
        ("", False),
    ],
)
def test_what_a_processor_can_is_read(
    text: str, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processors, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("sys.platform", "linux")
    assert adds_bytes() is wanted
    if text.startswith("processor\t: 0\nmodel"):
        assert processors.processor() == "Some CPU"


@pytest.mark.parametrize(
    ("flags", "wanted"), [("avx512_bf16", True), ("amx_bf16", True), ("avx512_vnni", False)]
)
def test_who_multiplies_bfloat16(
    flags: str, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "_CPUINFO", tmp_path / "cpuinfo")
    assert processors.multiplies_bfloat16() is False
    (tmp_path / "cpuinfo").write_text(X86.format(flags))
    assert processors.multiplies_bfloat16() is wanted


@pytest.mark.parametrize(("machine", "wanted"), [("arm64", True), ("x86_64", False)])
def test_apples_own_processors_can(machine: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert adds_bytes() is wanted


def test_other_systems_do_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr("sys.platform", "win32")
    assert adds_bytes() is False


def can(monkeypatch: pytest.MonkeyPatch, it_can: bool) -> None:
    monkeypatch.setattr(cpu_layouts, "adds_bytes", lambda: it_can)


def test_only_where_sums_are_right(
    package: Package, store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    can(monkeypatch, True)
    assert layouts_of(package, "unet") == (*CPU_LAYOUTS, INT8)
    assert layouts_of(package, "vae_decoder") == layouts_of(DEMO, "unet") == CPU_LAYOUTS
    key = cpu_key(package, "unet", VERSION)
    store.get_or_build(key, lambda path: path.write_bytes(b"graph") and {"layout": INT8, "kernels": []})
    found = lowered_graph(package, "unet", VERSION)
    assert found == LoweredGraph(layout=INT8, graph=b"graph", kernels=())
    can(monkeypatch, False)
    assert layouts_of(package, "unet") == CPU_LAYOUTS
    assert cpu_key(package, "unet", VERSION) != key
    assert lowered_graph(package, "unet", VERSION) is None


def test_where_it_was_the_fastest_it_is_opened(
    package: Package, calls: list[Inputs], store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured as ever; only the verdict is ours, as this machine's clock and sums may be anything."""
    can(monkeypatch, True)
    monkeypatch.setattr(cpu_tuning, "check_sums", lambda: None)
    real = cpu_tuning.choose_layout
    seen: list[Choice] = []

    def chosen(*args: Any, **options: Any) -> Choice:
        assert options["parity"] == allowed_distance(package, "unet")
        seen.append(real(*args, **options))
        return Choice(layout=INT8, milliseconds={}, relative_l2=seen[0].relative_l2, rejected={})

    monkeypatch.setattr(cpu_tuning, "choose_layout", chosen)
    (tuned,) = tune_package(package, store, nets=["unet"], rounds=1)
    assert tuned.entry.facts["layout"] == INT8
    assert {"fused", INT8} <= set(seen[0].relative_l2), "of winograd there may be nothing left"
    assert INT8 not in seen[0].rejected
    with ONNXRUNTIME.open_net(package, "unet") as net:
        assert net.layout == INT8
        feeds = dict(calls[0])
        found = net(**feeds)["prediction"]
    wanted = open_as_written(package, "unet").run(["prediction"], feeds)[0]
    assert relative_l2(found, wanted) < 0.03, "also where sums saturate it is the same net"


class Saturating:
    """A session whose sums of two products have 16 bits, as on x86 without VNNI."""

    bits = 16

    def __init__(self, *_: object, content: bytes, **__: object) -> None:
        weights = {
            one.name: numpy_helper.to_array(one) for one in onnx.load_from_string(content).graph.initializer
        }
        self.weight = weights["w"].astype(int)

    def run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        assert names == ["y"]
        single = feeds["q"].astype(int)[:, :, None] * self.weight
        pairs = np.clip(single[:, ::2] + single[:, 1::2], -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return [(pairs.sum(axis=1) - 128 * self.weight.sum(axis=0)).astype(np.float32)]


def test_sums_that_saturate_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    if adds_bytes():
        check_sums()
    monkeypatch.setattr(byte_sums, "open_session", Saturating)
    with pytest.raises(BackendError, match="has sums of bytes saturate"):
        check_sums()
    monkeypatch.setattr(Saturating, "bits", 32)
    check_sums()


def test_sums_that_saturate_are_out(
    package: Package, store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    can(monkeypatch, True)
    monkeypatch.setattr(byte_sums, "open_session", Saturating)
    (tuned,) = tune_package(package, store, nets=["unet"], rounds=1)
    assert "saturate" in tuned.entry.facts["rejected"][INT8]
    assert tuned.entry.facts["layout"] != INT8


def test_what_is_compared_with_is_computed_node_by_node(package: Package, tmp_path: Path) -> None:
    trials = cpu_tuning._Trials(package, "unet", tmp_path, lambda *_: None, 1)
    trials.inputs = measured_inputs(package, "unet")
    measured = trials.measure("plain")
    measured.close()
    wanted = open_as_written(package, "unet").run(["prediction"], trials.inputs)[0]
    np.testing.assert_array_equal(measured.outputs["prediction"], wanted)


def test_bars_are_wider_where_products_are_rounded(package: Package) -> None:
    assert allowed_distance(package, "unet") == 1.5 * package.manifest.quantised["relative_l2"]
    assert allowed_distance(package, "vae_decoder") == NET_RELATIVE_L2["fp32"]
    assert allowed_distance(DEMO, "unet") == NET_RELATIVE_L2["fp32"]


def test_nothing_to_lower(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="nothing in float32 that the layout 'int8' lowers"):
        lower_for_cpu(DEMO, "step", INT8, tmp_path)


def test_a_graph_that_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    monkeypatch.setattr(Package, "path", lambda self, name: tmp_path / "broken.onnx")
    with pytest.raises(PackageError, match="not a readable ONNX graph"):
        open_as_written(DEMO, "unet")
