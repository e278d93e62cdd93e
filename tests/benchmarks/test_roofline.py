"""Work and floors against published figures, torch's own counter, and answers one can work out by hand."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.benchmarks.case import WORKLOADS, Case
from latentrt.benchmarks.records import Row
from latentrt.benchmarks.roofline import COPY, GEMM, Work, floor_s, net_work, with_roofline, workload_parts
from latentrt.benchmarks.sides.contract import CEILING
from latentrt.benchmarks.skeletons import FOLDER
from latentrt.engines.errors import BackendError, PackageError, UsageError
from latentrt.engines.package import Manifest, NetFile, Package
from latentrt.engines.spec import NetSpec
from latentrt.runtime.model import SHIPPED

MAC = 2  # FLOP
GUIDED = Case(width=512, height=512, guidance_scale=7.5)


def skeleton(name: str) -> Package:
    """Graphs without weights, which are not needed."""
    data = json.loads((FOLDER / name / "manifest.json").read_text(encoding="utf-8"))
    return Package(root=FOLDER / name, manifest=Manifest.from_json(data))


SD15 = skeleton("sd15-fp16")


def latent(cells: int) -> dict[str, int]:
    return {"H/8": cells, "W/8": cells}


# ── the nets of Stable Diffusion: torch 2.13's FlopCounterMode on diffusers' modules, and their parameters ──


@pytest.mark.parametrize(
    ("name", "net", "cells", "gmac", "parameters"),
    [
        ("sd15-fp16", "unet_whole", 64, 401.6, 859.5),
        ("sd21-fp16", "unet_whole", 64, 402.1, 865.9),
        ("sd21-fp16", "unet_whole", 96, 1074.6, 865.9),
        ("sd15-fp16", "vae_decoder", 64, 1257, 49.5),
        ("sd15-fp16", "vae_decoder", 96, 2877, 49.5),
        ("sd15-fp16", "vae_decoder", 128, 5235, 49.5),
        # of the table of 49,408 tokens only the rows that are looked up
        ("sd15-fp16", "text_encoder", 0, 6.6, 123.1 - 49408 * 768e-6),
        ("sd21-fp16", "text_encoder", 0, 22.6, 340.4 - 49408 * 1024e-6),
    ],
)
def test_the_published_work(name: str, net: str, cells: int, gmac: float, parameters: float) -> None:
    work = net_work(skeleton(name), net, {"B": 1, "N": 1, "P": 1, "T": 77, **latent(cells)})
    flops_within, bytes_within = (0.01, 0.002) if net == "text_encoder" else (1e-3, 1e-3)
    assert work.flops / MAC / 1e9 == pytest.approx(gmac, rel=flops_within)
    pixels = cells**2 * (64 * 3 + 4 * 2) if net == "vae_decoder" else 0  # uint8 out, fp16 in
    assert (work.least_bytes - pixels) / 2e6 == pytest.approx(parameters, rel=bytes_within)


@pytest.mark.parametrize("name", ["sd15-fp16", "sd21-fp16"])
def test_what_leaves_the_loop_is_computed_before_it(name: str) -> None:
    package, rows = skeleton(name), 2
    whole, loop, context, time = (
        net_work(package, net, {"B": rows, "T": 77, "S": rows, **latent(64)})
        for net in ("unet_whole", "unet", "unet_context", "unet_time")
    )
    assert whole.flops - loop.flops == context.flops + time.flops


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

FLOAT = TensorProto.FLOAT
Inputs = dict[str, tuple[int | str, ...]]


def counted(
    tmp_path: Path, nodes: list[Any], inputs: Inputs, weights: Any = None, functions: Any = (), **sizes: int
) -> Work:
    """The work of a graph whose output is `y`."""
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions)
    (tmp_path / "one.onnx").write_bytes(model.SerializeToString())
    return net_work(package_of(tmp_path, "one.onnx"), "one", sizes)


def package_of(root: Path, graph: str) -> Package:
    net = NetFile(graph=graph, weights=(), spec=NetSpec(inputs=(), outputs=()))
    facts = {"name": "", "family": "", "dtype": "fp32", "latent_channels": 1, "context_width": 1}
    return Package(root=root, manifest=Manifest(**facts, scheduler={}, nets={"one": net}))  # pyright: ignore[reportArgumentType]


def test_a_grouped_convolution(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    weights = {"w": np.zeros((6, 2, 3, 3), np.float32), "b": np.zeros(6, np.float32)}
    work = counted(tmp_path, [node], {"x": ("N", 4, "H", "H")}, weights=weights, N=5, H=8)
    flops = MAC * 5 * 6 * 4 * 4 * (2 * 3 * 3)
    size = 4 * (5 * 4 * 8 * 8 + 6 * 2 * 9 + 6 + 5 * 6 * 4 * 4)
    assert work == Work(flops=flops, least_bytes=size)


def test_a_gemm_with_a_turned_left_side(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)
    work = counted(tmp_path, [node], {"x": (7, "M")}, weights={"w": np.zeros((7, 3), np.float32)}, M=11)
    assert work.flops == MAC * 7 * 11 * 3


def test_attention(tmp_path: Path) -> None:
    """Packed heads and wider values."""
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=2)
    inputs: Inputs = {"q": (2, 5, 4 * 8), "k": (2, 9, 2 * 8), "v": (2, 9, 2 * 3)}
    work = counted(tmp_path, [node], inputs)
    assert work.flops == MAC * 2 * 4 * 5 * 9 * (8 + 3)
    assert work.least_bytes == 4 * 2 * (5 * 32 + 9 * 16 + 9 * 6 + 5 * 12)


def test_a_weight_that_is_cast_is_read_wider_than_it_is_stored(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=FLOAT),
        helper.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["h"]),
        helper.make_node("MatMul", ["h", "wide"], ["y"]),
    ]
    work = counted(tmp_path, nodes, {"x": (2, 6)}, weights={"w": np.zeros((4, 6), np.float16)})
    assert work.least_bytes == 24 * 4 + 4 * (2 * 6 + 2 * 6), "read as float32, stored as float16"


def test_a_function_of_the_model_is_counted(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    function = helper.make_function("own", "Twice", ["a", "b"], ["c"], body, [helper.make_opsetid("", 23)])
    node = helper.make_node("Twice", ["x", "w"], ["y"], domain="own")
    weights = {"w": np.zeros((6, 6), np.float32)}
    work = counted(tmp_path, [node], {"x": (2, 6)}, weights=weights, functions=[function])
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
    work = counted(tmp_path, nodes, {"x": (3, "W")}, weights=constants, W=8)
    assert work.flops == MAC * 4 * 6 * 4  # (4, 6) times (6, 4)


def test_what_cannot_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no size for 'W/8' .*besides those of B, H/8, T"):
        net_work(SD15, "unet", {"B": 1, "T": 77, "H/8": 8})
    with pytest.raises(PackageError, match=r"no\.onnx is missing"):
        net_work(package_of(tmp_path, "no.onnx"), "one", {})
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(PackageError, match=r"bad\.onnx cannot be counted \(DecodeError"):
        net_work(package_of(tmp_path, "bad.onnx"), "one", {})
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    with pytest.raises(
        PackageError, match=r"InferenceError.*expected a graph of standard operators at sizes"
    ):
        counted(tmp_path, [node], {"x": (1, "K")}, weights={"w": np.zeros((6, 6), np.float32)}, K=5)
    node = helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,jk->ik", name="product")
    with pytest.raises(PackageError, match=r"Einsum \(product\) is not counted"):
        counted(tmp_path, [node], {"x": (4, 4)})
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Cast", ["places"], ["numbers"], to=FLOAT),
        helper.make_node("MatMul", ["x", "numbers"], ["y"]),
    ]
    with pytest.raises(PackageError, match="'numbers' does not follow from the inputs'"):
        counted(tmp_path, nodes, {"x": (2, 2)})
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"onnx cannot be imported .*\[bench\]"):
        net_work(SD15, "unet_time", {"S": 1})


# ── floors ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_is_the_sum_of_its_nets() -> None:
    case = replace(GUIDED, pictures=2, steps=10)
    text, context, time, unet, decoder = workload_parts(SD15, "picture", case)
    assert [text] == workload_parts(SD15, "text_encoder", case)
    assert [decoder] == workload_parts(SD15, "vae_decoder", case)
    assert [(1, unet[1])] == workload_parts(SD15, "unet", case)
    assert unet[0] == 10
    (_, every_row), alone = workload_parts(SD15, "invariants", case)
    assert time == alone
    assert context[1].flops * 2 == every_row.flops  # texts are encoded once, the workload has every row


# Milliseconds on an H200: all FLOPs at the best rate.
@pytest.mark.parametrize(("steps", "milliseconds"), [(20, 43.9), (50, 104.9)])
def test_a_whole_picture_has_the_published_floor(steps: int, milliseconds: float) -> None:
    parts = workload_parts(SD15, "picture", replace(GUIDED, steps=steps))
    found = floor_s(parts, flop_per_s=790e12, byte_per_s=math.inf)  # the measured rate behind the table
    assert found * 1e3 == pytest.approx(milliseconds, rel=0.005)
    assert workload_parts(SD15, "picture", replace(GUIDED, steps=10, sampler="heun"))[3][0] == 19
    assert [name for name in (*WORKLOADS, GEMM) if not workload_parts(SD15, name, GUIDED)] == ["update", GEMM]


def row(side: str, workload: str, *rounds: tuple[float, ...], **figures: float) -> Row:
    return Row(side=side, workload=workload, rounds=rounds, figures=figures)


# The first is bound by compute, the second by bytes.
PARTS = [(2, Work(flops=600, least_bytes=10)), (1, Work(flops=10, least_bytes=80))]


def rooflines(*rows: Row) -> list[dict[str, Any]]:
    return [dict(found.figures) for found in with_roofline(rows, PARTS)]


def test_a_row_at_half_the_rate_of_the_best_matmul() -> None:
    ours = row("latentrt", "unet", (24.2, 24.2), (24.2,), during=3)
    found, gemm, copy = rooflines(
        ours, row(CEILING, GEMM, (2.0,), (2.0,), flops=200), row(CEILING, COPY, (0.5,), (0.5,), bytes=20)
    )
    assert gemm == {"flops": 200, "flop_per_s": 100}
    assert copy == {"bytes": 20, "byte_per_s": 40}
    assert found == pytest.approx(
        {
            "during": 3,
            "flops": 1210,
            "bytes": 100,
            "flop_per_s": 50,
            "of_best_gemm": 0.5,
            "floor_s": 14,  # 12 for the matmuls of the first, 2 for the bytes of the second
            "of_floor": 14 / 24.2,
        }
    )


def test_a_slow_minute_that_falls_on_all_sides_leaves_their_ratio() -> None:
    """And one in which somebody disturbed the row alone does not count."""
    for own, others in (((1, 1, 3, 3), (1, 1, 3, 3)), ((1, 1, 4), (1, 1, 1)), ((1,), (0.5, 1, 1.5))):
        found, *_ = rooflines(
            row("latentrt", "unet", *((24.2 * factor,) for factor in own)),
            row(CEILING, GEMM, *((2.0 * factor, 2.0 * factor) for factor in others), flops=200),
            row(CEILING, COPY, *((0.5 * factor,) for factor in others), bytes=20),
        )
        assert found["of_best_gemm"] == pytest.approx(0.5)
        assert found["of_floor"] == pytest.approx(14 / 24.2)


def test_rows_without_a_time_stay_as_they_are() -> None:
    failed = replace(row("diffusers", "unet", (1.0,)), status="FAILED")
    rate = replace(row("latentrt", "unet", (1.0,)), unit="1/s")
    empty = row("openvino", "unet")
    broken = replace(row(CEILING, GEMM), status="not available")
    ours, copy = row("latentrt", "unet", (24.2,)), row(CEILING, COPY, (0.5,), bytes=20)
    *same, found, _ = with_roofline((failed, rate, empty, broken, ours, copy), PARTS)
    assert same == [failed, rate, empty, broken]
    assert found.figures == {"flops": 1210, "bytes": 100, "flop_per_s": 50}, "no product, no ratio"
    update, gemm = with_roofline((ours, row(CEILING, GEMM, (2.0,), flops=200)), ())
    assert dict(update.figures) == {}, "it has no nets"
    assert gemm.figures["flop_per_s"] == 100
