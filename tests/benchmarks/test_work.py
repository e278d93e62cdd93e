"""FLOPs and bytes of the nets against published figures, torch's own counter, and sums one can do by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.benchmarks.roofline import Layer, Work, net_work
from latentrt.benchmarks.skeletons import FOLDER
from latentrt.engines.errors import BackendError, PackageError, UsageError
from latentrt.engines.package import Manifest, NetFile, Package
from latentrt.engines.spec import NetSpec
from latentrt.runtime.pipeline import SHIPPED

MAC = 2  # FLOP


def skeleton(name: str) -> Package:
    """Graphs without weights, which are not needed."""
    data = json.loads((FOLDER / name / "manifest.json").read_text(encoding="utf-8"))
    return Package(root=FOLDER / name, manifest=Manifest.from_json(data))


def by_kind(work: Work) -> dict[str, int]:
    """FLOPs of each kind that has any."""
    found: dict[str, int] = {}
    for layer in work.layers:
        if layer.flops:
            found[layer.kind] = found.get(layer.kind, 0) + layer.flops
    return found


def counts(work: Work) -> tuple[int, int]:
    """How many layers multiply matrices, and how many normalise."""
    norms = sum(layer.kind == "norm" for layer in work.layers)
    return len(work.layers) - norms, norms


def layer_bytes(work: Work) -> int:
    return sum(layer.bytes for layer in work.layers)


def latent(cells: int) -> dict[str, int]:
    return {"H/8": cells, "W/8": cells}


# ── the nets of Stable Diffusion ───────────────────────────────────────────────────────────────────

# Of torch 2.13's FlopCounterMode on diffusers' modules: GMAC; shares of linear layers, convolutions and
# attention; millions of parameters.
UNETS = [
    ("sd15-fp16", 64, 401.6, (0.29, 0.55, 0.16), 859.5),
    ("sd21-fp16", 64, 402.1, (0.32, 0.52, 0.16), 865.9),
    ("sd21-fp16", 96, 1074.6, (0.27, 0.44, 0.29), 865.9),
]


@pytest.mark.parametrize(("name", "cells", "gmac", "shares", "parameters"), UNETS)
def test_the_unet_has_the_published_work(
    name: str, cells: int, gmac: float, shares: tuple[float, ...], parameters: float
) -> None:
    work = net_work(skeleton(name), "unet_whole", {"B": 1, "T": 77, **latent(cells)})
    assert work.flops / MAC / 1e9 == pytest.approx(gmac, rel=1e-3)
    kinds = ("linear", "convolution", "attention")
    assert [by_kind(work)[kind] / work.flops for kind in kinds] == pytest.approx(shares, abs=0.005)
    assert counts(work) == (314, 109)
    assert work.parameters / 1e6 == pytest.approx(parameters, rel=1e-4)
    assert work.least_bytes == pytest.approx(2 * work.parameters, rel=1e-3)


@pytest.mark.parametrize(("cells", "gmac"), [(64, 1257), (96, 2877), (128, 5235)])
def test_the_decoder_has_the_published_work(cells: int, gmac: float) -> None:
    work = net_work(skeleton("sd15-fp16"), "vae_decoder", {"N": 1, **latent(cells)})
    assert work.flops / MAC / 1e9 == pytest.approx(gmac, rel=1e-3)
    assert 0.94 <= by_kind(work)["convolution"] / work.flops < 0.985
    assert counts(work) == (41, 30)
    assert work.parameters / 1e6 == pytest.approx(49.5, rel=1e-3)


TEXT_ENCODERS = [("sd15-fp16", 6.6, 0.013, 123.1, (84, 25)), ("sd21-fp16", 22.6, 0.045, 340.4, (161, 47))]


@pytest.mark.parametrize(("name", "gmac", "tflop", "parameters", "layers"), TEXT_ENCODERS)
def test_the_text_encoder_has_the_published_work(
    name: str, gmac: float, tflop: float, parameters: float, layers: tuple[int, int]
) -> None:
    work = net_work(skeleton(name), "text_encoder", {"P": 1})
    assert work.flops / MAC / 1e9 == pytest.approx(gmac, rel=0.01)
    assert work.flops / 1e12 == pytest.approx(tflop, abs=0.0005)
    assert by_kind(work)["linear"] / work.flops == pytest.approx(0.985, abs=0.005)
    assert work.parameters / 1e6 == pytest.approx(parameters, rel=1e-3)
    assert counts(work) == layers
    # of the table of 49,408 tokens only the rows that are looked up
    table = 49408 * (768 if name == "sd15-fp16" else 1024) * 2
    assert work.least_bytes == pytest.approx(2 * work.parameters - table, rel=0.002)


@pytest.mark.parametrize("name", ["sd15-fp16", "sd21-fp16"])
def test_what_leaves_the_loop_is_computed_before_it(name: str) -> None:
    package, rows = skeleton(name), 2
    whole, loop, context, time = (
        net_work(package, net, {"B": rows, "T": 77, "S": rows, **latent(64)})
        for net in ("unet_whole", "unet", "unet_context", "unet_time")
    )
    assert whole.flops - loop.flops == context.flops + time.flops
    assert whole.parameters == pytest.approx(loop.parameters + context.parameters + time.parameters, abs=100)
    assert counts(whole)[0] == sum(counts(net)[0] for net in (loop, context, time))


def test_attention_in_parts_has_the_bytes_of_the_operator() -> None:
    """SD 2.1's is MatMul and Softmax in float32, SD 1.5's the operator: as many layers, no scores stored."""
    size = {"B": 1, "T": 77, **latent(64)}
    apart, fused = (
        [layer for layer in net_work(skeleton(name), "unet", size).layers if layer.kind == "attention"]
        for name in ("sd21-fp16", "sd15-fp16")
    )
    assert len(apart) == len(fused) == 32
    assert [layer.flops for layer in apart] == [layer.flops for layer in fused]
    for one, other in zip(apart, fused, strict=True):
        assert other.bytes < one.bytes < 2 * other.bytes  # queries and keys are twice as wide


@pytest.mark.slow
def test_torch_counts_the_same() -> None:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    package, checkpoint = Package.open(SHIPPED["demo"]), SHIPPED["demo"].parent / "checkpoint"
    sizes = {"B": 2, "N": 2, "T": 77, "H/8": 16, "W/8": 24}
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(checkpoint / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(checkpoint / "vae"))
        rows = torch.randn(2, 4, 16, 24)
        with FlopCounterMode(display=False) as counter:
            unet(rows, torch.zeros(2), torch.randn(2, 77, package.manifest.context_width))
        assert net_work(package, "unet_whole", sizes).flops == counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            vae.decode(rows)
        assert net_work(package, "vae_decoder", sizes).flops == counter.get_total_flops()


# ── one operator at a time ─────────────────────────────────────────────────────────────────────────

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
Shape = tuple[int | str, ...]


def counted(
    tmp_path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Shape],
    output: str,
    *,
    kind: int = FLOAT,
    weights: dict[str, np.ndarray] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    **sizes: int,
) -> Work:
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(output, FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 23), *([helper.make_opsetid("own", 1)] if functions else [])]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions or [])
    (tmp_path / "one.onnx").write_bytes(model.SerializeToString())
    return net_work(package_of(tmp_path, "one.onnx"), "one", sizes)


def package_of(root: Path, graph: str) -> Package:
    net = NetFile(graph=graph, weights=None, spec=NetSpec(inputs=(), outputs=()))
    facts = {"name": "", "family": "", "dtype": "fp32", "latent_channels": 1, "context_width": 1}
    return Package(root=root, manifest=Manifest(**facts, scheduler={}, nets={"one": net}))  # pyright: ignore[reportArgumentType]


def test_a_grouped_convolution(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    weights = {"w": np.zeros((6, 2, 3, 3), np.float32), "b": np.zeros(6, np.float32)}
    work = counted(tmp_path, [node], {"x": ("N", 4, "H", "H")}, "y", weights=weights, N=5, H=8)
    flops = MAC * 5 * 6 * 4 * 4 * (2 * 3 * 3)
    size = 4 * (5 * 4 * 8 * 8 + 6 * 2 * 9 + 6 + 5 * 6 * 4 * 4)
    assert work.layers == (Layer(kind="convolution", flops=flops, bytes=size),)
    assert work.least_bytes == layer_bytes(work) == size


def test_a_gemm_with_a_turned_left_side(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)
    work = counted(tmp_path, [node], {"x": (7, "M")}, "y", weights={"w": np.zeros((7, 3), np.float32)}, M=11)
    assert by_kind(work) == {"linear": MAC * 7 * 11 * 3}


def test_attention(tmp_path: Path) -> None:
    """Packed heads and wider values; and scores that never meet values, which are written."""
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=2)
    inputs: dict[str, Shape] = {"q": (2, 5, 4 * 8), "k": (2, 9, 2 * 8), "v": (2, 9, 2 * 3)}
    work = counted(tmp_path, [node], inputs, "y")
    assert by_kind(work) == {"attention": MAC * 2 * 4 * 5 * 9 * (8 + 3)}
    assert layer_bytes(work) == work.least_bytes == 4 * 2 * (5 * 32 + 9 * 16 + 9 * 6 + 5 * 12)
    nodes = [helper.make_node("MatMul", ["q", "k"], ["s"]), helper.make_node("Softmax", ["s"], ["y"])]
    work = counted(tmp_path, nodes, {"q": (5, 8), "k": (8, 9)}, "y")
    assert work.layers == (Layer(kind="attention", flops=MAC * 5 * 8 * 9, bytes=4 * (5 * 8 + 8 * 9 + 5 * 9)),)


def test_a_weight_that_is_cast_is_read_wider_than_it_is_stored(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=FLOAT),
        helper.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["h"]),
        helper.make_node("MatMul", ["h", "wide"], ["y"]),
    ]
    work = counted(tmp_path, nodes, {"x": (2, 6)}, "y", weights={"w": np.zeros((4, 6), np.float16)})
    assert work.parameters == 24
    assert work.least_bytes == 24 * 4 + 4 * (2 * 6 + 2 * 6), "read as float32, stored as float16"


def test_a_function_of_the_model_is_counted(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    function = helper.make_function("own", "Twice", ["a", "b"], ["c"], body, [helper.make_opsetid("", 23)])
    node = helper.make_node("Twice", ["x", "w"], ["y"], domain="own")
    weights = {"w": np.zeros((6, 6), np.float32)}
    work = counted(tmp_path, [node], {"x": (2, 6)}, "y", weights=weights, functions=[function])
    assert work.flops == MAC * 2 * 6 * 6


def test_a_shape_that_is_computed_of_sizes(tmp_path: Path) -> None:
    """As the exporter writes half of a side: what onnx's own inference does not follow."""
    nodes = [
        helper.make_node("Shape", ["x"], ["side"], start=1, end=2),
        helper.make_node("Div", ["side", "two"], ["half"]),
        helper.make_node("Concat", ["half", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["h"]),
        helper.make_node("Shape", ["h"], ["known then"], start=0, end=1),
        helper.make_node("Concat", ["rest", "known then"], ["turned"], axis=0),
        helper.make_node("Reshape", ["h", "turned"], ["z"]),
        helper.make_node("MatMul", ["h", "z"], ["y"]),
    ]
    constants = {"two": np.array([2]), "rest": np.array([-1])}
    work = counted(tmp_path, nodes, {"x": (3, "W")}, "y", weights=constants, W=8)
    assert by_kind(work) == {"attention": MAC * 4 * 6 * 4}  # (4, 6) times (6, 4)
    assert work.parameters == 0


# ── what cannot be counted ─────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no size for 'W/8' .*besides those of B, H/8, T"):
        net_work(skeleton("sd15-fp16"), "unet", {"B": 1, "T": 77, "H/8": 8})
    with pytest.raises(PackageError, match=r"no\.onnx cannot be counted \(FileNotFoundError"):
        net_work(package_of(tmp_path, "no.onnx"), "one", {})
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(PackageError, match=r"bad\.onnx cannot be counted \(DecodeError"):
        net_work(package_of(tmp_path, "bad.onnx"), "one", {})
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    with pytest.raises(
        PackageError, match=r"InferenceError.*expected a graph of standard operators at sizes"
    ):
        counted(tmp_path, [node], {"x": (1, "K")}, "y", weights={"w": np.zeros((6, 6), np.float32)}, K=5)
    node = helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,jk->ik", name="product")
    with pytest.raises(PackageError, match=r"Einsum \(product\) is not counted"):
        counted(tmp_path, [node], {"x": (4, 4)}, "y")
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["numbers"], to=FLOAT),
        helper.make_node("MatMul", ["x", "numbers"], ["y"]),
    ]
    with pytest.raises(PackageError, match="'numbers' does not follow from the inputs'"):
        counted(tmp_path, nodes, {"x": (2, 2)}, "y")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match="Install it: pip install onnx"):
        net_work(skeleton("sd15-fp16"), "unet_time", {"S": 1})
