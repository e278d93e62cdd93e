"""The manifest of a package, made from its checkpoint and its nets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

from ..engines import spec
from ..engines.errors import CheckpointError
from ..engines.package import Defaults, Manifest, NetFile
from .checkpoint.open import Checkpoint
from .nets.latent_rgb import fit_latent_rgb


def make_manifest(
    source: Checkpoint, dtype: Literal["fp16", "fp32"], nets: Mapping[str, NetFile]
) -> Manifest:
    """The manifest of a package with these nets, before its files are recorded.

    Raises:
        CheckpointError: `recommended.json` is damaged.
        NumericError: the VAE's encoder is not finite on small pictures.
    """
    contexts = [nets[name].spec.outputs[0].shape for name in spec.TEXT_ENCODERS if name in nets]
    scale = source.latent_scale
    image_processor, image_noise = (
        source.configs.get(name) for name in ("feature_extractor", "image_noising_scheduler")
    )
    return Manifest(
        name=source.root.resolve().stem if source.root.is_file() else source.root.resolve().name,
        family=source.family,
        dtype=dtype,
        latent_channels=_size(nets["vae_decoder"].spec.inputs[0].shape[1]),
        context_width=sum(_size(shape[2]) for shape in contexts),
        scheduler=_jsonable(source.scheduler),
        nets={name: nets[name] for name in spec.NETS if name in nets},
        defaults=_defaults(source, scale),
        latent_scale=scale,
        size_multiple=max(8, scale),
        max_tokens=_size(contexts[0][1]),
        max_clip_skip=min(part.config.get("num_hidden_layers", 12) for part in source.text_encoders) - 1,
        zero_empty_prompt=source.zero_empty_prompt,
        time_ids=source.time_ids,
        image_latents=source.image_latents,
        image_noise=None if image_noise is None else _jsonable(image_noise),
        image_processor=image_processor,
        latent_rgb=fit_latent_rgb(source),
        producer=_producer(),
    )


def _size(dim: spec.Dim) -> int:
    assert isinstance(dim, int)
    return dim


def _jsonable(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Drop "-Infinity", diffusers' default of lambda_min_clipped: a missing key means the same."""
    return {key: value for key, value in scheduler.items() if value != -math.inf}


def _producer() -> str:
    packages = ("latentrt", "torch", "diffusers", "transformers", "onnxscript")
    return ", ".join(f"{name} {version(name)}" for name in packages)


def _defaults(source: Checkpoint, scale: int) -> Defaults:
    """The family's defaults, overridden by the checkpoint's `recommended.json` if there is one."""
    size = source.unet.config.get("sample_size") or 64
    height, width = cast(list[int], size) if isinstance(size, list) else (size, size)
    values: dict[str, Any] = {
        **source.defaults,
        "height": height * scale,
        "width": width * scale,
    }
    path = source.root / "recommended.json"
    if path.is_file():
        values |= _recommended(path)
    return Defaults(**values)


def _recommended(path: Path) -> dict[str, Any]:
    try:
        data = dict(json.loads(path.read_text(encoding="utf-8")))
        Defaults(**data)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error})",
            expected=f"a JSON object with some of {', '.join(sorted(vars(Defaults())))}",
            fix="Mend or remove it.",
        ) from error
    return data
