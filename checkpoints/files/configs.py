"""The values in a folder's configs that its reader counts with: of the type and range that they must have.

They are checked as a folder is read, before its gigabytes are. The rules are those of diffusers' and
transformers' classes, whose published configs all keep them; keys without a rule may hold anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...engines.errors import CheckpointError, SamplerError
from ...engines.lfs import refuse_pointer
from ...engines.noise_schedule import NoiseSchedule
from ...engines.package import Defaults
from .component import DOWNLOAD, read_json

_FIX = f"Correct it, or take the published file. {DOWNLOAD}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a value may be, for people and as a test."""

    expected: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        """Either of two."""
        return Rule(
            expected=f"{self.expected}, or {other.expected}",
            accepts=lambda value: self.accepts(value) or other.accepts(value),
        )


Rules = Mapping[str, Rule]


def _whole(low: int, high: int) -> Rule:
    return Rule(
        expected=f"a whole number from {low} to {high}",
        accepts=lambda value: type(value) is int and low <= value <= high,
    )


def _number(low: float = -math.inf, high: float = math.inf) -> Rule:
    """A finite number, not below `low` nor above `high`."""
    bounds = "" if math.isinf(high) else f" from {low:g} to {high:g}"
    return Rule(
        expected=f"a number{bounds}",
        accepts=lambda value: type(value) in (int, float) and _is_finite(value) and low <= value <= high,
    )


def _is_finite(value: float) -> bool:
    return abs(value) < 2.0**1000  # also of whole numbers that no float holds


def _list_of(rule: Rule) -> Rule:
    return Rule(
        expected=f"a list, of which each is {rule.expected}",
        accepts=lambda value: isinstance(value, list) and all(map(rule.accepts, cast(list[Any], value))),
    )


def _two_of(rule: Rule) -> Rule:
    every = _list_of(rule)
    return Rule(
        expected=f"a list of two: {rule.expected}",
        accepts=lambda value: every.accepts(value) and len(cast(list[Any], value)) == 2,
    )


def _one_of(*values: object) -> Rule:
    return Rule(expected=" or ".join(map(str, values)), accepts=lambda value: value in values)


_NULL = Rule(expected="null", accepts=lambda value: value is None)
_TEXT = Rule(expected="a text", accepts=lambda value: isinstance(value, str))
_WIDTH = _whole(1, 2**20)  # of layers; those of SDXL end at 2816
_CELLS = _whole(1, 2**11)  # of a latent's side: 8 pixels each, and no picture is larger than 16384
_WIDTHS = _list_of(_WIDTH)
_LEVELS = Rule(
    expected=f"{_WIDTHS.expected}, not empty",
    accepts=lambda value: _WIDTHS.accepts(value) and bool(value),
)
_BETA = _number(0, 1)

