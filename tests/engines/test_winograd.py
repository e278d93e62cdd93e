"""Winograd convolutions and tiled attention against ONNX Runtime's own operators, and how nets get them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines.errors import BackendError, MemoryLimitError, PackageError, UsageError
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.lowering import files as lowering_files
from latentrt.engines.onnxruntime.lowering.fused import lower_attention
from latentrt.engines.onnxruntime.lowering.winograd import TILES, Kernel, choose, kernels, lower_convolutions
from latentrt.engines.onnxruntime.nets import OnnxRuntimeNet
from latentrt.engines.onnxruntime.tuning import cpu as cpu_tuning
from latentrt.engines.onnxruntime.tuning import cpu_layouts
from latentrt.engines.onnxruntime.tuning.cpu import lower_for_cpu, tune_package
from latentrt.engines.onnxruntime.tuning.cpu_layouts import LoweredGraph, cpu_key, lowered_graph
from latentrt.engines.package import Package
from latentrt.engines.spec import DTYPES
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tuning import runs
from latentrt.engines.tuning.choice import Choice, Measured, choose_layout
from tests.tiny_package import external, write_graph

DEMO = Path(__file__).parents[2] / "demo" / "package"
FOLDER = "session.model_external_initializers_file_folder_path"
STORED = [np.float16, np.float32, np.float64]
STORED += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
SAME = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def demo() -> Package:
    return Package.open(DEMO)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStore:
    """The user's own store, which is empty."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return EngineStore()


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], weights: dict[str, Any]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    )


def conv_model(weight: Any, bias: Any = None, **attributes: Any) -> onnx.ModelProto:
    weights = {"w": weight} if bias is None else {"w": weight, "b": bias}
    node = helper.make_node("Conv", ["x", *weights], ["y"], **{**SAME, **attributes})
    channels = weight.shape[1] * attributes.get("group", 1)
    return model_of([node], {"x": ["B", channels, "H", "W"]}, weights)


def run(model: onnx.ModelProto, feeds: dict[str, Any], given: dict[str, Any] | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(array) for key, array in (given or {}).items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    options.add_session_config_entry(FOLDER, str(DEMO / "unet"))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def lowered(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[Kernel, ...]]:
    graph = onnx_ir.from_proto(model)
    made = lower_convolutions(graph, "weights.safetensors")
    return onnx_ir.to_proto(graph), made


def far(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found.astype(float) - wanted) / np.linalg.norm(wanted.astype(float)))


@pytest.mark.parametrize("tile", TILES.values(), ids=lambda tile: f"F({tile.m})")
def test_the_matrices_are_a_convolution(tile: Any) -> None:
    """Equation 5 of the paper, in one dimension: every product of unit vectors."""
    for d, data in enumerate(np.eye(tile.a)):
        for g, kernel in enumerate(np.eye(3)):
            found = tile.output @ ((tile.kernel @ kernel) * (tile.data @ data))
            wanted = [float(d == place + g) for place in range(tile.m)]
            np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("choice", [(2, True), (4, False), (4, True), (2, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_convolution_computes(
    monkeypatch: pytest.MonkeyPatch, choice: tuple[int, bool], bias: bool
) -> None:
    monkeypatch.setattr("latentrt.engines.onnxruntime.lowering.winograd.choose", lambda *_: choice)
    rng = np.random.default_rng(sum(choice))
    weight = rng.standard_normal((7, 5, 3, 3)).astype(np.float32)
    model = conv_model(weight, rng.standard_normal(7).astype(np.float32) if bias else None)
    graph, made = lowered(model)
    assert [(kernel.weight, kernel.m, kernel.left) for kernel in made] == [("w", *choice)]
    assert not [node for node in graph.graph.node if node.op_type == "Conv"]
    given = {made[0].name: made[0].transform(weight)}
    for batch, height, width in ((1, 1, 1), (2, 3, 2), (3, 4, 8), (1, 9, 5), (2, 16, 7), (1, 6, 13)):
        x = rng.standard_normal((batch, 5, height, width)).astype(np.float32)
        found = run(graph, {"x": x}, given)
        assert found.shape == (batch, 7, height, width)
        assert far(found, run(model, {"x": x})) < 1e-5
        assert np.array_equal(found, run(graph, {"x": x}, given))


@pytest.mark.parametrize(
    ("channels", "attributes"),
    [
        (64, {"strides": [2, 2]}),
        (64, {"pads": [0, 0, 0, 0]}),
        (64, {"pads": [0, 0, 1, 1]}),
        (64, {"dilations": [2, 2]}),
        (32, {"group": 2}),
        (64, {"auto_pad": "SAME_UPPER", "pads": None}),
        (8, {}),
    ],
)
def test_other_convolutions_stay(channels: int, attributes: dict[str, Any]) -> None:
    given = {key: value for key, value in {**SAME, **attributes}.items() if value is not None}
    node = helper.make_node("Conv", ["x", "w"], ["y"], **given)
    weight = np.zeros((64, channels, 3, 3), np.float32)
    shape = ["B", channels * attributes.get("group", 1), "H", "W"]
    graph, made = lowered(model_of([node], {"x": shape}, {"w": weight}))
    assert made == ()
    assert [node.op_type for node in graph.graph.node] == ["Conv"]


def test_weights_that_are_computed_and_half_precision_stay() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], **SAME)
    assert lowered(model_of([node], {"x": ["B", 64, 9, 9], "w": [64, 64, 3, 3]}, {}))[1] == ()
    model = conv_model(np.zeros((64, 64, 3, 3), np.float16))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT16, None))
    assert lowered(model)[1] == ()


