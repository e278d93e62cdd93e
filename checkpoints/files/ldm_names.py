"""The tensor names of one-file checkpoints, turned into diffusers' and transformers'.

One-file checkpoints have the names of the code that trained them: CompVis' latent-diffusion (UNet and VAE;
Stability AI's generative-models kept them), transformers' CLIP under a prefix, and OpenCLIP. The mapping is
that of diffusers' `loaders/single_file_utils.py` and its scripts `convert_diffusers_to_original_*.py`. No
tensor is read: a new name may stand for rows, the transpose or another shape of the stored tensor.

Every function takes the tensors of one part without its prefix, and leaves unknown names out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from .component import TensorHeader

Tensors = Mapping[str, TensorHeader]

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d{1,3})|middle_block)\.(\d{1,3})\.(.+)")
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_RESAMPLE = {"op": "downsamplers.0.conv", "conv": "upsamplers.0.conv"}
_TRANSFORMER = re.compile(r"norm|proj_in|proj_out|transformer_blocks\.\d{1,3}\..+")

_VAE_ENDS = re.compile(r"(?:post_)?quant_conv|(?:encoder|decoder)\.(?:conv_in|conv_out|norm_out)")
_VAE_LEVEL = re.compile(
    r"(encoder\.down|decoder\.up)\.(\d{1,3})\.(?:block\.(\d{1,3})\.(\w+)|(downsample|upsample)\.conv)"
)
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(?:block_([12])\.(\w+)|attn_1\.(\w+))")
_VAE_RESNET = {**{n: n for n in ("norm1", "conv1", "norm2", "conv2")}, "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_OPEN_CLIP_ENDS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",  # by diffusers' own script: already (out, in)
}
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d{1,3})\.(.+)[._](weight|bias)")
_OPEN_CLIP_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def unet_tensors(stored: Tensors) -> dict[str, TensorHeader]:
    """A latent-diffusion UNet's tensors (`input_blocks…`) by UNet2DConditionModel's names."""
    # Blocks are numbered across levels; a level is its residual blocks and the downsampler behind them.
    blocks = [name for name in stored if re.match(r"input_blocks\.\d{1,3}\.", name)]
    numbers = {name: int(name.split(".")[1]) for name in blocks}
    ends = [number for name, number in numbers.items() if name == f"input_blocks.{number}.0.op.weight"]
    period = min(ends, default=max(numbers.values(), default=0) + 1)
    return _renamed(stored, lambda module: _unet_module(module, max(period, 1)))


def _unet_module(module: str, period: int) -> str | None:
    if module in _UNET_ENDS:
        return _UNET_ENDS[module]
    match = _UNET_BLOCK.fullmatch(module)
    if match is None:
        return None
    side, number, part, rest = match.groups()
    if side is None:  # residual block, transformer, residual block
        place, index = "mid_block", int(part) // 2
    else:
        level, index = divmod(int(number) - (side == "input"), period)
        place = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest in _RESAMPLE:
        return f"{place}.{_RESAMPLE[rest]}"
    if rest in _RESNET:
        return f"{place}.resnets.{index}.{_RESNET[rest]}"
    return f"{place}.attentions.{index}.{rest}" if _TRANSFORMER.fullmatch(rest) else None


def vae_tensors(stored: Tensors) -> dict[str, TensorHeader]:
    """A latent-diffusion autoencoder's tensors by AutoencoderKL's names, 1x1 convolutions as linear."""
    levels = [int(name.split(".")[2]) for name in stored if re.match(r"decoder\.up\.\d{1,3}\.", name)]
    top = max(levels, default=0)
    renamed = _renamed(stored, lambda module: _vae_module(module, top))
    return {
        name: replace(tensor, shape=tensor.shape[:2]) if ".attentions." in name else tensor
        for name, tensor in renamed.items()
    }


def _vae_module(module: str, top: int) -> str | None:
    """diffusers' name of a VAE's module. It counts the decoder's levels down from `top`, the highest."""
    if _VAE_ENDS.fullmatch(module):
        return module.replace(".norm_out", ".conv_norm_out")
    if match := _VAE_LEVEL.fullmatch(module):
        side, level, index, part, resample = match.groups()
        place = f"{side}_blocks.{level if side == 'encoder.down' else top - int(level)}"
        if resample is not None:
            return f"{place}.{resample}rs.0.conv"
        return f"{place}.resnets.{index}.{_VAE_RESNET[part]}" if part in _VAE_RESNET else None
    if match := _VAE_MIDDLE.fullmatch(module):
        side, index, part, projection = match.groups()
        if part in _VAE_RESNET:
            return f"{side}.mid_block.resnets.{int(index) - 1}.{_VAE_RESNET[part]}"
        if projection in _VAE_ATTENTION:
            return f"{side}.mid_block.attentions.0.{_VAE_ATTENTION[projection]}"
    return None


def _renamed(stored: Tensors, module_name: Callable[[str], str | None]) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for name, tensor in stored.items():
        module, _, end = name.rpartition(".")
        if end in ("weight", "bias") and (new := module_name(module)) is not None:
            tensors[f"{new}.{end}"] = tensor
    return tensors


def clip_tensors(stored: Tensors) -> dict[str, TensorHeader]:
    """CLIP's tensors under `text_model.`, which early and recent releases of transformers leave out."""
    return {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in stored.items()
        if name.endswith((".weight", ".bias"))  # position_ids, in old files, are 0 … 76
    }


def open_clip_tensors(stored: Tensors) -> dict[str, TensorHeader]:
    """OpenCLIP's text tower by the names of transformers' CLIPTextModelWithProjection."""
    tensors: dict[str, TensorHeader] = {}
    for name, tensor in stored.items():
        if name in _OPEN_CLIP_ENDS:
            tensors[_OPEN_CLIP_ENDS[name]] = tensor
        elif name == "text_projection":  # (in, out)
            tensors["text_projection.weight"] = replace(tensor, shape=tensor.shape[::-1], transposed=True)
        elif match := _OPEN_CLIP_BLOCK.fullmatch(name):
            layer, part, kind = match.groups()
            place = f"text_model.encoder.layers.{layer}"
            if part in _OPEN_CLIP_PARTS:
                tensors[f"{place}.{_OPEN_CLIP_PARTS[part]}.{kind}"] = tensor
            elif part == "attn.in_proj" and tensor.shape:
                # Query, key and value below each other: (3 C, C) or (3 C,).
                rows = tensor.shape[0] // 3
                for i, letter in enumerate("qkv"):
                    third = replace(tensor, rows=(i * rows, (i + 1) * rows), shape=(rows, *tensor.shape[1:]))
                    tensors[f"{place}.self_attn.{letter}_proj.{kind}"] = third
    return tensors
