"""The types that weights are stored in, and weights that need more than their tensor to be read.

Plain fp8 is a storage type like fp16: each number stands for itself. Quantised weights do not: a scale, a
table or a packing that only their tool knows belongs to each, and stands beside it as further tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ...engines.errors import CheckpointError
from .component import TensorHeader

# safetensors' names of the types whose numbers stand for themselves.
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Buffers of other types that lie between a part's weights and that no net reads.
_BUFFERS = ("position_ids", "num_batches_tracked")
# What a tool writes beside the weights that it quantised -> what they are. First match wins.
_MARKERS: Mapping[str, str] = {
    r"\.quant_state\.bitsandbytes|\.(nested_)?(absmax|quant_map)$": "weights in 4 bits (bitsandbytes)",
    r"\.SCB$|\.weight_format$": "weights in 8-bit integers (bitsandbytes)",
    r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale(_2)?|scale_input|input_scale)$": "weights in scaled fp8",
    r"\.comfy_quant$": "weights that ComfyUI quantised",
    r"\.(qweight|qzeros|g_idx|wscales)$": "weights in packed integers (GPTQ, AWQ or SVDQuant)",
    r"\.weight\._(data|scale)$": "weights that Quanto quantised",
}
_FIX = "Use the checkpoint's fp16 or fp32 weights; bf16 and fp8 without scales are read too."


def quantisation(names: Mapping[str, object]) -> tuple[str, str] | None:
    """What quantised weights a file with these tensors holds, and the tensor that says so; None for none."""
    for name in names:
        for pattern, kind in _MARKERS.items():
            if re.search(pattern, name):
                return kind, name
    return None


def refuse_quantised(where: Path, tensors: Mapping[str, TensorHeader]) -> None:
    """Raise CheckpointError for a part with weights of other types than WEIGHT_TYPES, or with scales."""
    refuse_markers(where, tensors)
    refuse_types(where, tensors)


def refuse_markers(where: Path, names: Mapping[str, object]) -> None:
    """Raise CheckpointError for tensors that belong to quantised weights, saying what those are."""
    if found := quantisation(names):
        kind, name = found
        raise CheckpointError(
            f"{where} holds {kind} (it has {name[:80]!r})",
            expected=f"weights that stand for themselves, in {', '.join(WEIGHT_TYPES)}",
            fix=_FIX,
        )


def refuse_types(where: Path, tensors: Mapping[str, TensorHeader]) -> None:
    """Raise CheckpointError for a weight of another type than WEIGHT_TYPES."""
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_TYPES and not name.endswith(_BUFFERS):
            raise CheckpointError(
                f"{where} stores the weight {name[:80]!r} as {tensor.dtype}",
                expected=f"one of {', '.join(WEIGHT_TYPES)}",
                fix=_FIX,
            )
