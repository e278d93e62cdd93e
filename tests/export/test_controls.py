"""`unet_controlled` against diffusers' UNet, called with what ControlNets and T2I-Adapters hand to it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DConditionModel

from latentrt.checkpoints.graphs.controls import add_controls
from latentrt.checkpoints.graphs.hoist import hoist
from latentrt.engines import spec
from latentrt.engines.errors import CheckpointError
from latentrt.engines.package import Package
from latentrt.engines.spec import TensorSpec
from latentrt.engines.tolerances import NET_RELATIVE_L2
from latentrt.export.nets.build import WholeUnet
from tests.export.conftest import Exported, relative_l2
from tests.export.traced import runner, traced
from tests.parity_pair import exported

WIDTHS = dict.fromkeys(spec.VECTORS, 8)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """SDXL, whose first down block has no attention; in fp32."""
    folder = exported(tmp_path_factory, "xl-tiny")
    return Exported(folder / "checkpoint", Package.open(folder / "package"), [], [])


def inputs(family: Exported, size: tuple[int, int], names: tuple[str, ...]) -> dict[str, Any]:
    """All inputs of `unet_controlled` for two rows; controls are zeros but for those with these prefixes."""
    nets, random = family.package.manifest.nets, np.random.default_rng(5)
    sizes = {"B": 2, "S": 2, "T": 77, "H/8": size[0], "W/8": size[1]}

    def normal(item: TensorSpec) -> Any:
        return random.standard_normal(spec.shape_of(item.shape, sizes)).astype(spec.DTYPES[item.dtype])

    time = {item.name: normal(item) for item in nets["unet_time"].spec.inputs}
    time["timestep"] = np.array([801.0, 43.0], np.float32)  # of each row its own
    (context,) = (normal(item) for item in nets["unet_context"].spec.inputs)
    controlled = nets["unet_controlled"].spec.inputs
    own = [item for item in controlled if not item.name.startswith(("context.", "time."))]
    arrays = {
        item.name: normal(item) * (item.name == "latent" or item.name.startswith(names or "\0"))
        for item in own
    }
    invariants = {**family.run("unet_context", context=context), **family.run("unet_time", **time)}
    return {"time": time, "context": context, "own": arrays, "invariants": invariants}


def wanted(family: Exported, called: dict[str, Any], names: tuple[str, ...]) -> Any:
    options: dict[str, Any] = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    net: Any = UNet2DConditionModel.from_pretrained(family.source / "unet", **options)
    return by_diffusers(net, called, names)


def by_diffusers(net: Any, called: dict[str, Any], names: tuple[str, ...]) -> Any:
    """What diffusers predicts with the controls of these prefixes, and without the others."""
    net.num_upsamplers = 30  # upsamples to the size of the skip connection, as every package does

    def group(prefix: str) -> list[torch.Tensor]:
        named = {name: value for name, value in called["own"].items() if name.startswith(prefix)}
        ordered = sorted(named, key=lambda name: int(name.removeprefix(prefix)))
        return [torch.from_numpy(named[name]).float() for name in ordered]

    residuals, given = group("residual_"), dict[str, Any]()
    if "residual_" in names:
        given["down_block_additional_residuals"] = tuple(residuals[:-1])
        given["mid_block_additional_residual"] = residuals[-1]
    if "feature_" in names:
        given["down_intrablock_additional_residuals"] = group("feature_")  # diffusers empties the list
    vectors = {name: torch.from_numpy(value) for name, value in called["time"].items()}
    timestep = vectors.pop("timestep")
    added = {name: vectors.pop(name) for name in ("text_embeds", "time_ids") if name in vectors}
    with torch.no_grad():
        latent, context = (
            torch.from_numpy(value).float() for value in (called["own"]["latent"], called["context"])
        )
        return net(latent, timestep, context, added_cond_kwargs=added, **vectors, **given).sample


@pytest.mark.parametrize("names", [("residual_",), ("feature_",), ("residual_", "feature_")])
@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
@pytest.mark.parametrize("which", ["sd1", "sd2", "xl"])
def test_controls_are_added_where_diffusers_adds_them(
    which: str, size: tuple[int, int], names: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    family: Exported = request.getfixturevalue(which)
    called = inputs(family, size, names)
    found = family.run("unet_controlled", **called["own"], **called["invariants"])["prediction"]
    bar = NET_RELATIVE_L2[family.package.manifest.dtype]
    assert relative_l2(found, wanted(family, called, names)) < bar
    assert relative_l2(found, wanted(family, called, ())) > 0.05, "the controls change nothing"


@pytest.mark.parametrize("which", ["sd1", "sd2", "xl"])
def test_zeros_change_no_bit(which: str, request: pytest.FixtureRequest) -> None:
    family: Exported = request.getfixturevalue(which)
    called = inputs(family, (7, 10), ())
    with_zeros = family.run("unet_controlled", **called["own"], **called["invariants"])["prediction"]
    plain = family.run("unet", latent=called["own"]["latent"], **called["invariants"])["prediction"]
    assert np.array_equal(with_zeros, plain)


@pytest.mark.parametrize("which", ["sd1", "sd2", "xl"])
def test_the_contract_is_that_of_the_loop_with_controls_behind(
    which: str, request: pytest.FixtureRequest
) -> None:
    """So invariants are computed once for both loop graphs; channels and levels are diffusers' own."""
    family: Exported = request.getfixturevalue(which)
    nets = family.package.manifest.nets
    plain, controlled = nets["unet"], nets["unet_controlled"]
    assert controlled.spec.inputs[: len(plain.spec.inputs)] == plain.spec.inputs
    assert controlled.spec.outputs == plain.spec.outputs
    assert controlled.weights == plain.weights
    assert set(controlled.fp32_islands) >= set(plain.fp32_islands)
    config = UNet2DConditionModel.load_config(family.source / "unet")
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    skips = [(channels[0], 0)]
    for level, count in enumerate(channels):
        skips += [(count, level)] * layers
        skips += [(count, level + 1)] * (level + 1 < len(channels))
    added = controlled.spec.inputs[len(plain.spec.inputs) :]
    residuals = [item for item in added if item.name.startswith("residual_")]
    assert [(item.shape[1], item.shape[2]) for item in residuals] == [
        (count, f"H/{8 << level}") for count, level in [*skips, skips[-1]]
    ]
    assert [item.name for item in added[len(residuals) :]] == [
        f"feature_{number}" for number in range(len(channels) + 1)
    ]


