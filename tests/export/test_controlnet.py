"""The nets of a ControlNet against diffusers' `ControlNetModel`."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel

from latentrt.checkpoints.graphs.hoist import hoist_control
from latentrt.engines import spec
from latentrt.engines.tolerances import NET_RELATIVE_L2
from latentrt.export.nets.controlnet import ControlHint, WholeControlNet
from tests.export.conftest import relative_l2
from tests.export.traced import runner, traced

XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "use_linear_projection": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd1": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
    "sd2": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "use_linear_projection": True},
    "xl": XL,
    "xl-small": {**XL, "down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"},
}
WIDTHS = {"text_embeds": 24, "time_ids": 6}


def controlnet(**more: Any) -> Any:
    """Random weights everywhere: those of a new one are zeros where its outputs begin."""
    torch.manual_seed(3)
    net: Any = ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 12, 16, 20),
        **more,
    )
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(0, 0.2)
    return net.eval()


@pytest.mark.parametrize(
    "kind", ["sd1", "xl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd2", "xl-small"))]
)
def test_outputs_are_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    net, random = controlnet(**KINDS[kind]), np.random.default_rng(1)
    vectors = WIDTHS if kind.startswith("xl") else {}
    outputs = spec.residuals(net.config.block_out_channels, net.config.layers_per_block)
    hint_spec = spec.controlnet_hint(width=16, float_dtype="float32")
    whole_spec = spec.controlnet_whole(
        channels=4, width=24, residuals=outputs, float_dtype="float32", vectors=vectors
    )
    (tmp_path / "hint").mkdir()
    hint_graph = traced(ControlHint(deepcopy(net)), hint_spec, tmp_path / "hint")
    embed = runner(hint_graph, hint_spec, tmp_path / "hint" / "model.onnx")
    parts = hoist_control(traced(WholeControlNet(deepcopy(net)), whole_spec, tmp_path), whole_spec)
    run = {name: runner(*part, tmp_path / f"{name}.onnx") for name, part in parts.items()}
    assert ("controlnet_context" in run) == (kind != "xl-small")

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    for height, width in ((8, 12), (7, 9)):
        hint = random.random((2, 3, 8 * height, 8 * width), np.float32)
        latent, context = normal(2, 4, height, width), normal(2, 77, 24)
        timestep = np.array([801.0, 43.0], np.float32)  # of each row its own
        given = {"text_embeds": normal(2, 24), "time_ids": 100 * random.random((2, 6), np.float32)}
        given = {name: given[name] for name in vectors}
        scales = random.random((2, len(outputs)), np.float32)
        with torch.no_grad():
            down, middle = net(
                *map(torch.from_numpy, (latent, timestep, context)),
                controlnet_cond=torch.from_numpy(hint),
                added_cond_kwargs={name: torch.from_numpy(value) for name, value in given.items()},
                return_dict=False,
            )
        wanted = [value.numpy() * scales[:, i, None, None, None] for i, value in enumerate((*down, middle))]
        invariants = run["controlnet_time"](timestep=timestep, **given)
        if "controlnet_context" in run:
            invariants |= run["controlnet_context"](context=context)
        embedding = embed(hint=hint)[spec.HINT_EMBEDDING]
        found = run["controlnet"](latent=latent, hint_embedding=embedding, scales=scales, **invariants)
        assert list(found) == [f"residual_{number}" for number in range(len(wanted))]
        for value, reference in zip(found.values(), wanted, strict=True):
            assert relative_l2(value, reference) < NET_RELATIVE_L2["fp32"]


def test_the_residuals_of_published_nets() -> None:
    """Channels of every output, as the skip connections of the UNets have them."""
    sd1 = spec.residuals([320, 640, 1280, 1280], 2)
    assert [channels for channels, _ in sd1] == [320] * 4 + [640] * 3 + [1280] * 6
    assert [level for _, level in sd1] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    xl = spec.residuals([320, 640, 1280], 2)
    assert xl == ((320, 0),) * 3 + ((320, 1), (640, 1), (640, 1), (640, 2), *((1280, 2),) * 3)
