"""Controls that are known and cannot be used yet, and where ControlNets do not run yet."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets.controlnet_union import ControlNetUnionModel

from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.export.architectures import Architecture
from latentrt.runtime.loop.denoise import HostLoop
from tests.checkpoints.controls.control_files import UNIONS
from tests.traced_graphs import make_archive


def small_union() -> Any:
    """A Union of three types at a quarter of the picture's size, whose own layers can be seen."""
    torch.manual_seed(2)
    width = {"num_trans_channel": 32, "num_proj_channel": 32, "block_out_channels": (32, 64)}
    depth = {"layers_per_block": 1, "transformer_layers_per_block": 1, "attention_head_dim": 2}
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "num_control_type": 3}
    pictures = {"conditioning_embedding_out_channels": (8, 12, 16), "cross_attention_dim": 64}
    net: Any = ControlNetUnionModel(**{**UNIONS["union"], **width, **depth, **kinds, **pictures})
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(0, 0.2)
    return net.eval()


def added_to_the_latent(net: Any, hints: list[Any], types: list[int], strengths: list[float]) -> Any:
    """What diffusers adds behind its first convolution for pictures, each (1, 3, H, W)."""
    seen: list[torch.Tensor] = []
    hook = net.down_blocks[0].register_forward_pre_hook(
        lambda block, given, named: seen.append(named["hidden_states"]), with_kwargs=True
    )
    sample = torch.randn(1, 4, hints[0].shape[2] // 4, hints[0].shape[3] // 4)
    vectors = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        net(
            sample,
            torch.tensor([500.0]),
            torch.randn(1, 7, 64),
            hints,
            torch.zeros(1, 3),
            types,
            strengths,
            added_cond_kwargs=vectors,
        )
        hook.remove()
        return (seen[0] - net.conv_in(sample)).numpy()


def test_a_union_in_half_precision(tmp_path: Path) -> None:
    """Ranges are measured with types and strengths, and what becomes of pictures is what diffusers adds."""
    net = small_union()
    net.save_pretrained(tmp_path / "union")
    config = {"_class_name": "ControlNetUnionModel", **net.config}
    archive = tmp_path / "union.zip"
    make_archive(archive, {"union": Architecture(parts={"controlnet": config})}, dtypes=["fp16"])
    options = Options(dtype="fp16", reads=BACKENDS["onnxruntime"].reads, templates=archive)
    package = open_control(tmp_path / "union", options, store=tmp_path / "cache")
    assert (package.manifest.vectors["control_type"], package.manifest.latent_scale) == (3, 4)
    hints = torch.rand(2, 3, 32, 48)
    one, other = hints[:1], hints[1:]
    wanted = added_to_the_latent(net, [one, other], [2, 0], [0.7, 0.4])
    alone = added_to_the_latent(net, [one], [2], [0.7])
    with closing(HostLoop(package, ONNXRUNTIME, None)) as loop:

        def found(*strengths: float) -> Any:
            types = np.eye(3, dtype=np.float32)[[2, 0]]
            told = {"control_type": types, "strength": np.array(strengths, np.float32)}
            return loop.call("controlnet_hint", hint=hints.numpy(), **told)["hint_embedding"]

        both, full = found(0.7, 0.4).astype(np.float32), found(1.0, 1.0).astype(np.float32)
    bound = 4e-3 * np.abs(wanted).max()
    np.testing.assert_allclose(both.sum(axis=0, keepdims=True), wanted, rtol=0, atol=bound)
    np.testing.assert_allclose(full[:1], alone, rtol=0, atol=bound)
    assert np.abs(full[:1] - both[:1]).max() > 10 * bound, "strengths count"
