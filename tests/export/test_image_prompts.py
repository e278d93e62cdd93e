"""`unet_image_prompt` against diffusers' UNet with IP-Adapters in its attention processors."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DConditionModel

from latentrt.checkpoints.controls.cross_attentions import cross_attentions
from latentrt.checkpoints.graphs.image_prompts import add_image_prompts
from latentrt.engines import spec
from latentrt.engines.errors import CheckpointError
from latentrt.engines.package import Package
from latentrt.engines.tolerances import NET_RELATIVE_L2
from tests.export.conftest import Exported, relative_l2
from tests.export.test_controls import inputs
from tests.parity_pair import exported

EMBEDDING = 16  # of the pictures
TOKENS = 4


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """SDXL, whose first down block has no attention; in fp32."""
    folder = exported(tmp_path_factory, "xl-tiny")
    return Exported(folder / "checkpoint", Package.open(folder / "package"), [], [])


def unet_of(family: Exported, adapters: int) -> Any:
    """diffusers' UNet with so many classic IP-Adapters of random weights."""
    options: dict[str, Any] = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    net: Any = UNet2DConditionModel.from_pretrained(family.source / "unet", **options)
    net.num_upsamplers = 30
    width, names = net.config.cross_attention_dim, cross_attentions(net.config)
    torch.manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape) / shape[-1] ** 0.5

    def adapter() -> Any:
        projection = {
            "proj.weight": normal(TOKENS * width, EMBEDDING),
            "proj.bias": normal(TOKENS * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        }
        layers = {
            f"{2 * number + 1}.to_{letter}_ip.weight": normal(
                net.get_submodule(name).to_k.weight.shape[0], width
            )
            for number, name in enumerate(names)
            for letter in "kv"
        }
        return {"image_proj": projection, "ip_adapter": layers}

    net._load_ip_adapter_weights([adapter() for _ in range(adapters)])
    return net


def image_inputs(net: Any, contract: spec.NetSpec, embeds: torch.Tensor, scales: list[float]) -> Any:
    """What the graph is given for these embeddings (A, B, K, EMBEDDING), one group for each adapter."""
    shapes = {item.name: item.shape for item in contract.inputs}
    with torch.no_grad():
        tokens = net.encoder_hid_proj(list(embeds))
    found: dict[str, Any] = {}
    for number, name in enumerate(cross_attentions(net.config)):
        processor = net.get_submodule(name).processor
        heads, width = (int(size) for size in shapes[f"image_keys_{number}"][2:4])
        keys, values = [], []
        for index, scale in enumerate(scales):
            with torch.no_grad():
                pair = [
                    layer[index](tokens[index]) for layer in (processor.to_k_ip, processor.to_v_ip)
                ]  # (B, K, T, C) or (B, T, C)
            split = [np.asarray(one.reshape(len(one), -1, heads, width)) for one in pair]
            keys.append(split[0].transpose(0, 2, 3, 1) / width**0.5)
            values.append(split[1].transpose(0, 2, 1, 3) * scale)
        found[f"image_keys_{number}"] = np.stack(keys, 1)
        found[f"image_values_{number}"] = np.stack(values, 1)
    return found


@pytest.mark.parametrize(("adapters", "pictures"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("which", ["sd1", "sd2", "xl"])
def test_image_prompts_are_diffusers(
    which: str, adapters: int, pictures: int, request: pytest.FixtureRequest
) -> None:
    family: Exported = request.getfixturevalue(which)
    net = unet_of(family, adapters)
    scales = [0.6, 1.3][:adapters]
    called = inputs(family, (7, 10), ())
    embeds = torch.from_numpy(
        np.random.default_rng(1).standard_normal((adapters, 2, pictures, EMBEDDING), np.float32)
    )
    contract = family.package.manifest.nets["unet_image_prompt"].spec
    dtype = spec.DTYPES[contract.inputs[0].dtype]
    masks = {
        item.name: np.ones(spec.shape_of(item.shape, {"B": 2, "G": adapters, "H/8": 7, "W/8": 10}), dtype)
        for item in contract.inputs
        if item.name.startswith("image_mask_")
    }
    image = image_inputs(net, contract, embeds, scales)
    image = {name: value.astype(dtype) for name, value in image.items()}
    found = family.run("unet_image_prompt", **called["own"], **called["invariants"], **image, **masks)
    reference = by_diffusers(net, called, embeds, scales)
    assert relative_l2(found["prediction"], reference) < NET_RELATIVE_L2[family.package.manifest.dtype]
    assert relative_l2(found["prediction"], by_diffusers(net, called, embeds, [0.0] * adapters)) > 0.05
    off = {name: value * 0 for name, value in {**image, **masks}.items()}
    plain = family.run("unet", latent=called["own"]["latent"], **called["invariants"])["prediction"]
    zeros = family.run("unet_image_prompt", **called["own"], **called["invariants"], **off)["prediction"]
    assert np.array_equal(zeros, plain)


def by_diffusers(net: Any, called: dict[str, Any], embeds: torch.Tensor, scales: list[float]) -> Any:
    for module in net.attn_processors.values():
        if hasattr(module, "scale"):
            module.scale = scales
    vectors = {name: torch.from_numpy(value) for name, value in called["time"].items()}
    timestep = vectors.pop("timestep")
    added: dict[str, Any] = {
        name: vectors.pop(name) for name in ("text_embeds", "time_ids") if name in vectors
    }
    latent, context = (
        torch.from_numpy(value).float() for value in (called["own"]["latent"], called["context"])
    )
    with torch.no_grad():
        return net(
            latent, timestep, context, added_cond_kwargs={**added, "image_embeds": list(embeds)}, **vectors
        ).sample


def test_graphs_without_the_attention_of_their_keys_are_refused() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["":23]>
        g (float[B,4,h,w] latent) => (float[B,4,h,w] prediction) { prediction = Tanh(latent) }""")
    keys = spec.TensorSpec(name="context.mid_block.attn2.to_k", dtype="float32", shape=("B", 2, "T", 8))
    contract = spec.unet(channels=4, float_dtype="float32", invariants=[keys])
    with pytest.raises(CheckpointError, match="no attention of that name"):
        add_image_prompts(model, contract)
