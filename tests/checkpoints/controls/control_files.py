"""Controls of random weights and tiny widths, by diffusers' classes, and their files in every layout.

Names of `cldm` come from the tables of diffusers' own scripts (`tests.export.ldm_files`), and what a
ControlNet has besides from its `convert_controlnet_checkpoint`, read backwards.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_union import ControlNetUnionModel
from safetensors.torch import save_file

from tests.export.ldm_files import Tensors, unet_to_ldm

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
ADDED: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 16,
}
XL: dict[str, Any] = {
    "block_out_channels": (64, 64, 128),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "cross_attention_dim": 2048,
    "attention_head_dim": [1, 1, 2],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 3],
    "conditioning_embedding_out_channels": (16, 32, 48, 64),
    **ADDED,
}
CONTROLNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (32, 64, 64, 64),
        "cross_attention_dim": 768,
        "conditioning_embedding_out_channels": (16, 32, 96, 256),
    },
    "sd2": {
        "block_out_channels": (64, 128),
        "down_block_types": (CROSS, PLAIN),
        "layers_per_block": 1,
        "cross_attention_dim": 1024,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
        "conditioning_channels": 4,
        "upcast_attention": True,
    },
    "sdxl": XL,
    "sdxl-mid": {**XL, "transformer_layers_per_block": [0, 0, 1]},
    "sdxl-no-depth": {**XL, "transformer_layers_per_block": [0, 0, 0]},
    "sdxl-small": {
        **XL,
        "down_block_types": (PLAIN, PLAIN, PLAIN),
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [0, 0, 0],
    },
}
_UNION = {**XL, "num_trans_channel": 32, "num_trans_head": 4, "num_proj_channel": 64}
UNIONS: dict[str, dict[str, Any]] = {
    "union": {**_UNION, "num_control_type": 6},
    "promax": {**_UNION, "num_control_type": 8, "num_trans_layer": 2},
}
FAMILIES = {"union": "sdxl", "promax": "sdxl", **{name: name.split("-")[0] for name in CONTROLNETS}}
T2I_ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"channels": [32, 64, 128, 128]},
    "full, one channel": {"channels": [32, 64, 128, 128], "in_channels": 1},
    "xl": {"channels": [32, 64, 128, 128], "adapter_type": "full_adapter_xl", "downscale_factor": 16},
    "xl, one channel": {
        "channels": [32, 64, 128, 128],
        "adapter_type": "full_adapter_xl",
        "downscale_factor": 16,
        "in_channels": 1,
    },
    "light": {"channels": [32, 64, 128], "adapter_type": "light_adapter", "num_res_blocks": 4},
}


def controlnet(name: str) -> Any:
    """The module by its name in CONTROLNETS or UNIONS; residuals' convolutions are random, not zero."""
    torch.manual_seed(0)
    module: Any = (
        ControlNetUnionModel(**UNIONS[name]) if name in UNIONS else ControlNetModel(**CONTROLNETS[name])
    )
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if key.startswith("controlnet_") and not tensor.any():
                tensor.normal_()
    return module


def t2i_adapter(name: str) -> Any:
    torch.manual_seed(0)
    return T2IAdapter(**T2I_ADAPTERS[name])


def to_cldm(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """A ControlNet's tensors by the names of the code that trained the first ones."""
    last = 2 * (2 * len(config["conditioning_embedding_out_channels"]) - 1)
    own: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("controlnet_down_blocks."):
            own[re.sub(r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", name)] = tensor
        elif name.startswith("controlnet_mid_block."):
            own[name.replace("controlnet_mid_block", "middle_block_out.0")] = tensor
        elif name.startswith("controlnet_cond_embedding.blocks."):
            _, _, index, end = name.split(".")
            own[f"input_hint_block.{2 * (int(index) + 1)}.{end}"] = tensor
        elif name.startswith("controlnet_cond_embedding."):
            place = {"conv_in": 0, "conv_out": last}[name.split(".")[1]]
            own[f"input_hint_block.{place}.{name.split('.')[2]}"] = tensor
    unets = {name: tensor for name, tensor in tensors.items() if not name.startswith("controlnet_")}
    up = ["Cross" * kind.startswith("Cross") for kind in reversed(config["down_block_types"])]
    sides = {"up_block_types": [f"{kind}AttnUpBlock2D" if kind else "UpBlock2D" for kind in up]}
    return own | unet_to_ldm(unets, {**config, **sides})


def to_tencent(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """A T2I-Adapter's tensors by their first names: `scripts/convert_original_t2i_adapter.py` backwards."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("adapter.")
        if config["adapter_type"] == "light_adapter":
            name = name.replace("resnets", "body")
        elif match := re.fullmatch(r"body\.(\d)\.resnets\.(\d)\.(.+)", name):
            name = f"body.{2 * int(match[1]) + int(match[2])}.{match[3]}"
        elif match := re.fullmatch(r"body\.(\d)\.(in_conv\..+)", name):
            name = f"body.{2 * int(match[1])}.{match[2]}"
        renamed[name] = tensor
    return renamed


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path, metadata
    )
    return path
