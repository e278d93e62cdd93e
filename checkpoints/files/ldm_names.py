"""The tensor names of one-file checkpoints, turned into diffusers' and transformers'.

One-file checkpoints have the names of the code that trained them: CompVis' latent-diffusion (UNet and VAE;
Stability AI's generative-models kept them), transformers' CLIP under a prefix, and OpenCLIP. The mapping is
that of diffusers' `loaders/single_file_utils.py` and its scripts `convert_diffusers_to_original_*.py`. No
tensor is read: a new name may stand for rows, the transpose or another shape of the stored tensor.

Every function takes the tensors of one part without its prefix, and leaves unknown names out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from .component import TensorHeader

Tensors = Mapping[str, TensorHeader]

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    # Latent consistency models. diffusers' scripts leave the name that it has in diffusers.
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "time_embedding.cond_proj": "time_embedding.cond_proj",
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
_TRANSFORMER = re.compile(
    r"norm|proj_in|proj_out"
    r"|transformer_blocks\.\d{1,3}\.(?:norm[123]|attn[12]\.to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2))"
)

_VAE_ENDS = re.compile(r"(?:post_)?quant_conv|(?:encoder|decoder)\.(?:conv_in|conv_out|norm_out)")
_VAE_LEVEL = re.compile(
    r"(encoder\.down|decoder\.up)\.(\d{1,3})\.(?:block\.(\d{1,3})\.(\w+)|(downsample|upsample)\.conv)"
)
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(?:block_([12])\.(\w+)|attn_1\.(\w+))")
_VAE_RESNET = {**{n: n for n in ("norm1", "conv1", "norm2", "conv2")}, "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

# The layers of both towers of CLIP, by transformers' names.
_CLIP_LAYER = (
    r"encoder\.layers\.\d{1,3}\.(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.(weight|bias)"
)
_CLIP_TEXT = re.compile(
    rf"(?:text_model\.)?(embeddings\.(?:token|position)_embedding\.weight|{_CLIP_LAYER}|final_layer_norm\.(?:weight|bias))"
)
_OPEN_CLIP_VISION = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
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


UNET = "model.diffusion_model."
TEXT = "cond_stage_model."
_UNET_START = "input_blocks.0.0.weight"
# What wrappers of modules add to names: torch.compile, DistributedDataParallel, FSDP, its checkpointing.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def usual_names(stored: Tensors) -> dict[str, TensorHeader]:
    """The tensors by the names that latent-diffusion's checkpoints have, where a tool wrote others.

    Wrappers of modules are taken off. The UNet may lie under `diffusion_model.` without `model.`, and
    everything under one more prefix. By generative-models' names the one text encoder of 1.x and 2.x is
    called as the first of XL. Averages in place of a UNet get its names.

    Where two tensors would have one name, both keep those that they have in the file.
    """
    stored = _renamed_once(stored, lambda name: _WRAPPERS.sub("", name))
    end = f"diffusion_model.{_UNET_START}"
    unet = next((name.removesuffix(_UNET_START) for name in stored if f".{name}".endswith(f".{end}")), UNET)
    if unet != UNET and f"{UNET}{_UNET_START}" not in stored:
        outer = unet.removesuffix(UNET if unet.endswith(f".{UNET}") else UNET.removeprefix("model."))
        stored = _renamed_once(
            stored,
            lambda name: (
                UNET + name.removeprefix(unet) if name.startswith(unet) else name.removeprefix(outer)
            ),
        )
    if not any(name.startswith(UNET) for name in stored):
        stored = _renamed_once(stored, lambda name: averaged_name(name) or name)
    if f"{UNET}label_emb.0.0.weight" in stored:
        return dict(stored)
    return _renamed_once(stored, lambda name: re.sub(r"^conditioner\.embedders\.0\.", TEXT, name))


def _renamed_once(stored: Tensors, rename: Callable[[str], str]) -> dict[str, TensorHeader]:
    names = Counter(map(rename, stored))
    return {new if names[new := rename(old)] == 1 else old: tensor for old, tensor in stored.items()}


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


_DIFFUSERS_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d{1,3})|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,3})\.(.+)"
)
_ORIGINAL_ENDS = {new: old for old, new in _UNET_ENDS.items()} | {
    "class_embedding.linear_1": "label_emb.0.0",  # of Stable unCLIP
    "class_embedding.linear_2": "label_emb.0.2",
}
_ORIGINAL_RESNET = {new: old for old, new in _RESNET.items()}


def original_unet_names(modules: Collection[str]) -> dict[str, str]:
    """The modules of a UNet by UNet2DConditionModel's names -> their names in latent-diffusion.

    The inverse of `unet_tensors`. What latent-diffusion has no name for is left out.
    """
    period = len({name.split(".")[3] for name in modules if name.startswith("down_blocks.0.resnets.")}) + 1
    attending = {
        name.split(".")[1] for name in modules if re.match(r"up_blocks\.\d{1,3}\.attentions\.", name)
    }
    named = ((name, _original_unet_name(name, period, attending)) for name in modules)
    return {name: original for name, original in named if original is not None}


def _original_unet_name(module: str, period: int, attending: Collection[str]) -> str | None:
    if module in _ORIGINAL_ENDS:
        return _ORIGINAL_ENDS[module]
    match = _DIFFUSERS_BLOCK.fullmatch(module)
    if match is None:
        return None
    side, level, kind, index, rest = match.groups()
    if kind == "downsamplers":
        return f"input_blocks.{(int(level) + 1) * period}.0.op" if rest == "conv" else None
    if kind == "upsamplers":  # behind the attention, where there is one
        part = 2 if level in attending else 1
        return f"output_blocks.{(int(level) + 1) * period - 1}.{part}.conv" if rest == "conv" else None
    rest = _ORIGINAL_RESNET.get(rest) if kind == "resnets" else rest
    if rest is None:
        return None
    part = int(kind == "attentions")
    if side is None:
        return f"middle_block.{2 * int(index) + part}.{rest}"
    number = int(level) * period + int(index)
    return f"{'input' if side == 'down' else 'output'}_blocks.{number + (side == 'down')}.{part}.{rest}"


def class_unet_tensors(stored: Tensors) -> dict[str, TensorHeader]:
    """The same for Stable unCLIP's UNet, whose picture embedding takes the place of a class."""
    return {
        re.sub(r"^add_embedding\.", "class_embedding.", name): tensor
        for name, tensor in unet_tensors(stored).items()
    }