_UNET: Rules = {
    "sample_size": _CELLS | _two_of(_CELLS) | _NULL,
    "in_channels": _WIDTH,
    "cross_attention_dim": _WIDTH | _WIDTHS,
    "time_cond_proj_dim": _WIDTH | _NULL,
    "projection_class_embeddings_input_dim": _WIDTH | _NULL,
    "addition_time_embed_dim": _WIDTH | _NULL,
    "block_out_channels": _WIDTHS,
}
_VAE: Rules = {
    "latent_channels": _WIDTH,
    "scaling_factor": _number(),
    "block_out_channels": _WIDTHS,
    "decoder_block_out_channels": _WIDTHS,
}
_CLIP: Rules = {
    "hidden_size": _WIDTH,
    "projection_dim": _WIDTH,
    "num_hidden_layers": _whole(1, 1000),
    "max_position_embeddings": _WIDTH,
    "vocab_size": _whole(1, 2**24),
    "image_size": _whole(1, 2**14),
}
# What `runtime.sampling` reads of a scheduler. Its flags may be anything, as in diffusers.
_SCHEDULER: Rules = {
    "_class_name": _TEXT,
    "num_train_timesteps": _whole(1, 100_000),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": _TEXT,
    "trained_betas": _list_of(_BETA) | _NULL,
    "timestep_spacing": _one_of("leading", "linspace", "trailing"),
    "steps_offset": _whole(0, 100_000),
    "sigma_min": _number() | _NULL,
    "sigma_max": _number() | _NULL,
    "solver_order": _whole(1, 3),
    "lambda_min_clipped": _number() | _one_of(-math.inf),
    "original_inference_steps": _whole(1, 100_000),
    "timestep_scaling": _number(),
    "disable_corrector": _list_of(_whole(0, 100_000)),
    "_use_default_values": _list_of(_TEXT),
}
_PROCESSOR: Rules = {
    "image_mean": _list_of(_number()) | _NULL,
    "image_std": _list_of(_number()) | _NULL,
    "rescale_factor": _number(),
}
_CONTROLNET: Rules = {
    "in_channels": _WIDTH,
    "conditioning_channels": _WIDTH,
    "block_out_channels": _LEVELS,
    "conditioning_embedding_out_channels": _LEVELS,
    "down_block_types": _list_of(_one_of("CrossAttnDownBlock2D", "DownBlock2D")),
    "layers_per_block": _whole(1, 100),
    "transformer_layers_per_block": _whole(0, 100) | _list_of(_whole(0, 100)),
    "cross_attention_dim": _WIDTH,
    "attention_head_dim": _WIDTH | _WIDTHS,
    "num_attention_heads": _WIDTH | _WIDTHS | _NULL,
    "addition_time_embed_dim": _WIDTH | _NULL,
    "projection_class_embeddings_input_dim": _WIDTH | _NULL,
    "controlnet_conditioning_channel_order": _one_of("rgb", "bgr"),
    "num_control_type": _whole(1, 100),
    "num_trans_channel": _WIDTH,
    "num_trans_layer": _whole(0, 100),
    "num_proj_channel": _WIDTH,
}
_T2I_ADAPTER: Rules = {
    "in_channels": _whole(1, 4),
    "channels": _LEVELS,
    "num_res_blocks": _whole(1, 100),
    "downscale_factor": _whole(1, 64),
    "adapter_type": _one_of("full_adapter", "full_adapter_xl", "light_adapter"),
}
_RULES: Mapping[str, Rules] = {
    "unet": _UNET,
    "vae": _VAE,
    "tiny_vae": _VAE,
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    "image_encoder": _CLIP,
    "image_normalizer": {"embedding_dim": _WIDTH},
    "scheduler": _SCHEDULER,
    "image_noising_scheduler": _SCHEDULER,
    "feature_extractor": _PROCESSOR,
    "controlnet": _CONTROLNET,
    "t2i-adapter": _T2I_ADAPTER,
}
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def read_config(path: Path, part: str) -> dict[str, Any]:
    """Read the config of a part ("unet", "scheduler"), and check it. Raises CheckpointError."""
    config = read_json(path)
    check_config(config, path, part)
    return config


def check_config(config: Mapping[str, Any], path: Path, part: str) -> None:
    """Raise CheckpointError, naming file and key, for a value that no checkpoint could have.

    Args:
        config: the config as it is in the file.
        path: the file, for the message.
        part: what the config is of, such as "unet" or "scheduler".
    """
    for key, rule in _RULES.get(part, {}).items():
        if key in config and not rule.accepts(config[key]):
            raise CheckpointError(f"{path}: {key} is {_shown(config[key])}", expected=rule.expected, fix=_FIX)
    if _RULES.get(part) is _SCHEDULER:
        _check_betas(config, path)


def _shown(value: object) -> str:
    """A value as the file has it, or the beginning of it."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _check_betas(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError unless the noise schedule of a scheduler's config can be computed."""
    values = {key: config[key] for key in _BETAS if key in config}
    if values.get("trained_betas") is not None:
        values["trained_betas"] = tuple(values["trained_betas"])
    try:
        NoiseSchedule(**values)
    except SamplerError as error:
        raise CheckpointError(f"{path}: {error.found}", expected=error.expected, fix=_FIX) from error


RECOMMENDED = "recommended.json"


def read_recommended(root: Path) -> dict[str, Any]:
    """What a checkpoint's folder recommends for requests, by the names of `Defaults`; none where it does not.

    Raises:
        CheckpointError: its `recommended.json` is damaged.
    """
    path = root / RECOMMENDED
    if not path.is_file():
        return {}
    refuse_pointer(path)
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        Defaults(**found)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error})",
            expected=f"a JSON object with some of {', '.join(sorted(vars(Defaults())))}",
            fix="Mend or remove it.",
        ) from error
    return found
