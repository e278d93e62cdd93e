"""The torch nets, as modules whose forward has exactly the contract's inputs and outputs.

Modules are built without weights (on the meta device) and then take the checkpoint's tensors as they are,
memory-mapped: no second copy, no initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..engines import spec
from ..engines.errors import CheckpointError
from .checkpoint import Checkpoint, Component

# Tensors that old checkpoints hold and no net reads: buffers, and the projections of the full CLIP.
_UNREAD = ("position_ids", "text_projection.weight", "logit_scale")
# diffusers before 0.15 named the VAE's attention so; `AutoencoderKL` still converts it on load.
_OLD_ATTENTION = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}
_TEXT_PREFIX = "text_model."  # transformers before 5


@dataclass(frozen=True, kw_only=True)
class Net:
    """A torch module that satisfies `spec`, and what becomes of its tensors.

    `tensors` maps the name of a parameter in `module` to the name a package stores it under, and to the type
    (safetensors' name) the checkpoint has it in.
    """

    name: str
    module: nn.Module
    spec: spec.NetSpec
    tensors: Mapping[str, tuple[str, str]]


class TextEncoder(nn.Module):
    """`CLIPTextModel` from transformers, down to its last hidden state."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(P, T) int32 -> (P, T, width)."""
        return self.net(input_ids, return_dict=False)[0]


class WholeUnet(nn.Module):
    """`UNet2DConditionModel` from diffusers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        # diffusers upsamples to the size of the skip connection only when the latent is no multiple of
        # 2**num_upsamplers, else by two: one graph for all sizes needs the former always, which is equal.
        cast(Any, net).num_upsamplers = 30
        self.net = net

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """(B, 4, H/8, W/8), (B,) float32, (B, T, width) -> (B, 4, H/8, W/8)."""
        return self.net(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class VaeDecoder(nn.Module):
    """`AutoencoderKL.decode`, with diffusers' scaling before and its conversion to uint8 behind."""

    def __init__(self, net: nn.Module, scale: float, shift: float) -> None:
        super().__init__()
        self.net = net
        self.scale = scale
        self.shift = shift

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 4, H/8, W/8) -> (N, H, W, 3) uint8, (N,) float32."""
        latent = latent / self.scale
        if self.shift:
            latent = latent + self.shift
        pixels = (
            cast(Any, self.net).decode(latent, return_dict=False)[0].float()
        )  # (N, 3, H, W), about -1 ... 1
        # As VaeImageProcessor: denormalize, pt_to_numpy, numpy_to_pil. Transposed before the cast because
        # uint8 is no more than a type of inputs and outputs in TensorRT.
        shades = (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return shades.round().to(torch.uint8), pixels.mean(dim=(1, 2, 3))


def text_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> Net:
    """The text encoder with the checkpoint's weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    part = checkpoint.text_encoder
    # sdpa becomes the ONNX operator Attention; the eager form would not.
    settings: dict[str, Any] = {**part.config, "attn_implementation": "sdpa"}
    config = CLIPTextConfig(**settings)
    with torch.device("meta"):
        net = CLIPTextModel(config)
    for module in cast(nn.Module, net).modules():
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, torch.Tensor):  # the one buffer that no checkpoint stores
            cast(Any, module).position_ids = torch.arange(positions.shape[-1])[None]
    names = {name: name for name in net.state_dict()}
    if any(name.startswith(_TEXT_PREFIX) for name in part.tensors):
        names = {name: _TEXT_PREFIX + name.removeprefix(_TEXT_PREFIX) for name in names}
    tensors = _load(part, net, names)
    contract = spec.text_encoder(
        tokens=config.max_position_embeddings, width=config.hidden_size, float_dtype=_spelled(dtype)
    )
    return _net("text_encoder", TextEncoder(net), contract, tensors, dtype)


