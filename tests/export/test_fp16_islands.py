"""Models that fp16 cannot compute: the exporter finds what must be fp32, and the picture is right.

The oracle is diffusers in float32 on the same checkpoint. `overflow.py` makes fp16 real on a CPU.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentrt.checkpoints import nets as nets_written
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.precision import islands
from latentrt.checkpoints.precision.islands import FP16_MAX, LIMIT, Found
from latentrt.engines.errors import NumericError
from latentrt.engines.package import Package
from latentrt.engines.spec import EXTRA_EMBEDDINGS
from latentrt.export import export_package
from latentrt.export.graphs import passes as surgery
from latentrt.export.graphs.to_onnx import example
from latentrt.export.nets.build import NETS
from latentrt.export.verify import compare
from latentrt.runtime import Pipeline
from latentrt.runtime.loop import open as loops

from .overflow import Rounded, RoundedBackend, keep_apart, make_overflowing, rounded, session, with_nets
from .tensorrt_builds import build_every_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
SIZES = {"B": 2, "E": 1, "N": 1, "P": 2, "T": 77, "H/8": 12, "W/8": 20, "H": 24, "W": 40}
COMPONENTS = {
    "text_encoder": "text_encoder",
    "vae_encoder": "vae_encoder",
    "unet": "unet_whole",
    "vae_decoder": "vae_decoder",
}


@dataclass(frozen=True)
class Exported:
    source: Path
    package: Package
    plain: Package  # the same without islands of measured ranges
    found: dict[str, Found]


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("hot")
    source = make_overflowing(folder / "checkpoint")
    before: dict[str, ir.Model] = {}
    found: list[Found] = []

    def keep(model: ir.Model, component: str, *rest: Any) -> Found:
        before[component] = model.clone()
        return islands.find_islands(model, component, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nets_written, "find_islands", keep)
        package = export_package(
            source, folder / "package", dtype="fp16", verify=False, report_islands=found.append
        )
    root = Path(shutil.copytree(package.root, folder / "plain"))
    nets: dict[str, Any] = {}
    for component, net in COMPONENTS.items():
        contract = package.manifest.nets[net].spec
        traced = tuple(item for item in contract.inputs if item.name != EXTRA_EMBEDDINGS)
        contract = replace(contract, inputs=traced)
        files = [f"{component}/weights.safetensors"]
        nets |= nets_written.write_graphs(
            component, root, before[component], contract, dtype="fp16", weights=files
        )
    plain = with_nets(package, root, nets)
    return Exported(source, package, plain, {item.component: item for item in found})


def inputs(package: Package, net: str, seed: int = 5) -> dict[str, torch.Tensor]:
    return example(package.manifest.nets[net].spec, SIZES, seed)


def wanted(source: Path, component: str, arrays: dict[str, torch.Tensor]) -> np.ndarray:
    """diffusers' or transformers' module in float32."""
    net = NETS[component].build(Checkpoint.open(source), torch.float32)
    with torch.no_grad():
        result = net.module(
            **{
                name: item.float() if item.is_floating_point() else item
                for name, item in arrays.items()
                if name != EXTRA_EMBEDDINGS
            }
        )
    return (result[0] if isinstance(result, tuple) else result).numpy()


def found(net: Rounded, arrays: dict[str, torch.Tensor]) -> np.ndarray:
    result = net(**{name: item.numpy() for name, item in arrays.items()})
    if "image" in result and not np.isfinite(result["mean"]).all():
        return result["mean"]  # uint8 cannot say it
    return next(iter(result.values()))


def test_rounding_is_real(tmp_path: Path) -> None:
    body = "a = Mul(x, k) b = Add(a, a) y = Mul(b, j)"
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["":23]> g (float16[2] x, float16[1] k, float16[1] j)'
        f" => (float16[2] y) {{ {body} }}"
    )
    surgery.infer_types(model)
    arrays = {"x": [3e4, 2], "k": [2], "j": [0.125]}
    arrays = {name: np.array(value, np.float16) for name, value in arrays.items()}
    ir.save(model, tmp_path / "plain.onnx")
    assert np.isfinite(session(tmp_path / "plain.onnx").run(None, arrays)[0]).all()  # what hides an overflow
    keep_apart(model)
    ir.save(model, tmp_path / "apart.onnx")
    assert session(tmp_path / "apart.onnx").run(None, arrays)[0].tolist() == [np.inf, 1.0]


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_net_overflows_without_islands_and_not_with_them(hot: Exported, component: str) -> None:
    net = COMPONENTS[component]
    arrays = inputs(hot.package, net)
    oracle = wanted(hot.source, component, arrays)
    without = found(rounded(hot.plain, net)[net], arrays)
    assert not np.isfinite(without).all()
    output = hot.package.manifest.nets[net].spec.outputs[0].name
    check = compare(net, output, found(rounded(hot.package, net)[net], arrays), oracle, "fp16")
    assert check.psnr >= 40
    assert hot.found[component].largest > FP16_MAX
    named = set(hot.package.manifest.nets[net].fp32_islands)
    assert {island.node for island in hot.found[component].islands} <= named


def test_what_became_an_island(hot: Exported) -> None:
    """Around the scaled weights, and nowhere else."""
    found = {component: {item.node for item in found.islands} for component, found in hot.found.items()}
    layer = "encoder.layers.0"
    assert {f"{layer}.mlp.fc1/MatMul", f"{layer}.mlp.fc2/MatMul"} <= found["text_encoder"]
    assert not any("self_attn" in node for node in found["text_encoder"])
    scores = {f"mid_block.attentions.0.transformer_blocks.0.attn{n}/Attention/scores" for n in (1, 2)}
    convs = {"down_blocks.0.resnets.0.conv1/Conv", "up_blocks.0.resnets.0.conv1/Conv"}
    assert scores | convs <= found["unet"]
    assert not any(".conv2" in node or ".ff." in node for node in found["unet"])
    assert "decoder.conv_in/Conv" in found["vae_decoder"]
    assert not any("conv1/" in node or "to_q/" in node for node in found["vae_decoder"])
    for island in (island for part in hot.found.values() for island in part.islands):
        # the two operands of scores follow them, whatever their own size
        assert island.largest > LIMIT or island.node.endswith(("Attention/scaled", "Attention/turned"))


@pytest.mark.parametrize("kept", ["attn", "resnets"])
def test_half_of_the_unets_islands_are_not_enough(hot: Exported, kept: str, tmp_path: Path) -> None:
    """Scores alone overflow, and so do convolutions: neither case hides behind the other."""
    root = Path(shutil.copytree(hot.plain.root / "unet", tmp_path / "unet"))
    model = ir.load(root / "model.onnx")
    attention = [node for node in model.graph if node.op_type == "Attention"]
    names = [item.node for item in hot.found["unet"].islands if kept in item.node]
    if kept == "attn":
        names = [node.name or "" for node in attention]
        restore_shapes(attention)
    islands.run_in_fp32(model, names)
    ir.save(model, root / "half.onnx")
    spec = hot.package.manifest.nets["unet_whole"].spec
    assert not np.isfinite(found(Rounded(root / "half.onnx", spec), inputs(hot.package, "unet_whole"))).all()


def restore_shapes(attention: list[ir.Node]) -> None:
    """What a saved graph has forgotten, and writing an Attention out needs."""
    for node in attention:
        key = node.inputs[1]
        assert key is not None
        key.shape = ir.Shape(["B", 2, None, 16])


def test_the_cut_keeps_what_is_small_in_fp16(hot: Exported) -> None:
    """Invariants are fp16 and rows of a table, but for those that fp16 cannot hold and keys read in fp32."""
    nets = hot.package.manifest.nets
    time = {item.name: item for item in nets["unet_time"].spec.outputs}
    assert all(len(item.shape) == 2 for item in time.values())
    wide = {name for name, item in time.items() if item.dtype == "float32"}
    assert wide == {"time.up_blocks.0.resnets.0.time_emb_proj"}
    context = {item.name.rsplit(".", 1)[1]: item.dtype for item in nets["unet_context"].spec.outputs}
    assert context == {"to_k": "float32", "to_v": "float16"}
    assert {item.dtype for net in nets.values() for item in net.spec.inputs[:1]} <= {
        "int32",
        "uint8",
        "float16",
        "float32",
    }
    assert nets["unet"].spec.outputs[0].dtype == nets["text_encoder"].spec.outputs[0].dtype == "float16"


PARAMETERS: dict[str, Any] = {
    "prompt": "an old city by the sea",
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "height": 40,
    "width": 56,
}


def test_the_picture(hot: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = StableDiffusionPipeline.from_pretrained(
        hot.source, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    reference.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    wanted = np.asarray(reference(generator=generator, **PARAMETERS).images[0], np.float64)
    assert wanted.std() > 10
    monkeypatch.setattr(loops, "choose_backend", lambda *_: ("rounded", RoundedBackend()))
    ours = draw(hot.package)
    assert 10 * np.log10(255**2 / ((ours - wanted) ** 2).mean()) >= 40
    with pytest.raises(NumericError):
        draw(hot.plain)


def draw(package: Package) -> np.ndarray:
    with Pipeline.open(package.root) as pipe:
        return np.asarray(pipe(seed=3, output_type="np", **PARAMETERS).images[0], np.float64)


def test_tensorrt_builds_every_net(hot: Exported) -> None:
    """Strongly typed, so a value of the wrong type anywhere is refused. Needs no GPU."""
    build_every_net(hot.package)


DEMO = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"


@pytest.mark.slow
def test_the_demo_model_needs_no_islands_and_looks_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16, rounded as `overflow.py` does, against the shipped fp32 package: 20 steps, its own defaults."""
    ranges: list[Found] = []
    half = export_package(DEMO, tmp_path / "half", dtype="fp16", verify=True, report_islands=ranges.append)
    assert [part.islands for part in ranges] == [()] * 4
    assert max(part.largest for part in ranges) < LIMIT / 10
    prompts = {"a red circle on a blue background": 1, "a small green star": 2, "two yellow squares": 3}
    for prompt, seed in prompts.items():
        pictures: list[np.ndarray] = []
        for folder in (DEMO.parent / "package", half.root):
            with monkeypatch.context() as patch:
                if folder == half.root:
                    patch.setattr(loops, "choose_backend", lambda *_: ("rounded", RoundedBackend()))
                with Pipeline.open(folder) as pipe:
                    pictures.append(np.asarray(pipe(prompt, seed=seed, output_type="np").images[0], float))
        assert pictures[0].std() > 10
        quality = 10 * np.log10(255**2 / ((pictures[0] - pictures[1]) ** 2).mean())
        print(prompt, seed, round(quality, 1))
        assert quality >= 45
