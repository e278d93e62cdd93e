"""Packages whose UNet is rounded: what is stored, what is computed, what is left out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from typer.testing import CliRunner

from latentrt import Pipeline
from latentrt.cli import app
from latentrt.engines.errors import AdapterError, BackendError, NumericError, UsageError
from latentrt.engines.net_weights import net_tensors, weight_values
from latentrt.engines.onnxruntime.backend import OnnxRuntimeBackend
from latentrt.engines.onnxruntime.lowering.files import read_graph
from latentrt.engines.onnxruntime.nets import OnnxRuntimeNet
from latentrt.engines.package import Manifest, Package
from latentrt.engines.spec import Array
from latentrt.engines.tolerances import decibels, relative_l2
from latentrt.export.quantised import rounding as rounding_module
from latentrt.export.quantised import write
from latentrt.export.quantised.formats import FORMATS, Format
from latentrt.export.quantised.inputs import PROMPTS, STEPS, UNSEEN, Drawn, drawn_pictures
from latentrt.export.quantised.places import Place, find_places
from latentrt.export.quantised.ranges import Inputs, Range, measure_ranges
from latentrt.export.quantised.rounding import fit_scale, plan_rounding, rounded_weight, smoothing_factors
from latentrt.export.quantised.write import Rounded, compare, quantise_package
from latentrt.runtime.model import SHIPPED

DEMO = Package.open(SHIPPED["demo"])
MATRIX = Place(name="y", operator="MatMul", data="x", weight="w", turns=((1, 0),))
KERNEL = Place(name="y", operator="Conv", data="x", weight="w", turns=())
UNETS = ("unet", "unet_whole", "unet_controlled", "unet_image_prompt")


@pytest.fixture(scope="module")
def pictures() -> tuple[Drawn, ...]:
    return drawn_pictures(DEMO)


@pytest.fixture(scope="module")
def calls(pictures: tuple[Drawn, ...]) -> list[Inputs]:
    return [call for picture in pictures for call in picture.calls]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rounded]:
    folder = tmp_path_factory.mktemp("rounded")
    return {name: quantise_package(DEMO, folder / name, format=name) for name in FORMATS}


# ── numbers ────────────────────────────────────────────────────────────────────────────────────────────


def scaled_back(format_: Format, place: Place, weight: Array) -> Array:
    """What ONNX Runtime's DequantizeLinear makes of what is stored."""
    values, scale = rounded_weight(format_, place, weight)
    stored = bytes(format_.narrowed(values))
    kind = getattr(TensorProto, format_.onnx)
    narrow = helper.make_tensor("w", kind, weight.shape, stored, raw=True)
    axes: dict[str, int] = {}
    if format_.block:
        axes = {"axis": place.input_axis, "block_size": format_.block}
    elif scale.ndim:
        axes = {"axis": place.output_axis}
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], **axes)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, weight.shape)
    graph = helper.make_graph([node], "g", [], [out], [narrow, numpy_helper.from_array(scale, "s")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


@pytest.mark.parametrize("place", [MATRIX, KERNEL], ids=["matrix", "kernel"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_comes_back_within_half_a_step(name: str, place: Place) -> None:
    format_ = FORMATS[name]
    if place.operator not in format_.operators:
        pytest.skip("weights of matrices alone")
    shape = (96, 128) if place.operator == "MatMul" else (32, 64, 3, 3)
    random = np.random.default_rng(0)
    weight = random.standard_normal(shape, np.float32) * np.exp(
        random.standard_normal((shape[0], *[1] * (len(shape) - 1)))
    )
    weight = weight.astype(np.float32)
    found = scaled_back(format_, place, weight)
    if name == "fp8":  # three bits behind the point, and nothing below 2^-9 of the scale
        step = np.maximum(np.abs(weight) / 8, np.abs(weight).max() / 448 / 2**9)
    elif name == "int4":
        blocks = np.abs(weight).reshape(shape[0], -1, 64).max(axis=2) / 7
        step = np.repeat(blocks, 64, axis=1)
    else:
        step = (np.abs(weight).reshape(shape[0], -1).max(axis=1) / 127).reshape(-1, *[1] * (len(shape) - 1))
    assert (np.abs(found - weight) <= 0.5001 * step).all()
    assert relative_l2(found, weight) < {"int8": 0.01, "fp8": 0.03, "int4": 0.12}[name]


def test_weights_of_zeros_stay_zeros() -> None:
    for name in ("int8", "fp8"):
        np.testing.assert_array_equal(scaled_back(FORMATS[name], MATRIX, np.zeros((64, 64), np.float32)), 0)


def test_axes_are_those_of_the_stored_weight() -> None:
    assert (MATRIX.output_axis, MATRIX.input_axis) == (0, 1)
    assert (KERNEL.output_axis, KERNEL.input_axis) == (0, 1)
    plain = replace(MATRIX, turns=())
    assert (plain.output_axis, plain.input_axis) == (1, 0)
    assert replace(MATRIX, turns=((1, 0), (1, 0))).output_axis == 1


# ── what is rounded ────────────────────────────────────────────────────────────────────────────────────


def ranges_of(data: Array) -> dict[str, Range]:
    peaks = np.abs(data).max(axis=0)
    return {"x": Range(peak=float(peaks.max()), sample=data, channels=peaks)}


def test_channels_that_reach_far_go_into_the_weights() -> None:
    """SmoothQuant's case: a few channels of normalised data are a hundred times as large as the others."""
    random = np.random.default_rng(0)
    data = random.standard_normal((512, 128)).astype(np.float32)
    data[:, :2] *= 100
    weight = random.standard_normal((64, 128)).astype(np.float32)
    weight[:, :2] /= 100
    ranges, weights = ranges_of(data), {"w": weight}
    smooth = plan_rounding(FORMATS["int8"], [MATRIX], ranges, weights, {"x": 1})
    assert smooth.places == (MATRIX,)
    factor = smooth.divided["x"]
    np.testing.assert_allclose((data / factor) @ (weight * factor).T, data @ weight.T, rtol=1e-3, atol=1e-3)
    scale = smooth.data["x"]
    found = np.rint(data / factor / scale) * scale @ (weight * factor).T
    assert relative_l2(found, data @ weight.T) < 0.03
    rough = plan_rounding(FORMATS["int8"], [MATRIX], ranges, weights, {})
    plain = rough.data["x"]
    assert 0.3 * ranges["x"].peak / 127 <= plain <= ranges["x"].peak / 127
    assert relative_l2(np.rint(data / plain) * plain @ weight.T, data @ weight.T) > 0.2
    assert plan_rounding(FORMATS["int8"], [MATRIX], ranges, weights, {"x": 2}).divided == {}, "others read it"


def test_factors_are_those_of_the_paper() -> None:
    reach, weight = np.array([4.0, 1.0, 0.25], np.float32), np.array([1.0, 1.0, 1.0], np.float32)
    np.testing.assert_allclose(smoothing_factors(reach, [weight], 0.5), [2.0, 1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(smoothing_factors(reach, [weight], 0.0), [1.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize(("kind", "clip"), [("normal", 3.92), ("laplace", 9.89)])
def test_data_are_cut_off_where_the_error_is_least(
    kind: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Banner et al. 2019 (arXiv 1810.05723) have 3.92 sigma and 9.89 b for eight bits and squared errors."""
    data = getattr(np.random.default_rng(0), kind)(size=(400_000, 1)).astype(np.float32)
    further = fit_scale(FORMATS["int8"], 2 * clip, data)
    assert fit_scale(FORMATS["fp8"], 448.0, data) == 1.0, "floats are not cut off"
    monkeypatch.setattr(rounding_module, "_POWER", 2)
    scale = fit_scale(FORMATS["int8"], 2 * clip, data)
    assert scale * 127 == pytest.approx(clip, rel=0.1)
    assert scale <= further < 2 * clip / 127, "cubes count what is cut off more"
    rounded, plain = (np.clip(np.rint(data / one), -127, 127) * one for one in (scale, 2 * clip / 127))
    assert relative_l2(rounded, data) < 0.8 * relative_l2(plain, data)


def test_data_that_reach_everywhere_alike_are_not_cut_off() -> None:
    data = np.random.default_rng(0).uniform(-1, 1, (10_000, 1)).astype(np.float32)
    assert fit_scale(FORMATS["int8"], 1.0, data) == pytest.approx(1 / 127)
    assert fit_scale(FORMATS["int8"], 0.0, np.zeros((4, 1), np.float32)) > 0


def test_ranges_are_those_of_the_tensors(calls: list[Inputs]) -> None:
    model = read_graph(DEMO, "unet")
    places = find_places(model)
    found = measure_ranges(DEMO, "unet", places[:3], calls[:2])
    bare = onnx.load(DEMO.path(DEMO.manifest.nets["unet"].graph), load_external_data=False)
    onnx.load_external_data_for_model(bare, str(DEMO.weights_folder("unet")))
    names = list(found)
    bare.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(bare.SerializeToString(), providers=["CPUExecutionProvider"])
    seen = [session.run(names, dict(feeds)) for feeds in calls[:2]]
    for name, *arrays in zip(names, *seen, strict=True):
        both = np.stack(arrays)
        assert found[name].peak == pytest.approx(np.abs(both).max(), rel=1e-5)
        rms = float(np.sqrt(np.mean(found[name].sample ** 2)))
        assert rms == pytest.approx(np.sqrt(np.mean(both**2)), rel=0.05), "sampled evenly"
        if found[name].channels is not None:
            wanted = np.abs(both).max(axis=tuple(range(both.ndim - 1)))
            np.testing.assert_allclose(found[name].channels, wanted, rtol=1e-5)


def test_an_input_that_is_not_the_nets_is_named(calls: list[Inputs]) -> None:
    places = find_places(read_graph(DEMO, "unet"))[:1]
    with pytest.raises(BackendError, match="latent"):
        measure_ranges(DEMO, "unet", places, [{**calls[0], "latent": np.zeros((2, 5, 16, 16), np.float32)}])


# ── packages ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FORMATS)
def test_the_unet_is_within_its_bars_and_smaller(name: str, rounded: dict[str, Rounded]) -> None:
    made = rounded[name]
    assert made.relative_l2 <= FORMATS[name].bar
    assert made.picture_db >= FORMATS[name].picture_bar
    found = compare(DEMO, made.package)
    assert (made.relative_l2, made.picture_db) == pytest.approx(found)
    assert made.relative_l2 > 1e-3, "it is rounded"
    assert made.picture_db < 60, "it is rounded"
    facts = made.package.manifest.quantised
    assert facts["picture_db"] == pytest.approx(made.picture_db, rel=1e-2)
    assert facts["format"] == name
    assert facts["capability"] == FORMATS[name].capability
    assert len(facts["rounded"]) + len(facts["left_out"]) == len(
        find_places(read_graph(DEMO, "unet"), FORMATS[name].operators)
    )
    assert len(facts["rounded"]) > len(facts["left_out"])
    size = made.package.manifest.files["unet/weights.safetensors"].size
    assert size < DEMO.manifest.files["unet/weights.safetensors"].size
    made.package.verify()
    made.package.check_weights()


def test_rounding_is_as_good_as_onnxruntimes_own(
    rounded: dict[str, Rounded], calls: list[Inputs], tmp_path: Path
) -> None:
    """The same products by `onnxruntime.quantization`, with its own calibration on the same calls."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._calls = iter(calls[:-unseen])

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self._calls, None)

    made, unseen = rounded["int8"], len(UNSEEN) * STEPS
    bare = onnx.load(DEMO.path(DEMO.manifest.nets["unet"].graph), load_external_data=False)
    onnx.load_external_data_for_model(bare, str(DEMO.weights_folder("unet")))
    nodes = {node.output[0]: node.name for node in bare.graph.node}
    onnx.save(bare, tmp_path / "plain.onnx")
    folded = onnxruntime.SessionOptions()
    folded.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    folded.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "plain.onnx"), folded, providers=["CPUExecutionProvider"])
    quantize_static(
        tmp_path / "folded.onnx",
        tmp_path / "theirs.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QInt8,
        nodes_to_quantize=[nodes[place.name] for place in made.rounding.places],
        extra_options={"ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul"]},
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    theirs = onnxruntime.InferenceSession(
        str(tmp_path / "theirs.onnx"), options, providers=["CPUExecutionProvider"]
    )
    found = np.stack([theirs.run(None, dict(feeds))[0] for feeds in calls[-unseen:]])
    wanted = np.stack([OnnxRuntimeNet(DEMO, "unet")(**feeds)["prediction"] for feeds in calls[-unseen:]])
    assert made.relative_l2 <= 1.05 * relative_l2(found, wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_stored_weights_are_the_models_own(name: str, rounded: dict[str, Rounded]) -> None:
    made = rounded[name]
    stored, folder = net_tensors(DEMO, "unet"), DEMO.weights_folder("unet")
    narrow = {place.weight: place for place in made.rounding.places}
    with safe_open(made.package.path("unet/weights.safetensors"), "np") as file:
        for tensor in set(stored) - set(narrow):
            np.testing.assert_array_equal(file.get_tensor(tensor), weight_values(stored[tensor], folder))
        if name == "int8":
            for tensor, place in narrow.items():
                weight = weight_values(stored[tensor], folder).astype(np.float32)
                if place.data in made.rounding.divided:
                    continue
                scale = np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127
                back = file.get_tensor(tensor) * scale.reshape(-1, *[1] * (weight.ndim - 1))
                np.testing.assert_allclose(back, weight, atol=0.5001 * scale.max())


@pytest.mark.parametrize("name", FORMATS)
def test_every_graph_of_the_unet_is_rounded_alike(
    name: str, rounded: dict[str, Rounded], calls: list[Inputs]
) -> None:
    """Without controls, the graphs that take them predict what the plain one does; so does the uncut one."""
    package, feeds = rounded[name].package, dict(calls[3])
    with OnnxRuntimeNet(package, "unet") as unet:
        wanted = unet(**feeds)["prediction"]
    for net in ("unet_controlled", "unet_image_prompt"):
        spec = package.manifest.nets[net].spec
        symbols = {"B": 2, "H/8": 16, "W/8": 16}
        more = {
            item.name: np.zeros(
                [one if isinstance(one, int) else _size(one, symbols) for one in item.shape], np.float32
            )
            for item in spec.inputs
            if item.name not in feeds
        }
        with OnnxRuntimeNet(package, net) as unet:
            found = unet(**feeds, **more)["prediction"]
        assert relative_l2(found, wanted) < 2e-3, net


def _size(symbol: str, sizes: Mapping[str, int]) -> int:
    if symbol in sizes:
        return sizes[symbol]
    _, _, part = symbol.partition("/")
    return -(-16 * 8 // int(part)) if part else 1


@pytest.mark.parametrize(("name", "least"), [("int8", 28), ("fp8", 28), ("int4", 26)])
def test_pictures_are_alike(name: str, least: float, rounded: dict[str, Rounded]) -> None:
    pictures = []
    for root in (DEMO.root, rounded[name].package.root):
        with Pipeline.open(root, backend="onnxruntime") as pipe:
            made = pipe("a red circle on a blue background", seed=3, output_type="np")
            pictures.append(made.images[0].astype(np.float64))
    error = np.sqrt(np.mean((pictures[0] - pictures[1]) ** 2))
    assert least < 20 * np.log10(255 / error) < 60, "alike, and not the same"


# ── refusals ───────────────────────────────────────────────────────────────────────────────────────────


def test_no_adapter_changes_a_rounded_unet(rounded: dict[str, Rounded]) -> None:
    with Pipeline.open(rounded["int8"].package.root, backend="onnxruntime") as pipe:
        with pytest.raises(AdapterError, match="is in int8, which no adapter changes") as raised:
            pipe.load_lora_weights(sorted((SHIPPED["demo"].parent / "adapters").glob("*.safetensors"))[0])
        assert "--lora FILE" in raised.value.fix


def test_what_cannot_be_rounded(rounded: dict[str, Rounded], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the format is 'int2'"):
        quantise_package(DEMO, tmp_path / "out", format="int2")
    with pytest.raises(UsageError, match="is in int8 already"):
        quantise_package(rounded["int8"].package, tmp_path / "out", format="fp8")
    nets = {name: net for name, net in DEMO.manifest.nets.items() if not name.startswith("unet")}
    bare = replace(DEMO, manifest=replace(DEMO.manifest, nets=nets))
    with pytest.raises(UsageError, match="has no UNet"):
        quantise_package(bare, tmp_path / "out", format="fp8")
    elsewhere = replace(DEMO, elsewhere={"unet/weights.safetensors": DEMO})
    with pytest.raises(UsageError, match="is a checkpoint"):
        quantise_package(elsewhere, tmp_path / "out", format="fp8")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(UsageError, match="exists and is no package"):
        quantise_package(DEMO, tmp_path / "there", format="fp8")


@pytest.mark.parametrize("bars", [{"bar": 1e-3}, {"picture_bar": 60.0}], ids=["net", "picture"])
def test_what_is_too_far_off_is_not_offered(
    bars: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "FORMATS", {"int8": replace(FORMATS["int8"], **bars)})
    with pytest.raises(NumericError, match=r"the UNet in int8 is .* from what it was"):
        quantise_package(DEMO, tmp_path / "out", format="int8")
    assert list(tmp_path.iterdir()) == [], "nothing is left of it"


def test_pictures_are_drawn_with_who_answers(
    pictures: tuple[Drawn, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole pipeline draws the same, and another answer is another picture, for which no UNet opens."""
    with Pipeline.open("demo", backend="onnxruntime") as pipe:
        made = pipe(PROMPTS[-1], seed=len(PROMPTS) - 1, num_inference_steps=6, output_type="np")
    np.testing.assert_array_equal(made.images, pictures[-1].image)
    opened: list[str] = []
    real = OnnxRuntimeBackend.open_net

    def watched(self: Any, package: Package, name: str, **options: Any) -> Any:
        opened.append(name)
        return real(self, package, name, **options)

    monkeypatch.setattr(OnnxRuntimeBackend, "open_net", watched)
    (grey,) = drawn_pictures(DEMO, PROMPTS[-1:], predict=lambda feeds: np.zeros_like(feeds["latent"]))
    assert decibels(grey.image, pictures[-1].image) < 20
    assert sorted(opened) == ["text_encoder", "unet_context", "unet_time", "vae_decoder"]


def test_decibels_of_one_shade() -> None:
    """Published: all pixels off by one shade are 48.13 dB."""
    grey = np.full((1, 8, 8, 3), 100, np.uint8)
    assert decibels(grey + 1, grey) == pytest.approx(48.1308, abs=1e-4)
    assert decibels(grey, grey) == float("inf")


def test_a_manifest_says_so_and_older_ones_do_not(rounded: dict[str, Rounded]) -> None:
    data = rounded["fp8"].package.manifest.to_json()
    assert Manifest.from_json(json.loads(json.dumps(data))).quantised["format"] == "fp8"
    assert "quantised" not in DEMO.manifest.to_json()
    with pytest.raises(ValueError, match="quantised is out of range"):
        Manifest.from_json({**data, "quantised": {"bits": 8}})


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    done = CliRunner().invoke(app, ["quantise", "demo", "-o", str(out), "--to", "fp8", "--json"])
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["format"] == "fp8"
    assert told["relative_l2"] < FORMATS["fp8"].bar
    done = CliRunner().invoke(app, ["quantise", "demo", "-o", str(out), "--to", "int4", "--overwrite"])
    assert done.exit_code == 0
    assert "products of the UNet in int4" in done.stdout
    done = CliRunner().invoke(app, ["inspect", str(out)])
    assert "quantised: the UNet in int4" in done.stdout
    done = CliRunner().invoke(app, ["quantise", "demo", "-o", str(out)])
    assert "is a package already" in str(done.exception)


@pytest.mark.parametrize(
    "name",
    ["fp8", pytest.param("int8", marks=pytest.mark.slow), pytest.param("int4", marks=pytest.mark.slow)],
)
def test_tensorrt_rtx_builds_it(name: str, rounded: dict[str, Rounded], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    words = ["--backend", "tensorrt-rtx", "--nets", "unet", "--profile", "64x64:b1"]
    words += ["--store", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, ["build", str(rounded[name].package.root), *words])
    assert done.exit_code == 0, done.output
