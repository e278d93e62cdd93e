"""One-file checkpoints: recognised by their tensor names, to say what was found. Not exported yet.

Keys: diffusers' `loaders/single_file_utils.py` (CHECKPOINT_KEY_NAMES) and stable-diffusion.cpp's `model.cpp`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NoReturn, cast

from ..engines.errors import CheckpointError

_HEADER_LIMIT = 100 * 2**20  # bytes; safetensors' own limit
# A tensor name that only this family has -> the family. First match wins.
_KEYS = {
    "double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": "Stable Diffusion 3",
    "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": "SDXL",
    "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": "the SDXL refiner",
    "cond_stage_model.model.transformer.resblocks.9.mlp.c_proj.bias": "Stable Diffusion 2.x",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "Stable Diffusion 1.x",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "model.diffusion_model.input_blocks.0.0.weight": "a Stable Diffusion UNet",
}
_CONVERT = (
    'Convert it: python -c "from diffusers import StableDiffusionPipeline as P;'
    " P.from_single_file('FILE').save_pretrained('FOLDER')\"."
)


def refuse_file(path: Path) -> NoReturn:
    """Raise CheckpointError that names the family of a one-file checkpoint."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is a {path.suffix or 'nameless'} file: a pickle can run code when it is read",
            expected="a diffusers folder with safetensors weights",
            fix=_CONVERT,
        )
    raise CheckpointError(
        f"{path} is a single file of {_family(path)}", expected="a diffusers folder", fix=_CONVERT
    )


def _family(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            names = cast(dict[str, object], json.loads(stream.read(min(size, _HEADER_LIMIT))))
        return next((family for key, family in _KEYS.items() if key in names), "an unknown family")
    except (struct.error, ValueError, TypeError, RecursionError):
        return "no known format (the safetensors header is damaged)"
