"""The names of tensors in adapters' files, taken apart: which module, and which part of its change.

The grammars are those of sd-scripts (`networks/lora.py`, `oft.py`), LyCORIS (`lycoris/modules`), PEFT,
diffusers (`utils/state_dict_utils.py`), ComfyUI (`comfy/lora.py`) and OneTrainer (`convert_lora_util.py`).
Which module is meant is found in a dictionary of the model's own names (`names.py`); here only the end of a
key is looked at, and what wrappers of modules add.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Nobody's tensors have longer names, and patterns take the square of their length.
_LENGTH = 300
# A part -> what a key ends with that is one. `NAME` stands for PEFT's name of an adapter.
_ENDS: Mapping[str, str] = {
    "up": r"\.lora_up(\.weight)?|\.lora_B(\.NAME)?\.weight|\.lora_B|OLD\.up(\.weight)?",
    "down": r"\.lora_down(\.weight)?|\.lora_A(\.NAME)?\.weight|\.lora_A|OLD\.down(\.weight)?",
    "mid": r"\.lora_mid(\.weight)?|OLD\.mid(\.weight)?",
    "up_bias": r"\.lora_B(\.NAME)?\.bias|\.lora_up\.bias|OLD\.up\.bias",
    "magnitude": r"\.lora_magnitude_vector(\.NAME)?(\.weight)?",
    "alpha": r"(OLD)?\.alpha",
    **{name: rf"\.{name}" for name in ("dora_scale", "scalar", "rescale", "reshape_weight", "set_weight")},
    **{name: rf"\.{name}" for name in ("diff", "diff_b", "w_norm", "b_norm", "on_input")},
    **{f"hada_{name}": rf"\.hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": rf"\.lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{name: rf"\.{name}(\.weight)?" for name in ("a1", "a2", "b1", "b2", "bm")},
    "oft_blocks": r"\.oft_blocks",
    "oft_diag": r"\.oft_diag",
    "weight": r"\.weight",  # of IA3, beside on_input
}
_OLD = r"(?:\.lora_linear_layer|\.lora|_lora)"  # diffusers' before PEFT
_NAME = r"[A-Za-z0-9_-]+"
_END = re.compile(
    "(?:"
    + "|".join(
        f"(?P<{part}>{end.replace('OLD', _OLD).replace('NAME', _NAME)})" for part, end in _ENDS.items()
    )
    + ")$"
)
_WORDS = re.compile(r"(?:_lora)?(?:\.[^.]*){1,3}$")  # an end has at most three
# What cannot be used, by its keys -> what it is.
_REFUSED: Mapping[str, str] = {
    r"\.oft_R\b|\.oft_s\b": "an OFT of PEFT's second form (oft_R)",
    r"\.boft_(R|s|P)\b": "a BOFT of PEFT's form (boft_R)",
    r"^lllite_": "a ControlNet-LLLite",
    r"^lora_controlnet$": "a control-LoRA",
    r"\.lambda_layer$": "a T-LoRA, which changes with the step",
    r"\.lora_embedding_[AB]\b": "a LoRA of token embeddings (lora_embedding_A)",
    r"\.lokr_t1$": "a LoKr with a core in its first factor (lokr_t1)",
    r"\.ia3_l\b": "an IA3 of PEFT's form (ia3_l)",
    r"\.vera_(lambda|A|B)": "a VeRA",
    r"\.lora_(xs|R)\b|\.default_lora_latent_mapping": "a LoRA-XS",
}
# What wrappers add to a module's name, in the flattened spelling: PEFT's base model and layer, diffusers' old
# attention processors, torch.compile.
_WRAPPERS = re.compile(r"(?:^|(?<=_))(?:base_model_model|base_layer|processor|_orig_mod)_|_base_layer$")
_BUNDLED = re.compile(
    r"bundle_emb\.(?P<name>.+)\.(?P<encoder>clip_l|clip_g|string_to_param\.[^.]+|emb_params)"
)


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of an adapter: a part of the change of a module, both flattened (`flat`) and as it is spelled."""

    module: str
    spelled: str
    part: str


@dataclass(frozen=True, kw_only=True)
class BundledKey:
    """A key of an embedding that lies in an adapter: its name, and whose it is ("clip_l", "clip_g")."""

    name: str
    encoder: str


def flat(name: str) -> str:
    """A module's name as sd-scripts writes it: with underscores for dots."""
    return name.replace(".", "_")


def read_key(key: str) -> Key | None:
    """Take a key apart; None for one that no grammar has."""
    words = _WORDS.search(key) if len(key) <= _LENGTH else None
    match = _END.search(key, words.start()) if words else None
    if match is None or match.lastgroup is None or match.start() == 0:
        return None
    part, module = match.lastgroup, key[: match.start()]
    return Key(module=_WRAPPERS.sub("", flat(module)), spelled=module, part=part)


def read_bundled_key(key: str) -> BundledKey | None:
    """The same for an embedding's key, as OneTrainer writes it.

    A1111's own file (`string_to_param.*`) has one encoder's vectors, which are the first's.
    """
    match = _BUNDLED.fullmatch(key) if len(key) <= _LENGTH else None
    if match is None:
        return None
    encoder = match["encoder"]
    return BundledKey(name=match["name"], encoder=encoder if encoder.startswith("clip_") else "clip_l")


def refused_kind(key: str) -> str | None:
    """What a key belongs to that cannot be used; None for others."""
    return next((what for pattern, what in _REFUSED.items() if re.search(pattern, key[:_LENGTH])), None)