# The published orders of blocks, their depths and middles; the widths are small.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"levels": ["CrossAttn"] * 3 + [""], "transformer_layers_per_block": 1},
    "ssd-1b": {
        "levels": ["", "CrossAttn", "CrossAttn"],
        "transformer_layers_per_block": [1, [2, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[1, 2, 2], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "without a middle": {"levels": ["CrossAttn", ""], "mid_block_type": None},
}


def unet(*, levels: list[str], **more: Any) -> Any:
    torch.manual_seed(0)
    net: Any = UNet2DConditionModel(
        block_out_channels=tuple(16 * (1 + number) for number in range(len(levels))),
        down_block_types=tuple(f"{level}DownBlock2D" for level in levels),
        up_block_types=tuple(f"{level}UpBlock2D" for level in reversed(levels)),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        **more,
    )
    return net.eval()


@pytest.mark.parametrize(
    "name", ["without a middle", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd15", "ssd-1b"))]
)
def test_unets_of_other_depths(name: str, tmp_path: Path) -> None:
    net = unet(**UNETS[name])
    whole = spec.unet_whole(channels=4, width=24, float_dtype="float32")
    model = traced(WholeUnet(net), whole, tmp_path)
    plain = hoist(model)
    model, contract = add_controls(*plain["unet"])
    run = runner(model, contract, tmp_path / "controlled.onnx")
    parts = {net: runner(*plain[net], tmp_path / f"{net}.onnx") for net in ("unet_context", "unet_time")}
    random, sizes = np.random.default_rng(0), {"B": 2, "H/8": 13, "W/8": 10}
    own = {
        item.name: random.standard_normal(spec.shape_of(item.shape, sizes), np.float32)
        for item in contract.inputs
        if not item.name.startswith(("context.", "time."))
    }
    context, timestep = random.standard_normal((2, 77, 24), np.float32), np.array([7.0, 900.0], np.float32)
    invariants = {**parts["unet_context"](context=context), **parts["unet_time"](timestep=timestep)}
    called = {"own": own, "context": context, "time": {"timestep": timestep}}
    found = run(**own, **invariants)["prediction"]
    reference = by_diffusers(net, called, ("residual_", "feature_"))
    assert relative_l2(found, reference) < NET_RELATIVE_L2["fp32"]


def test_graphs_without_skip_connections_are_refused() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["":23]>
        g (float[B,4,h,w] latent) => (float[B,4,h,w] prediction) { prediction = Tanh(latent) }""")
    contract = spec.unet(channels=4, float_dtype="float32", invariants=[])
    with pytest.raises(CheckpointError, match="has 0 skip connections"):
        add_controls(model, contract)
