"""OpenVINO as a backend: what every backend promises, and every net against ONNX Runtime's."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from latentrt import Pipeline
from latentrt.engines.backend import HostBackend, choose_backend
from latentrt.engines.errors import (
    BackendError,
    MemoryLimitError,
    NumericError,
    PackageError,
    UsageError,
)
from latentrt.engines.graphs import given
from latentrt.engines.net_weights import part_shapes
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.package import Manifest, NetFile, Package, write_manifest
from latentrt.engines.processors import multiplies_bfloat16
from latentrt.engines.spec import NETS, NetSpec, TensorSpec
from latentrt.engines.spilled import spill
from latentrt.engines.tolerances import NET_RELATIVE_L2, QUANTISED_RELATIVE_L2, relative_l2
from latentrt.runtime.model import SHIPPED
from tests.engines.net_inputs import input_shapes, random_inputs
from tests.tiny_package import BIAS, add_graph

pytest.importorskip("openvino")

from latentrt.engines.openvino import backend, library, nets
from latentrt.engines.openvino.backend import OPENVINO, OPENVINO_BF16
from latentrt.engines.openvino.nets import MOST_SHAPES, OpenvinoNet

DEMO = Package.open(SHIPPED["demo"])
SIZES = {"P": 2, "B": 2, "N": 1, "S": 5, "T": 77, "H": 72, "W": 96, "H/8": 9, "W/8": 12}
MIB = 2**20


@pytest.fixture
def net(package: Package) -> Iterator[OpenvinoNet]:
    with OPENVINO.open_net(package, "unet", threads=1) as net:
        yield net


# ── what every backend promises ──────────────────────────────────────────────────────────────────────


def test_it_is_chosen_by_its_name_alone() -> None:
    assert isinstance(OPENVINO, HostBackend)
    name, backend = choose_backend("openvino")
    assert (name, backend) == ("openvino", OPENVINO)
    assert backend.describe().startswith("openvino 202")
    assert choose_backend("auto")[0] != "openvino"


def test_open_call_close(package: Package, net: OpenvinoNet) -> None:
    x = np.ones((3, 4), np.float32)
    assert net.spec == package.manifest.nets["unet"].spec
    np.testing.assert_array_equal(net(x=x)["y"], x + BIAS)
    assert net.memory.weights == BIAS.nbytes
    assert net.memory.io == 2 * x.nbytes
    net.close()
    net.close()
    with pytest.raises(BackendError, match="'unet' is closed"):
        net(x=x)


def test_outputs_stay_what_they_were(net: OpenvinoNet) -> None:
    """Also where inputs are views, or may not be written to."""
    first = net(x=np.zeros((2, 4), np.float32))["y"]
    turned = np.arange(8, dtype=np.float32).reshape(4, 2).T
    turned.flags.writeable = False
    np.testing.assert_array_equal(net(x=turned)["y"], turned + BIAS)
    np.testing.assert_array_equal(first, [BIAS] * 2)


@pytest.mark.parametrize("rows", [2, nets._SMALL], ids=["copied", "bound"])
def test_an_array_is_read_anew_in_every_call(net: OpenvinoNet, rows: int) -> None:
    """The same array with other values, another array, a view, and one that may not be written to."""
    turned = np.ones((4, rows), np.float32).T
    first = net(x=turned)["y"]
    np.testing.assert_array_equal(first, turned + BIAS)
    x = np.ones((rows, 4), np.float32)
    np.testing.assert_array_equal(net(x=x)["y"], first)
    x += 1
    second = net(x=x)["y"]
    np.testing.assert_array_equal(first + 1, second)
    third = net(x=np.full_like(x, 5))["y"]
    np.testing.assert_array_equal(third, second + 3)
    wide = np.zeros((rows, 8), np.float32)
    np.testing.assert_array_equal(net(x=wide[:, ::2])["y"], third - 5)
    wide += 7
    np.testing.assert_array_equal(net(x=wide[:, ::2])["y"], third + 2)
    wide.flags.writeable = False
    np.testing.assert_array_equal(net(x=wide[:, 4:])["y"], third + 2)
    np.testing.assert_array_equal(net(x=x)["y"], second)


def test_what_stays_is_bound_once(net: OpenvinoNet, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[str] = []
    real = nets._Request._bind

    def watched(self: Any, name: str, values: np.ndarray) -> None:
        before = self._bound.get(name)
        real(self, name, values)
        bound.extend([name] if self._bound[name] is not before else [])

    monkeypatch.setattr(nets._Request, "_bind", watched)
    large = np.ones((nets._SMALL, 4), np.float32)
    for _ in range(3):
        net(x=large)
    assert bound == ["x"]
    for _ in range(4):
        net(x=np.ones((3, 4), np.float32))
    assert bound == ["x"] * 3, "the second time in a row it is copied, and the copy stays bound"
    same = np.ones((5, 4), np.float32)
    for _ in range(3):
        net(x=same)
        net(x=same)
        same = np.ones((5, 4), np.float32)
    assert bound == ["x"] * 6, "what stays for two calls has no copy"
    for _ in range(3):
        net(x=large.copy())
    assert bound == ["x"] * 9, "large ones are never copied"


def test_threads_share_a_net(net: OpenvinoNet) -> None:
    """Their shapes are more than are kept."""
    inputs = [np.full((1 + i % (MOST_SHAPES + 2), 4), i, np.float32) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for x, outputs in zip(inputs, pool.map(lambda x: net(x=x), inputs), strict=True):
            np.testing.assert_array_equal(outputs["y"], x + BIAS)
    assert len(net.shapes) == MOST_SHAPES


@pytest.mark.parametrize("threads", [0, -1])
def test_too_few_threads(package: Package, threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads is {threads}; expected a whole number, at least 1"):
        OPENVINO.open_net(package, "unet", threads=threads)


@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_threads_are_those_of_a_cpu(device: str) -> None:
    settings = nets._settings(device, 3, "f32")
    assert settings.get("INFERENCE_NUM_THREADS") == (3 if device == "CPU" else None)
    assert settings["INFERENCE_PRECISION_HINT"] == "f32"


def test_what_is_compiled_computes_in_float32_with_the_threads_that_were_given(net: OpenvinoNet) -> None:
    net(x=np.ones((1, 4), np.float32))
    (compiled,) = (future.result()._compiled for future in net._compiled.values())
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_dtype() == np.float32
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_the_shapes_used_last_are_kept(net: OpenvinoNet, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    compile_net = OpenvinoNet._compile

    def counted(self: OpenvinoNet, key: Any) -> Any:
        compiled.append(key[0][0])
        return compile_net(self, key)

    monkeypatch.setattr(OpenvinoNet, "_compile", counted)
    for rows in (1, 2, 1, 3, 1, 4, 1, 5, 1, 2):
        net(x=np.ones((rows, 4), np.float32))
    assert compiled == [1, 2, 3, 4, 5, 2]
    assert [shapes["x"][0] for shapes in net.shapes] == [4, 5, 1, 2]
    assert net.memory.weights == MOST_SHAPES * BIAS.nbytes
    monkeypatch.setattr(nets, "available_bytes", lambda: 0)
    net(x=np.ones((6, 4), np.float32))
    assert net.shapes == ({"x": (6, 4)},), "where memory is short all others make way"


# ── every net ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", DEMO.manifest.nets)
def test_every_net_of_the_demo(name: str) -> None:
    spec = DEMO.manifest.nets[name].spec
    with OPENVINO.open_net(DEMO, name, threads=1) as net, ONNXRUNTIME.open_net(DEMO, name) as other:
        for seed, sizes in enumerate((SIZES, {**SIZES, "H/8": 4, "H": 32, "S": 1})):
            inputs = random_inputs(spec, input_shapes(spec, sizes), seed)
            found, wanted = net(**inputs), other(**inputs)
            assert list(found) == list(wanted)
            for key, values in wanted.items():
                assert found[key].dtype == values.dtype
                assert relative_l2(found[key], values) <= NET_RELATIVE_L2["fp32"], key


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("name", ["unet", "vae_decoder", "vae_encoder"])
def test_bfloat16_is_coarser_and_within_its_bar(name: str) -> None:
    spec = DEMO.manifest.nets[name].spec
    inputs = random_inputs(spec, input_shapes(spec, SIZES), 0)
    with OPENVINO.open_net(DEMO, name) as net, OPENVINO_BF16.open_net(DEMO, name) as coarse:
        wanted, found = net(**inputs), coarse(**inputs)
        (compiled,) = (future.result()._compiled for future in coarse._compiled.values())
    assert str(compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'bfloat16'>"
    first = spec.outputs[0].name
    assert 1e-4 < relative_l2(found[first], wanted[first]) <= QUANTISED_RELATIVE_L2["bf16"]
    assert OPENVINO_BF16.describe().endswith(", bf16)")


def test_what_runs_once_a_prompt_is_exact_all_the_same() -> None:
    for name in ("text_encoder", "unet_context", "unet_time"):
        with OPENVINO_BF16.open_net(DEMO, name) as net:
            assert net._settings["INFERENCE_PRECISION_HINT"] == "f32"


def test_bfloat16_where_the_processor_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "multiplies_bfloat16", lambda: False)
    with pytest.raises(BackendError, match="this processor does not multiply bfloat16"):
        choose_backend("openvino-bf16")
    with pytest.raises(BackendError, match="this processor does not multiply bfloat16"):
        OPENVINO_BF16.describe()
    monkeypatch.setattr(backend, "multiplies_bfloat16", lambda: True)
    assert choose_backend("openvino-bf16") == ("openvino-bf16", OPENVINO_BF16)


@pytest.mark.parametrize("name", ["text_encoder", "unet_context", "unet_time", "unet", "vae_decoder"])
def test_a_net_computes_with_what_it_was_given(name: str) -> None:
    """`test_changed_weights.py` compares ONNX Runtime's with graphs that have the weights in them."""

    def changed(weight: np.ndarray) -> np.ndarray:
        wide = weight.astype(np.float32)
        ramp = np.arange(wide.size, dtype=np.float32).reshape(wide.shape)
        return wide + np.float32(0.02) * ramp / wide.size

    part = NETS[name].part
    package = replace(DEMO, changes={part: dict.fromkeys(part_shapes(DEMO, part), changed)})
    spec = DEMO.manifest.nets[name].spec
    inputs = random_inputs(spec, input_shapes(spec, SIZES))
    wanted = ONNXRUNTIME.open_net(package, name, threads=1)(**inputs)
    found = OPENVINO.open_net(package, name, threads=1)(**inputs)
    plain = OPENVINO.open_net(DEMO, name, threads=1)(**inputs)
    for key, values in wanted.items():
        assert relative_l2(found[key], values) <= NET_RELATIVE_L2["fp32"], key
    assert any(relative_l2(plain[key], values) > 1e-2 for key, values in wanted.items())