# Averaged weights have the names of their tensors without the dots. A block has at most ten parts, so the
# last digit of a block's numbers is the part's.
_AVERAGED = re.compile(
    r"diffusion_model(?:(time_embed)([02])|(label_emb)(0)([02])|(out)([02])"
    r"|(input_blocks|output_blocks)(\d{1,2})(\d)(.*?)|(middle_block)(\d)(.+?))(weight|bias)"
)
_AVERAGED_REST = re.compile(
    r"(?:(in_layers|out_layers|emb_layers)(\d)|(skip_connection|op|conv|norm|proj_in|proj_out)"
    r"|(transformer_blocks)(\d{1,2})(?:(norm\d)|(attn\d)(?:(to_[qkv])|(to_out)(0))|(ff)(net)(?:(0)(proj)|(2))))?"
)


def averaged_name(name: str) -> str | None:
    """The name of the tensor whose average this is; None for no average of a UNet's tensor.

    Latent-diffusion's `LitEma` calls `model.diffusion_model.out.0.bias` `model_ema.diffusion_modelout0bias`.
    """
    match = _AVERAGED.fullmatch(name.removeprefix("model_ema."))
    if match is None or not name.startswith("model_ema."):
        return None
    *places, end = filter(None, match.groups())
    if places[0].endswith(("block", "blocks")):
        numbers = 2 if places[0] == "middle_block" else 3
        rest = _AVERAGED_REST.fullmatch("".join(places[numbers:]))
        if rest is None:
            return None
        places = [*places[:numbers], *filter(None, rest.groups())]
    return ".".join(["model.diffusion_model", *places, end])


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
    matches = ((_CLIP_TEXT.fullmatch(name), tensor) for name, tensor in stored.items())
    return {f"text_model.{match[1]}": tensor for match, tensor in matches if match}


def open_clip_tensors(stored: Tensors) -> dict[str, TensorHeader]:
    """OpenCLIP's text tower by the names of transformers' CLIPTextModelWithProjection."""
    tensors: dict[str, TensorHeader] = {}
    for name, tensor in stored.items():
        if name in _OPEN_CLIP_ENDS:
            tensors[_OPEN_CLIP_ENDS[name]] = tensor
        elif name == "text_projection":
            tensors["text_projection.weight"] = _transposed(tensor)
        else:
            tensors |= _open_clip_layer(name, tensor, "text_model")
    return tensors


def open_clip_vision_tensors(stored: Tensors) -> dict[str, TensorHeader]:
    """The vision tower of CLIP or OpenCLIP by the names of transformers' CLIPVisionModelWithProjection."""
    tensors: dict[str, TensorHeader] = {}
    for name, tensor in stored.items():
        if name in _OPEN_CLIP_VISION:
            tensors[_OPEN_CLIP_VISION[name]] = tensor
        elif name == "proj":
            tensors["visual_projection.weight"] = _transposed(tensor)
        else:
            tensors |= _open_clip_layer(name, tensor, "vision_model")
    return tensors


def _transposed(tensor: TensorHeader) -> TensorHeader:
    """OpenCLIP's projections are parameters, (in, out)."""
    return replace(tensor, shape=tensor.shape[::-1], transposed=True)


def _open_clip_layer(name: str, tensor: TensorHeader, tower: str) -> dict[str, TensorHeader]:
    """A tensor of a transformer's layer; query, key and value lie below each other: (3 C, C) or (3 C,)."""
    match = _OPEN_CLIP_BLOCK.fullmatch(name)
    if match is None:
        return {}
    layer, part, kind = match.groups()
    place = f"{tower}.encoder.layers.{layer}"
    if part in _OPEN_CLIP_PARTS:
        return {f"{place}.{_OPEN_CLIP_PARTS[part]}.{kind}": tensor}
    if part != "attn.in_proj" or not tensor.shape:
        return {}
    rows = tensor.shape[0] // 3
    return {
        f"{place}.self_attn.{letter}_proj.{kind}": replace(
            tensor, rows=(i * rows, (i + 1) * rows), shape=(rows, *tensor.shape[1:])
        )
        for i, letter in enumerate("qkv")
    }
