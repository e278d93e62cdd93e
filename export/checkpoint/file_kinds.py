"""Recognises weights files that are not a whole checkpoint that can be exported, and refuses them by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ...engines.errors import CheckpointError
from .component import REFUSED_CHANNELS
from .tensors import TensorHeader

UNET = "model.diffusion_model."
_CONV_IN = f"{UNET}input_blocks.0.0.weight"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_WHOLE = "UNet, text encoders and autoencoder of Stable Diffusion 1.x or 2.x, SDXL or its refiner in one file"

# A pattern that only this kind's tensor names match -> the kind's name. First match wins.
_KINDS = {
    r"^lora_|\.lora(_down|_up|_A|_B|_linear_layer|\.down|\.up)\.|\.hada_w1_|\.lokr_w1": "a LoRA",
    r"^control_model\.|^controlnet_cond_embedding\.|^input_hint_block\.": "a ControlNet",
    r"^(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.": "Flux",
    r"^(model\.diffusion_model\.)?joint_blocks\.0\.": "Stable Diffusion 3",
    r"^edm_mean$": "Playground 2.5",
    r"^(embedder|noise_augmentor)\.": "Stable unCLIP",
    r"\bmotion_modules\.": "AnimateDiff",
}
# The same for files with one part of a checkpoint.
_PARTS = {
    r"^first_stage_model\.|^(vae\.)?(encoder|decoder)\.conv_in\.weight$": "an autoencoder alone",
    r"^(emb_params|clip_l|clip_g)$": "a textual inversion",
    r"^input_blocks\.0\.0\.weight$|^down_blocks\.0\.": "a UNet alone",
    r"^(cond_stage_model|conditioner|text_model|embeddings|transformer)\.": "a text encoder alone",
}


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for a file that is a pickle by its name or its first bytes."""
    start = b""
    with suppress(OSError):  # the next reader reports it
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(4)
    if path.suffix in _PICKLES or start == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x04"):
        raise CheckpointError(
            f"{path} is a pickle: reading one can run code",
            expected="a .safetensors file or a diffusers folder",
            fix=f"Convert it: latentrt convert {path} -o {path.with_suffix('.safetensors')}",
        )


def refuse_other_kinds(path: Path, tensors: Mapping[str, TensorHeader]) -> None:
    """Raise CheckpointError for a file without a Stable Diffusion UNet of 4 or 9 input channels."""
    names = "\n".join(tensors)
    for pattern, kind in _KINDS.items():
        if re.search(pattern, names, re.MULTILINE):
            _refuse(path, kind)
    if _CONV_IN not in tensors:
        found = (kind for pattern, kind in _PARTS.items() if re.search(pattern, names, re.MULTILINE))
        _refuse(path, next(found, f"no kind that is known ({', '.join(list(tensors)[:3])} …)"[:200]))
    shape = tensors[_CONV_IN].shape
    channels = shape[1] if len(shape) == 4 else 0
    if channels not in (4, 9):
        _refuse(path, REFUSED_CHANNELS.get(channels, f"a UNet of {channels} input channels"))
    if f"{UNET}label_emb.0.0.weight" in tensors and "\ncond_stage_model." in names:
        _refuse(path, "a class-conditioned model, such as Stable unCLIP")


def _refuse(path: Path, kind: str) -> NoReturn:
    raise CheckpointError(
        f"{path} is {kind}", expected=_WHOLE, fix="Export the checkpoint that it belongs to, or another one."
    )