def unet(checkpoint: Checkpoint, dtype: torch.dtype) -> Net:
    """The UNet with the checkpoint's weights, before hoisting."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    part = checkpoint.unet
    with torch.device("meta"):
        net: nn.Module = cast(Any, UNet2DConditionModel).from_config(dict(part.config))
    tensors = _load(part, net, {name: name for name in net.state_dict()})
    width = cast(Any, net).config.cross_attention_dim
    contract = spec.unet_whole(channels=4, width=width, float_dtype=_spelled(dtype))
    return _net("unet_whole", WholeUnet(net), contract, tensors, dtype)


def vae_decoder(checkpoint: Checkpoint, dtype: torch.dtype) -> Net:
    """The VAE's decoder with the checkpoint's weights; its encoder is not even read."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    part = checkpoint.vae
    with torch.device("meta"):
        net: Any = cast(Any, AutoencoderKL).from_config(dict(part.config))
    del net.encoder
    net.quant_conv = None
    names: dict[str, str] = {name: name for name in net.state_dict()}
    if any(".query." in name for name in part.tensors):
        new = {_modern(name): name for name in part.tensors}
        names = {name: new.get(name, name) for name in names}
    tensors = _load(part, net, names, ignored=("encoder.", "quant_conv."))
    # Stored under today's names, whatever the checkpoint's were.
    tensors = {name: (name, found[1]) for name, found in tensors.items()}
    scale, shift = net.config.scaling_factor, net.config.shift_factor or 0.0
    contract = spec.vae_decoder(channels=net.config.latent_channels, float_dtype=_spelled(dtype))
    return _net("vae_decoder", VaeDecoder(net, scale, shift), contract, tensors, dtype)


def _modern(name: str) -> str:
    for old, new in _OLD_ATTENTION.items():
        if ".attentions." in name:
            name = name.replace("." + old, "." + new)
    return name


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _net(
    name: str,
    module: nn.Module,
    contract: spec.NetSpec,
    tensors: Mapping[str, tuple[str, str]],
    dtype: torch.dtype,
) -> Net:
    module = module.eval().requires_grad_(False)
    if dtype == torch.float16:
        _refuse_overflow(name, module, tensors)
    module = module.to(dtype)
    named = {f"net.{key}": found for key, found in tensors.items()}
    return Net(name=name, module=module, spec=contract, tensors=named)


def _refuse_overflow(net: str, module: nn.Module, tensors: Mapping[str, tuple[str, str]]) -> None:
    """A weight is stored in fp16, islands or not: none may become infinite on the way."""
    largest = torch.finfo(torch.float16).max
    for key, tensor in module.state_dict().items():
        if tensor.dtype == torch.float16 or not tensor.is_floating_point():
            continue
        low, high = torch.aminmax(tensor)
        found = max(-float(low), float(high))
        if largest < found < math.inf:
            stored = tensors[key.removeprefix("net.")][0]
            raise CheckpointError(
                f"{net}: the tensor {stored!r} has values up to {found:.3g}",
                expected=f"at most {largest:.0f}, fp16's largest number",
                fix="Export with --dtype fp32.",
            )


def _load(
    part: Component, net: nn.Module, names: Mapping[str, str], ignored: tuple[str, ...] = ()
) -> dict[str, tuple[str, str]]:
    """Give `net` the checkpoint's tensors, memory-mapped. `names`: the module's name -> the checkpoint's."""
    from safetensors import safe_open

    wanted = net.state_dict()
    unread = {n for n in part.tensors if n.endswith(_UNREAD) or n.startswith(ignored or "\0")}
    missing = sorted(name for name in names.values() if name not in part.tensors)
    surplus = sorted(set(part.tensors) - set(names.values()) - unread)
    odd = [
        f"{n} {part.tensors[f].shape}"
        for n, f in names.items()
        if f in part.tensors and not _fits(part, f, wanted[n])
    ]
    if missing or surplus or odd:
        raise CheckpointError(
            f"{part.folder} has weights that do not fit its config.json (missing: {missing[:3]}; unknown:"
            f" {surplus[:3]}; other shape: {odd[:3]}; {len(missing) + len(surplus) + len(odd)} in all)",
            expected="the weights that config.json describes",
            fix="Download the checkpoint again, or take config.json from the model it was trained from.",
        )
    state: dict[str, torch.Tensor] = {}
    for file in sorted({header.file for header in part.tensors.values()}):
        with cast(Any, safe_open)(file, framework="pt") as stream:
            state |= {n: stream.get_tensor(f) for n, f in names.items() if part.tensors[f].file == file}
    net.load_state_dict(state, assign=True)
    return {name: (file_name, part.tensors[file_name].dtype) for name, file_name in names.items()}


def _fits(part: Component, name: str, wanted: torch.Tensor) -> bool:
    return part.tensors[name].shape == tuple(wanted.shape)


# A package's folder -> what makes its net.
BUILD: Mapping[str, Callable[[Checkpoint, torch.dtype], Net]] = {
    "text_encoder": text_encoder,
    "unet": unet,
    "vae_decoder": vae_decoder,
}