@pytest.mark.parametrize("stored", ["float16", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_weights_in_every_type_that_is_read(tmp_path: Path, stored: str, dtype: str) -> None:
    weight = np.linspace(-2, 2, 12).reshape(3, 4)
    package, wanted = cast_package(tmp_path / "package", weight, stored, dtype)
    with OPENVINO.open_net(package, "unet", threads=1) as net:
        x = np.arange(3, dtype=wanted.dtype)[None]
        np.testing.assert_allclose(net(x=x)["y"], x @ wanted, rtol=1e-3)
        assert net.memory.weights == weight.size * wanted.itemsize


def cast_package(root: Path, weight: np.ndarray, stored: str, dtype: str) -> tuple[Package, np.ndarray]:
    """y = x @ w, with w stored in one type and cast to that of the arithmetic; and w as it is then."""
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, stored, None) or stored)
    compute = np.dtype({"fp32": "float32", "fp16": "float16"}[dtype])
    values = weight.astype(kind)
    number = helper.np_dtype_to_tensor_dtype(kind)
    tensor = TensorProto(name="w", data_type=number, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    # Not at a multiple of its size, as nothing in the format of safetensors forbids.
    place = {"location": "weights.safetensors", "offset": "3", "length": str(values.nbytes)}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    to = helper.np_dtype_to_tensor_dtype(compute)
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=to),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, to, ["B", size]) for name, size in (("x", 3), ("y", 4))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    (root / "unet").mkdir(parents=True)
    (root / "unet/loop.onnx").write_bytes(model.SerializeToString())
    (root / "unet/weights.safetensors").write_bytes(b"xyz" + values.tobytes())
    spec = NetSpec(
        inputs=(TensorSpec(name="x", dtype=compute.name, shape=("B", 3)),),
        outputs=(TensorSpec(name="y", dtype=compute.name, shape=("B", 4)),),
    )
    return write_net(root, spec, dtype), values.astype(compute)