def test_large_weights_take_the_small_tile() -> None:
    assert choose(320, 320) == (4, False)
    assert choose(1280, 1280) == (2, True)
    assert choose(4, 320) is choose(320, 4) is None


def attention_model(perm: tuple[int, ...] = (0, 2, 1, 3), **attributes: Any) -> onnx.ModelProto:
    nodes = [
        node
        for name in "qkv"
        for node in (
            helper.make_node("Reshape", [name, "heads"], [f"{name}4"]),
            helper.make_node("Transpose", [f"{name}4"], [f"{name}h"], perm=perm),
        )
    ]
    nodes += [
        helper.make_node("Attention", ["qh", "kh", "vh"], ["oh"], **attributes),
        helper.make_node("Transpose", ["oh"], ["o4"], perm=(0, 2, 1, 3)),
        helper.make_node("Reshape", ["o4", "whole"], ["o"]),
        helper.make_node("Neg", ["o"], ["y"]),
    ]
    shapes = {"heads": np.array([0, 0, 3, 4]), "whole": np.array([0, 0, 12])}
    return model_of(nodes, {name: ["B", "L", 12] for name in "qkv"}, shapes)


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}])
def test_attention_is_the_same(attributes: dict[str, Any]) -> None:
    model = attention_model(**attributes)
    graph = onnx_ir.from_proto(model)
    assert lower_attention(graph) == 1
    made = onnx_ir.to_proto(graph)
    assert [node.op_type for node in made.graph.node] == ["MultiHeadAttention", "Neg"]
    rng = np.random.default_rng(0)
    for batch, length in ((1, 1), (2, 33)):
        feeds = {name: rng.standard_normal((batch, length, 12)).astype(np.float32) for name in "qkv"}
        assert far(run(made, feeds), run(model, feeds)) < 1e-5


@pytest.mark.parametrize("attributes", [{"is_causal": 1}, {"softcap": 2.0}, {"perm": (0, 1, 2, 3)}])
def test_other_attention_stays(attributes: dict[str, Any]) -> None:
    assert lower_attention(onnx_ir.from_proto(attention_model(**attributes))) == 0


