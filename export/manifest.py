"""The manifest of a package, made from its checkpoint and its nets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch

from ..checkpoints.files.open import Checkpoint
from ..checkpoints.precision.calibration import colour_fields
from ..engines import spec
from ..engines.errors import DAMAGED_WEIGHTS, CheckpointError, NumericError
from ..engines.lfs import refuse_pointer
from ..engines.package import Defaults, Manifest, NetFile
from .nets.build import NETS

_PRODUCERS = ("latentrt", "torch", "diffusers", "transformers", "onnxscript")
# What `latent_rgb` is fitted to: so many pictures, of so many latent cells a side.
_PICTURES, _CELLS = 8, 16


def make_manifest(
    source: Checkpoint, dtype: Literal["fp16", "fp32"], nets: Mapping[str, NetFile], defaults: Defaults
) -> Manifest:
    """The manifest of a package with these nets, before its files are recorded.

    Raises:
        NumericError: the VAE's encoder is not finite on small pictures.
    """
    contexts = [nets[name].spec.outputs[0].shape for name in spec.TEXT_ENCODERS if name in nets]
    scale = source.latent_scale
    image_noise = source.configs.get("image_noising_scheduler")
    return Manifest(
        name=source.name,
        family=source.family,
        dtype=dtype,
        latent_channels=_size(nets["vae_decoder"].spec.inputs[0].shape[1]),
        context_width=sum(_size(shape[2]) for shape in contexts),
        scheduler=_jsonable(source.scheduler),
        nets={name: nets[name] for name in spec.NETS if name in nets},
        defaults=defaults,
        latent_scale=scale,
        size_multiple=max(8, scale),
        max_tokens=_size(contexts[0][1]),
        max_clip_skip=min(part.config.get("num_hidden_layers", 12) for part in source.text_encoders) - 1,
        zero_empty_prompt=source.zero_empty_prompt,
        time_ids=source.time_ids,
        image_latents=source.image_latents,
        image_noise=None if image_noise is None else _jsonable(image_noise),
        image_processor=source.configs.get("feature_extractor"),
        latent_rgb=fit_latent_rgb(source),
        producer=", ".join(f"{name} {version(name)}" for name in _PRODUCERS),
    )


def _size(dim: spec.Dim) -> int:
    assert isinstance(dim, int)
    return dim


def _jsonable(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Drop "-Infinity", diffusers' default of lambda_min_clipped: a missing key means the same."""
    return {key: value for key, value in scheduler.items() if value != -math.inf}


def request_defaults(source: Checkpoint) -> Defaults:
    """The family's defaults, overridden by the checkpoint's `recommended.json` if there is one.

    Raises:
        CheckpointError: `recommended.json` is damaged.
    """
    height, width = (side * source.latent_scale for side in source.sample_size)
    values: dict[str, Any] = {**source.defaults, "height": height, "width": width}
    path = source.root / "recommended.json"
    if path.is_file():
        refuse_pointer(path)
        try:
            recommended = dict(json.loads(path.read_text(encoding="utf-8")))
            Defaults(**recommended)
            values |= recommended
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error})",
                expected=f"a JSON object with some of {', '.join(sorted(vars(Defaults())))}",
                fix="Mend or remove it.",
            ) from error
    return Defaults(**values)


def fit_latent_rgb(source: Checkpoint, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """The approximate colour of a latent cell, for previews: a linear map to 0 ... 1, by least squares.

    Such maps are published for well-known autoencoders. Fitting one to the checkpoint's own encoder, by
    encoding a few small pictures in float32, works for any.

    Returns:
        (C + 1, 3): a row for each channel, then the offset.

    Raises:
        NumericError: a latent is not finite.
    """
    pictures = colour_fields(_PICTURES, _CELLS * source.latent_scale, seed)
    masks = np.zeros((*pictures.shape[:3], 1), np.uint8)
    encoder = NETS["vae_encoder"].build(source, torch.float32)
    latents, *_ = encoder.run({"image": pictures, "mask": masks})  # the mean: (N, C, h, w)
    if not np.isfinite(latents).all():
        raise NumericError(
            f"{source.vae.folder}: the encoder's latents are not finite in float32",
            expected="finite latents of small pictures",
            fix=DAMAGED_WEIGHTS,
        )
    rows: spec.Array = np.reshape(np.moveaxis(latents, 1, 3), (-1, latents.shape[1]))
    scale = pictures.shape[1] // latents.shape[2]
    blocks: spec.Array = np.reshape(pictures, (len(pictures), _CELLS, scale, _CELLS, scale, 3))
    cells: spec.Array = np.reshape(blocks.mean(axis=(2, 4)) / 255, (-1, 3))
    ones = np.ones((len(rows), 1))
    fit: list[list[float]] = np.linalg.lstsq(np.hstack([rows, ones]), cells, rcond=None)[0].tolist()
    return tuple(tuple(float(f"{value:.6g}") for value in row) for row in fit)