def write_net(root: Path, spec: NetSpec, dtype: str = "fp32") -> Package:
    net = NetFile(graph="unet/loop.onnx", weights=("unet/weights.safetensors",), spec=spec)
    manifest = Manifest(
        name="tiny",
        family="sd1",
        dtype=dtype,
        latent_channels=4,
        context_width=8,
        scheduler={},
        nets={"unet": net},
    )
    return write_manifest(root, manifest)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells resident memory on Linux alone")
def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    """Besides the file's own pages: none while the net is open, one packed copy for each shape."""
    layers, width = 12, 1024
    size = layers * width * width * 4
    package = linear_package(tmp_path / "package", layers, width)
    code = f"""
import sys
from pathlib import Path
import numpy as np
from latentrt.engines.openvino.backend import OPENVINO
from latentrt.engines.package import Package

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

OPENVINO.describe()
package = Package.open(sys.argv[1])
begin = anonymous()
net = OPENVINO.open_net(package, "unet", threads=1)
print(anonymous() - begin)
for rows in (2, 3):
    net(x=np.ones((rows, {width}), np.float32))
    print(anonymous() - begin)
net.close()
print(anonymous() - begin)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(package.root)], capture_output=True, text=True, check=True
    )
    opened, one, two, closed = (int(line) / size for line in run.stdout.split())
    assert opened < 0.2
    assert 0.9 < one < 1.4
    assert 1.9 < two < 2.6
    assert closed < 0.3


def test_widened_weights_make_way_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    weight = np.linspace(-2, 2, 12).reshape(3, 4)
    x = np.ones((1, 3), np.float32)
    moved = list[bool]()

    def counted(arrays: dict[str, np.ndarray], folder: Path) -> None:
        spill(arrays, folder)
        moved.extend(isinstance(array, np.memmap) for array in arrays.values())

    monkeypatch.setattr(nets, "spill", counted)
    for available in (2**50, None, 0):
        assert moved == []
        monkeypatch.setattr(nets, "available_bytes", lambda available=available: available)
        package, wanted = cast_package(tmp_path / f"{available}", weight, "float16", "fp32")
        with OPENVINO.open_net(package, "unet", threads=1) as net:
            np.testing.assert_allclose(net(x=x)["y"], x @ wanted, rtol=1e-5)
    assert moved == [True]
    assert list((tmp_path / "cache").iterdir()) == [], "the file has no name"


def linear_package(root: Path, layers: int, width: int) -> Package:
    """x @ w0 @ w1 ..., each square and float32."""
    (root / "unet").mkdir(parents=True)
    random = np.random.default_rng(0)
    weights = {f"w{i}": random.standard_normal((width, width), np.float32) / 32 for i in range(layers)}
    save_file(weights, root / "unet/weights.safetensors")
    start = (root / "unet/weights.safetensors").stat().st_size - layers * width * width * 4
    tensors, nodes = [], []
    for i, name in enumerate(sorted(weights)):  # as safetensors orders tensors of one type
        place = {"location": "weights.safetensors", "offset": start + i * width * width * 4}
        tensors.append(TensorProto(name=name, data_type=1, dims=(width, width), data_location=1))
        for key, value in {**place, "length": width * width * 4}.items():
            tensors[-1].external_data.add(key=key, value=str(value))
        names = [f"h{i}" if i else "x", name, "y" if i == layers - 1 else f"h{i + 1}"]
        nodes.append(helper.make_node("MatMul", names[:2], names[2:]))
    ends = [helper.make_tensor_value_info(name, 1, ["B", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    (root / "unet/loop.onnx").write_bytes(model.SerializeToString())
    spec = NetSpec(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("B", width)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("B", width)),),
    )
    return write_net(root, spec)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"openvino is not installed.*pip install .*\[openvino\]"):
        choose_backend("openvino")
    with pytest.raises(BackendError, match="openvino is not installed"):
        OPENVINO.describe()


def test_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("libopenvino.so: cannot open shared object file")

    monkeypatch.setattr(library, "core", broken)
    with pytest.raises(BackendError, match=r"openvino is installed and broken: OSError.*--force-reinstall"):
        choose_backend("openvino")


def test_a_device_that_is_not_there() -> None:
    for device in ("GPU", "NPU", "GPU.1"):
        refused = OPENVINO.on(device).refusal()
        assert refused is not None
        assert f"openvino has no device {device}: there is CPU" in refused.found


def test_a_graph_it_refuses(package: Package) -> None:
    model = add_graph(onnx.numpy_helper.from_array(BIAS, "bias"))
    model.graph.node[0].op_type = "NoSuchOperator"
    (package.root / "unet/loop.onnx").write_bytes(model.SerializeToString())
    package = write_manifest(package.root, package.manifest)
    with pytest.raises(PackageError, match=r"openvino 20\S+ refuses .*loop\.onnx"):
        OPENVINO.open_net(package, "unet")


@pytest.mark.parametrize("end", ["input", "output"])
def test_a_graph_with_another_boundary(package: Package, end: str) -> None:
    model = add_graph(onnx.numpy_helper.from_array(BIAS, "bias"))
    if end == "input":
        model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    else:
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
        model.graph.output[0].name = model.graph.node[0].output[0] = "z"
    shutil.copy(package.root / "unet/loop.onnx", package.root / "unet/old.onnx")
    (package.root / "unet/loop.onnx").write_bytes(model.SerializeToString())
    package = write_manifest(package.root, package.manifest)
    with pytest.raises(PackageError, match=f"{end}s differ from the manifest"):
        OPENVINO.open_net(package, "unet")


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": np.ones((3, 5), np.float32)},
        {"x": np.ones((3, 4, 1), np.float32)},
        {"x": np.ones((3, 4), np.float64)},
        {"z": np.ones((3, 4), np.float32)},
        {},
    ],
)
def test_wrong_inputs(net: OpenvinoNet, inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(BackendError, match=r"the net 'unet' failed on .*Check the inputs"):
        net(**inputs)
    assert net.shapes == ()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("std::bad_alloc"), MemoryLimitError),
        (MemoryError(), MemoryLimitError),
        (RuntimeError("could not create a primitive"), BackendError),
    ],
)
def test_failures_of_compiling_and_running(
    net: OpenvinoNet, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error

    x = np.ones((2, 4), np.float32)
    with monkeypatch.context() as patched:
        patched.setattr(nets._Compiled, "run", fail)
        with pytest.raises(kind, match=r"'unet' .*with \{'x': \(2, 4\)\}") as failure:
            net(x=x)
    assert getattr(failure.value, "culprit", "unet") == "unet"
    with monkeypatch.context() as patched:
        patched.setattr(nets, "core", fail)
        with pytest.raises(kind, match=r"'unet' .*while it is compiled for \{'x': \(3, 4\)\}"):
            net(x=np.ones((3, 4), np.float32))
    assert net.shapes == ({"x": (2, 4)},)
    np.testing.assert_array_equal(net(x=x)["y"], x + BIAS)


def test_weights_that_do_not_fit(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Any:
        raise MemoryError

    monkeypatch.setattr(given, "weight_values", full)
    with pytest.raises(MemoryLimitError, match="the weights of 'unet' do not fit") as failure:
        OPENVINO.open_net(package, "unet")
    assert failure.value.culprit == "unet"


def test_weights_that_are_not_what_the_graph_says(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(given, "weight_values", lost)
    with pytest.raises(
        PackageError, match=r"loop\.onnx has no weights to give \(OSError: the disk is gone\)"
    ):
        OPENVINO.open_net(package, "unet")


def test_weights_inside_a_node(package: Package) -> None:
    """No input can take their place."""
    path = package.root / "unet/loop.onnx"
    model = onnx.load(path, load_external_data=False)
    constant = helper.make_node("Constant", [], ["bias"], value=model.graph.initializer[0])
    del model.graph.initializer[:]
    model.graph.node.insert(0, constant)
    path.write_bytes(model.SerializeToString())
    package = write_manifest(package.root, package.manifest)
    with pytest.raises(PackageError, match="the weight 'bias' is inside a node"):
        OPENVINO.open_net(package, "unet")


def test_adapters_beyond_fp16_and_adapters_that_fail() -> None:
    def beyond(weight: np.ndarray) -> np.ndarray:
        return np.full(weight.shape, 1e6, np.float32)

    def lost(weight: np.ndarray) -> np.ndarray:
        raise OSError("the disk is gone")

    for change, kind in ((beyond, NumericError), (lost, PackageError)):
        with pytest.raises(kind, match=r"conv_in\.bias reaches|the disk is gone"):
            OPENVINO.open_net(replace(DEMO, changes={"unet": {"conv_in.bias": change}}), "unet")


def test_a_start_without_it_does_not_import_it(tmp_path: Path) -> None:
    code = (
        "import sys; from latentrt.runtime import Pipeline\n"
        "with Pipeline.open('demo') as pipe: pipe('a red circle', num_inference_steps=1, seed=1)\n"
        "sys.exit('imported' if 'openvino' in sys.modules else 0)"
    )
    nothing_measured = {**os.environ, "LATENTRT_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=nothing_measured)


def test_shared_calls_have_few_numbers_of_rows() -> None:
    """Each is a compilation: three requests that end one after the other take four rows, two and one."""
    plain = {"prompt": "a red circle", "seed": 1, "guidance_scale": 1.0, "output_type": "np"}
    requests = [{**plain, "num_inference_steps": steps} for steps in (2, 3, 4)]
    with Pipeline.open("demo", backend="openvino") as pipe:
        assert pipe.row_sizes(8) == (1, 2, 4, 8)
        found = dict(pipe.stream_many(requests))
        compiled = cast(Any, pipe.loop).net("unet").shapes
        assert {shapes["latent"][0] for shapes in compiled} == {1, 2, 4}
        for number, request in enumerate(requests):
            images = cast(Any, found[number]).images
            assert np.abs(images.astype(int) - pipe(**request).images).max() <= 1
