"""What else a one-file checkpoint holds: tensors and metadata that nothing uses, said in two lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# A pattern of tensor names -> what they are. First match wins; whatever matches none has "no known use".
_KINDS: Mapping[str, str] = {
    r"^model_ema\.": "averaged weights",
    r"\bposition_ids$": "positions of tokens",
    r"\blogit_scale$": "CLIP's scale of likeness",
    r"^(betas|alphas_cumprod(_prev)?|(sqrt|log)_\w+|posterior_\w+|lvlb_weights)$": "the noise schedule",
    r"^(denoiser|model_sampling|noise_augmentor)\.": "the noise schedule",
    r"^(logvar|scale_factor)$": "the training's state",
    r"^(optimizer|optimizer_states?|lr_schedulers?|callbacks|loops|amp_\w+|scaler)\b": "the training's state",
    r"^(global_step|epoch|step)$": "the training's state",
    r"\bnum_batches_tracked$": "the training's state",
    r"^first_stage_model\.loss\.": "the autoencoder's critic",
    r"^safety_checker\.": "a safety checker",
    r"^cond_stage_model\.model\.(transformer\.resblocks\.23\.|text_projection)": "the last layer of ViT-H",
    r"^cond_stage_model\.model\.attn_mask$|\battn_mask$": "a mask of attention",
    r"^embedder\.model\.": "the image encoder's text half",
    r"\b(vision_model|visual_projection|text_projection)\b": "another half of CLIP",
    r"^(lora|lycoris)_|\.lora_(up|down|A|B)\b": "a LoRA's",
    r"^(bundle_emb|emb_params|string_to_param)\b": "embeddings",
    r"^control_model\.": "a ControlNet's",
}
# What is no tensor that a UNet needs, wherever it lies in the UNet.
HARMLESS = re.compile(r"\b(num_batches_tracked|position_ids)$")
_NOTHING = "of no known use"
_NAMES = 3  # as many are quoted


def unused_tensors(names: Iterable[str]) -> tuple[str, ...]:
    """One note of all tensors that are not used: how many, what they are and an example; none for none."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        kind = next((kind for pattern, kind in _KINDS.items() if re.search(pattern, name)), _NOTHING)
        found.setdefault(kind, []).append(name)
    if not found:
        return ()
    words = [f"{kind}: {len(those)} ({_quoted(those)})" for kind, those in found.items()]
    return (f"tensors that are not used: {'; '.join(words)}",)


def unread_metadata(metadata: Mapping[str, str], read: Iterable[str]) -> tuple[str, ...]:
    """One note of the metadata that decides nothing; none for none."""
    names = sorted(set(metadata) - set(read) - {"format"})
    return (f"metadata that is not used: {_quoted(names)}",) if names else ()


def _quoted(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:_NAMES])
    return shown if len(names) <= _NAMES else f"{shown} and {len(names) - _NAMES} more"
