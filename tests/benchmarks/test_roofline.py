"""Floors against the published table, and ratios against rounds whose answers one knows."""

import json
from dataclasses import replace
from typing import Any

import pytest

from latentrt.benchmarks.case import WORKLOADS, Case
from latentrt.benchmarks.records import Row
from latentrt.benchmarks.roofline import (
    CEILING,
    COPY,
    GEMM,
    Layer,
    Parts,
    Work,
    floors,
    with_roofline,
    workload_parts,
)
from latentrt.benchmarks.skeletons import FOLDER
from latentrt.engines.package import Manifest, Package

H200: dict[str, float] = {"flop_per_s": 790e12, "byte_per_s": 4.3e12}  # measured rates behind the table
GUIDED = Case(width=512, height=512, guidance_scale=7.5)


@pytest.fixture(scope="module")
def sd15() -> Package:
    data = json.loads((FOLDER / "sd15-fp16" / "manifest.json").read_text(encoding="utf-8"))
    return Package(root=FOLDER / "sd15-fp16", manifest=Manifest.from_json(data))


# Milliseconds on an H200: reading the weights, all FLOPs at the best rate, every layer a kernel whose tiles
# are quantised over 132 SMs. The last is therefore an upper bound of `layers_s`, which knows no tiles.
FLOORS = [
    ("unet", {"guidance_scale": 1.0}, 0.40, 1.02, 1.77),
    ("unet", {}, 0.40, 2.03, 2.88),
    ("unet", {"pictures": 4}, 0.40, 8.13, 9.33),
    ("vae_decoder", {}, 0.02, 3.18, 3.76),
    ("vae_decoder", {"width": 768, "height": 768}, 0.02, 7.28, 8.45),
    ("vae_decoder", {"width": 1024, "height": 1024}, 0.02, 13.25, 15.37),
    ("text_encoder", {}, 0.04, 0.03, 0.13),
]


@pytest.mark.parametrize(("workload", "changes", "weights", "compute", "layers"), FLOORS)
def test_the_floors_are_the_published_ones(
    sd15: Package, workload: str, changes: dict[str, Any], weights: float, compute: float, layers: float
) -> None:
    found = floors(workload_parts(sd15, workload, replace(GUIDED, **changes)), **H200)
    # keys, values and the time embedding leave our loop: 0.4 % of its FLOPs and 5.5 % of its weights
    assert found["floor_compute_s"] * 1e3 == pytest.approx(compute, rel=0.005, abs=0.01)
    assert found["floor_bytes_s"] * 1e3 == pytest.approx(weights, rel=0.06, abs=0.005)
    assert found["floor_s"] == max(found["floor_compute_s"], found["floor_bytes_s"])
    assert found["floor_s"] < found["floor_layers_s"] < layers * 1e-3


def test_a_picture_is_the_sum_of_its_nets(sd15: Package) -> None:
    case = replace(GUIDED, pictures=2, steps=10)
    text, context, time, unet, decoder = workload_parts(sd15, "picture", case)
    assert [text] == workload_parts(sd15, "text_encoder", case)
    assert [decoder] == workload_parts(sd15, "vae_decoder", case)
    assert [(1, unet[1])] == workload_parts(sd15, "unet", case)
    assert unet[0] == 10
    (_, every_row), alone = workload_parts(sd15, "invariants", case)
    assert time == alone
    assert context[1].flops * 2 == every_row.flops  # texts are encoded once, the workload has every row


@pytest.mark.parametrize(("steps", "milliseconds"), [(20, 43.9), (50, 104.9)])
def test_a_whole_picture_has_the_published_floor(sd15: Package, steps: int, milliseconds: float) -> None:
    parts = workload_parts(sd15, "picture", replace(GUIDED, steps=steps))
    assert floors(parts, **H200)["floor_compute_s"] * 1e3 == pytest.approx(milliseconds, rel=0.005)
    assert workload_parts(sd15, "picture", replace(GUIDED, steps=10, sampler="heun"))[3][0] == 19
    assert [name for name in (*WORKLOADS, GEMM) if not workload_parts(sd15, name, GUIDED)] == ["update", GEMM]


def work(flops: int, size: int) -> Work:
    layer = Layer(kind="linear", flops=flops, bytes=size)
    return Work(layers=(layer,), parameters=0, least_bytes=size)


def row(side: str, workload: str, *rounds: tuple[float, ...], **figures: float) -> Row:
    return Row(side=side, workload=workload, rounds=rounds, figures=figures)


PARTS: Parts = [(2, work(600, 10)), (1, work(10, 80))]  # the first is bound by compute, the second by bytes


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
            "floor_compute_s": 12.1,
            "floor_bytes_s": 2.5,
            "floor_s": 14,  # 12 for the matmuls of the first, 2 for the bytes of the second
            "floor_layers_s": 14,
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
