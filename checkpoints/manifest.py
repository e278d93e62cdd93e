"""The manifest of a package, made from its checkpoint and its nets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..engines import spec
from ..engines.package import Defaults, Manifest, NetFile
from .controls.control_file import CONTROLNET, IP_ADAPTER, T2I_ADAPTER, ControlFile
from .files.open import Checkpoint
from .files.source import Source

if TYPE_CHECKING:
    from .templates.archive import Dtype

LatentRgb = tuple[tuple[float, ...], ...]
# An autoencoder's scaling factor -> what its latents look like: red, green and blue, -1 ... 1, of each
# channel, and an offset (ComfyUI, comfy/latent_formats.py, SD15 and SDXL). All autoencoders of a family share
# them, since its UNets draw in one space of latents.
_PUBLISHED_RGB: Mapping[float, LatentRgb] = {
    0.18215: (
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
        (0.0, 0.0, 0.0),
    ),
    0.13025: (
        (0.3651, 0.4232, 0.4341),
        (-0.2533, -0.0042, 0.1068),
        (0.1076, 0.1111, -0.0362),
        (-0.3165, -0.2492, -0.2188),
        (0.1084, -0.0175, -0.0011),
    ),
}


def source_facts(source: Source) -> dict[str, Any]:
    """What a manifest says of a source besides its nets and configs, for its identity.

    Raises:
        CheckpointError: a number that no request could have.
    """
    if isinstance(source, Checkpoint):
        return {
            "defaults": vars(request_defaults(source)),
            "zero_empty_prompt": source.zero_empty_prompt,
        }
    assert isinstance(source, ControlFile)
    return {"control": source.facts}


def manifest_of(
    source: Source,
    dtype: Dtype,
    nets: Mapping[str, NetFile],
    *,
    latent_rgb: Callable[[], LatentRgb],
    producer: str,
) -> Manifest:
    """The manifest of a package with these nets, before its files are recorded.

    `latent_rgb` and `producer` are as in `Manifest`; `published_latent_rgb` has one for most checkpoints.
    """
    if isinstance(source, Checkpoint):
        return _of_checkpoint(source, dtype, nets, latent_rgb(), producer)
    assert isinstance(source, ControlFile)
    return Manifest(
        name=source.name,
        family=source.family,
        dtype=dtype,
        scheduler={},
        nets={name: nets[name] for name in spec.NETS if name in nets},
        latent_scale=source.latent_scale,
        control=source.facts,
        producer=producer,
        **_CONTROL_FACTS[source.kind](source, nets),
    )


def _of_controlnet(source: ControlFile, nets: Mapping[str, NetFile]) -> dict[str, Any]:
    config = source.part.config
    return {
        "latent_channels": _size(nets["controlnet"].spec.inputs[0].shape[1]),
        "context_width": int(config["cross_attention_dim"]),
    }


def _of_t2i_adapter(source: ControlFile, nets: Mapping[str, NetFile]) -> dict[str, Any]:
    return {
        "latent_channels": 4,
        "context_width": 0,
        "size_multiple": int(source.part.config["downscale_factor"]),
    }


def _of_ip_adapter(source: ControlFile, nets: Mapping[str, NetFile]) -> dict[str, Any]:
    config = source.part.config
    return {
        "latent_channels": 4,
        "context_width": int(config.get("output_dims") or config["cross_attention_dim"]),
        "image_processor": _jsonable(source.processor),
    }


_CONTROL_FACTS: Mapping[str, Callable[[ControlFile, Mapping[str, NetFile]], dict[str, Any]]] = {
    CONTROLNET: _of_controlnet,
    T2I_ADAPTER: _of_t2i_adapter,
    IP_ADAPTER: _of_ip_adapter,
}


def _of_checkpoint(
    source: Checkpoint,
    dtype: Dtype,
    nets: Mapping[str, NetFile],
    latent_rgb: LatentRgb,
    producer: str,
) -> Manifest:
    contexts = [nets[name].spec.outputs[0].shape for name in spec.TEXT_ENCODERS if name in nets]
    scale = source.latent_scale
    image_noise = source.configs.get("image_noising_scheduler")
    image_processor = source.configs.get("feature_extractor")
    return Manifest(
        name=source.name,
        family=source.family,
        dtype=dtype,
        latent_channels=_size(nets["vae_decoder"].spec.inputs[0].shape[1]),
        context_width=sum(_size(shape[2]) for shape in contexts),
        scheduler=_jsonable(source.scheduler),
        nets={name: nets[name] for name in spec.NETS if name in nets},
        defaults=request_defaults(source),
        latent_scale=scale,
        size_multiple=max(8, scale),
        max_tokens=_size(contexts[0][1]),
        max_clip_skip=min(part.config.get("num_hidden_layers", 12) for part in source.text_encoders) - 1,
        zero_empty_prompt=source.zero_empty_prompt,
        time_ids=source.time_ids,
        image_latents=source.image_latents,
        image_noise=None if image_noise is None else _jsonable(image_noise),
        image_processor=None if image_processor is None else _jsonable(image_processor),
        latent_rgb=latent_rgb,
        fused=source.fused,
        producer=producer,
    )


def published_latent_rgb(source: Checkpoint) -> LatentRgb:
    """`Manifest.latent_rgb` of a checkpoint of a known family; () where its autoencoder scales otherwise."""
    published = _PUBLISHED_RGB.get(float(source.vae.config.get("scaling_factor", 0.0)))
    if published is None:
        return ()
    *rows, offset = published
    shades = (*rows, tuple(value + 1 for value in offset))  # from -1 ... 1 to 0 ... 1
    return tuple(tuple(round(value / 2, 5) for value in row) for row in shades)


def _size(dim: spec.Dim) -> int:
    assert isinstance(dim, int)
    return dim


def _jsonable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what a manifest cannot hold: numbers that are not finite, and broken letters.

    "-Infinity" is diffusers' default of lambda_min_clipped: a missing key means the same. Of the other keys
    that are read, the values were checked (`files.configs`).
    """
    return {key: value for key, value in config.items() if _is_storable(key, value)}


def _is_storable(key: str, value: object) -> bool:
    try:
        json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


def request_defaults(source: Checkpoint) -> Defaults:
    """What a request gets when it does not say."""
    height, width = (side * source.latent_scale for side in source.sample_size)
    values: dict[str, Any] = {"height": height, "width": width, **source.defaults, **source.few_steps}
    return Defaults(**values)