def inputs_of(package: Package, net: str, height: int, width: int, batch: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    sizes = {"B": batch, "N": batch, "H/8": height, "W/8": width, "T": 77}
    return {
        item.name: rng.standard_normal(
            [sizes[size] if isinstance(size, str) else size for size in item.shape]
        ).astype(DTYPES[item.dtype])
        for item in package.manifest.nets[net].spec.inputs
    }


def decide(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Let this layout win whatever the clock says; the others are measured all the same."""
    real = cpu_tuning.choose_layout

    def chosen(*args: Any, **options: Any) -> Choice:
        choice = real(*args, **options)
        assert not choice.rejected
        return Choice(
            layout=layout, milliseconds=choice.milliseconds, relative_l2=choice.relative_l2, rejected={}
        )

    monkeypatch.setattr(cpu_tuning, "choose_layout", chosen)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with few pixels."""
    real = runs.measured_profile

    def profile(package: Package, net: str) -> Any:
        found = real(package, net)
        shapes = {
            name: tuple(
                tuple(
                    8 if place > 1 and len(shape) == 4 and shape[1] == 4 else size
                    for place, size in enumerate(shape)
                )
                for shape in three
            )
            for name, three in found.shapes.items()
        }
        return type(found)(**{**vars(found), "shapes": shapes})

    monkeypatch.setattr(runs, "measured_profile", profile)


@pytest.mark.parametrize("layout", ["fused", "winograd"])
def test_what_was_measured_is_opened(
    demo: Package, store: EngineStore, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    small(monkeypatch)
    decide(monkeypatch, layout)
    said = list[str]()
    tuned = tune_package(
        demo, store, lambda now: said.append(f"{now.net} {now.phase}"), nets=["unet"], rounds=1
    )
    assert [(item.net, item.entry.facts["layout"], bool(item.why)) for item in tuned] == [
        ("unet", layout, True)
    ]
    facts = tuned[0].entry.facts
    assert set(facts["milliseconds"]) == {"plain", "fused", "winograd"}
    assert set(facts["relative_l2"]) == {"fused", "winograd"}
    assert max(facts["relative_l2"].values()) < 1e-5
    assert {f"unet opening {layout}", "unet timing plain"} <= set(said)
    assert tune_package(demo, store, nets=["unet"], rounds=1)[0].why == ""
    found = lowered_graph(demo, "unet", onnxruntime.__version__)
    assert found is not None
    assert found.graph == tuned[0].entry.read()
    plain = OnnxRuntimeNet(demo, "unet")
    with ONNXRUNTIME.open_net(demo, "unet") as net:
        assert (net.memory.weights > plain.memory.weights) is (layout == "winograd")
        feeds = inputs_of(demo, "unet", 6, 7)
        assert far(net(**feeds)["prediction"], plain(**feeds)["prediction"]) < 1e-5
    with ONNXRUNTIME.open_net(demo, "vae_decoder") as net, OnnxRuntimeNet(demo, "vae_decoder") as other:
        assert net.memory.weights == other.memory.weights


def test_plain_may_be_the_fastest(demo: Package, store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    decide(monkeypatch, "plain")
    (tuned,) = tune_package(demo, store, nets=["vae_decoder"], rounds=1)
    monkeypatch.setattr(lowering_files, "find_spec", lambda name: None)
    (again,) = tune_package(demo, store, nets=["vae_decoder"], rounds=1)
    assert not again.why, "what is known needs no onnx-ir"
    assert tuned.entry.facts["layout"] == "plain"
    assert tuned.entry.read() == demo.path(demo.manifest.nets["vae_decoder"].graph).read_bytes()
    assert lowered_graph(demo, "vae_decoder", onnxruntime.__version__) is None


@pytest.mark.parametrize(("kind", "out"), [(np.float32, True), (np.uint8, False)])
def test_an_image_may_be_rounded_otherwise(kind: Any, out: bool) -> None:
    wanted = np.full(4096, 100, kind)
    found = wanted.copy()
    found[0] += 1  # 1.6e-4 of the whole

    def measure(name: str) -> Measured:
        return Measured(outputs={"y": wanted if name == "plain" else found}, run=lambda: 1.0, close=list)

    choice = choose_layout(measure, ["plain", "other"], rounds=1, parity=1e-4)
    assert bool(choice.rejected) is out


def remember(demo: Package, store: EngineStore, graph: bytes, facts: dict[str, Any]) -> Path:
    key = cpu_key(demo, "unet", onnxruntime.__version__)
    return store.get_or_build(key, lambda path: path.write_bytes(graph) and facts).path


WINOGRAD = {"layout": "winograd", "kernels": []}


@pytest.mark.parametrize(
    "facts",
    [{}, {"layout": "winograd"}, {"layout": "winograd", "kernels": [{"m": 4}]}, {"layout": "later"}],
)
def test_unknown_facts_are_plain(demo: Package, store: EngineStore, facts: dict[str, Any]) -> None:
    remember(demo, store, b"graph", facts)
    assert lowered_graph(demo, "unet", onnxruntime.__version__) is None


def test_a_miss_and_damage_are_plain(demo: Package, store: EngineStore) -> None:
    version = onnxruntime.__version__
    path = remember(demo, store, b"graph", WINOGRAD)
    assert lowered_graph(demo, "unet", version) == LoweredGraph(layout="winograd", graph=b"graph", kernels=())
    assert lowered_graph(demo, "unet", version, store) is not None
    assert lowered_graph(demo, "unet", "0.1") is None
    assert lowered_graph(demo, "text_encoder", version) is None
    (path / "engine.bin").write_bytes(b"grapH")
    assert lowered_graph(demo, "unet", version) is None
    with ONNXRUNTIME.open_net(demo, "unet") as net:
        assert net.spec == demo.manifest.nets["unet"].spec


@pytest.mark.parametrize("weight", ["", "no such weight"])
def test_a_graph_that_does_not_open_is_plain(demo: Package, store: EngineStore, weight: str) -> None:
    kernel = Kernel(name="k", weight=weight, m=4, left=True).to_json()
    remember(demo, store, b"no graph", {"layout": "winograd", "kernels": [kernel] if weight else []})
    with ONNXRUNTIME.open_net(demo, "unet") as net:
        assert net.spec == demo.manifest.nets["unet"].spec


def test_weights_that_are_not_there(demo: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = LoweredGraph(
        layout="winograd", graph=b"", kernels=(Kernel(name="k", weight="none", m=2, left=True),)
    )
    with pytest.raises(PackageError, match="no weights for the layout"):
        OnnxRuntimeNet(demo, "unet", lowered=graph)

    def full(*_: object) -> Any:
        raise MemoryError

    monkeypatch.setattr("latentrt.engines.onnxruntime.nets.kernels", full)
    with pytest.raises(MemoryLimitError, match="do not fit"):
        OnnxRuntimeNet(demo, "unet", lowered=graph)


@pytest.mark.parametrize("dtype", STORED)
def test_kernels_come_from_where_the_graph_says(package: Package, dtype: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(dtype)
    net = package.manifest.nets["unet"]
    package.path(net.weights[0]).write_bytes(bytes(20) + weight.tobytes())
    tensor = external(Path(net.weights[0]).name, 20, weight.nbytes)
    tensor.dims[:], tensor.data_type = weight.shape, helper.np_dtype_to_tensor_dtype(weight.dtype)
    write_graph(package.path(net.graph), tensor)
    for left, equation in ((True, "ia,jb,ocab->ijoc"), (False, "ia,jb,ocab->ijco")):
        ((_, found),) = kernels(package, "unet", [Kernel(name="k", weight="bias", m=4, left=left)])
        kernel = TILES[4].kernel
        wanted = np.einsum(equation, kernel, kernel, weight.astype(np.float64))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-5)


@pytest.mark.parametrize("layout", ["fused", "winograd"])
def test_nothing_to_lower(demo: Package, tmp_path: Path, layout: str) -> None:
    with pytest.raises(BackendError, match="nothing in float32"):
        lower_for_cpu(demo, "step", layout, tmp_path)


def test_a_net_without_a_choice(demo: Package, store: EngineStore) -> None:
    with pytest.raises(UsageError, match="'text_encoder' has no layouts"):
        tune_package(demo, store, nets=["text_encoder"])


def test_an_empty_store_costs_no_import(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from latentrt.engines.package import Package\n"
        "from latentrt.engines.onnxruntime.backend import ONNXRUNTIME\n"
        f"ONNXRUNTIME.open_net(Package.open(Path({str(DEMO)!r})), 'unet').close()\n"
        "late = {'filelock', 'onnx_ir', 'latentrt.engines.tensorrt.build', "
        "'latentrt.engines.store.engine_store'}\n"
        "sys.exit(f'imported {late & set(sys.modules)}' if late & set(sys.modules) else 0)"
    )
    environment = {"LATENTRT_CACHE": str(tmp_path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


def test_the_processor_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_layouts.processor().isprintable()
    monkeypatch.setattr(Path, "open", lambda *_, **__: open("/no/such/file"))  # noqa: SIM115
    monkeypatch.setattr("platform.processor", lambda: "")
    assert cpu_layouts.processor() == "unknown"
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert cpu_layouts.usable_processors() >= 1
