"""Autoencoders from elsewhere: another in place of the checkpoint's own, or a tiny one for previews."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...engines.errors import CheckpointError
from .component import DIFFUSERS, Component, TensorHeader, read_component, read_headers
from .families import refuse_pickle
from .single_file import open_vae_file

TINY = "AutoencoderTiny"
_KINDS = ("AutoencoderKL", TINY)
# A tiny decoder's first convolution, by diffusers' names and in TAESD's own files.
_TINY_NAMES = {"decoder.layers.0.weight", "1.weight"}
_FIX = "Use the folder or file of an AutoencoderKL, or of an AutoencoderTiny (TAESD)."


def is_tiny(vae: Component) -> bool:
    """Whether it is an AutoencoderTiny: it has no posterior, and is fast enough for a preview each step."""
    return vae.config.get("_class_name") == TINY


def vae_scale(vae: Component) -> int:
    """Pixels per latent cell, as diffusers' pipelines compute it."""
    widths = vae.config.get("decoder_block_out_channels" if is_tiny(vae) else "block_out_channels")
    return int(2 ** (len(widths or (0,) * 4) - 1))


def open_vae(path: Path, *, scaling_factor: float, prefer_fp16: bool = False) -> Component:
    """The autoencoder in a diffusers folder or a `.safetensors` file, as a part named "vae".

    `scaling_factor` is for files, which do not have it.

    Raises:
        CheckpointError: it is missing, damaged or of another kind, or has no encoder.
    """
    found = _open(path, "vae", scaling_factor, prefer_fp16)
    if is_tiny(found) and not any(name.startswith("encoder.") for name in found.tensors):
        raise CheckpointError(
            f"{path} has a decoder and no encoder",
            expected="both, in place of the checkpoint's autoencoder",
            fix="Pass it as --tiny-vae, for previews, or use a file with both.",
        )
    return found


def open_tiny_vae(path: Path, *, prefer_fp16: bool = False) -> Component:
    """The tiny autoencoder in a diffusers folder or a `.safetensors` file, as a part named "tiny_vae".

    Raises:
        CheckpointError: it is missing or damaged, or no tiny autoencoder.
    """
    found = _open(path, "tiny_vae", 1.0, prefer_fp16)
    if not is_tiny(found):
        raise CheckpointError(f"{path} holds a full autoencoder", expected="a tiny one", fix=_FIX)
    return found


def _open(path: Path, name: str, scaling_factor: float, prefer_fp16: bool) -> Component:
    if not path.is_file():
        part = read_component(path, name, DIFFUSERS, prefer_fp16=prefer_fp16)
        kind = part.config.get("_class_name", _KINDS[0])
        if kind not in _KINDS:
            raise CheckpointError(f"{path} holds an {kind}", expected=" or ".join(_KINDS), fix=_FIX)
        return part
    refuse_pickle(path)
    headers = read_headers(path)
    if _TINY_NAMES.isdisjoint(headers):
        return replace(open_vae_file(path, scaling_factor=scaling_factor), name=name)
    if "decoder.layers.0.weight" not in headers:
        # TAESD's decoder by its places in torch's Sequential, whose first layer, the clamp, diffusers does
        # not count among its layers.
        headers = {f"decoder.layers.{_one_less(old)}": header for old, header in headers.items()}
    return Component(name=name, folder=path, config=_tiny_config(headers), tensors=headers)


def _one_less(name: str) -> str:
    place, _, rest = name.partition(".")
    return f"{int(place) - 1}.{rest}" if place.isdecimal() else name


def _tiny_config(headers: Mapping[str, TensorHeader]) -> dict[str, object]:
    """AutoencoderTiny's config from the decoder's tensors: a level is some blocks and a bare convolution."""
    blocks, levels = 0, list[int]()
    places = {name.split(".")[2] for name in headers if name.startswith("decoder.layers.")}
    layers = sorted(map(int, filter(str.isdecimal, places)))
    for place in layers[1:]:  # the first convolution takes the latent
        if f"decoder.layers.{place}.conv.0.weight" in headers:
            blocks += 1
        else:
            levels.append(blocks)
            blocks = 0
    first = headers["decoder.layers.0.weight"].shape
    widths = [first[0]] * len(levels)
    return {
        "_class_name": TINY,
        "latent_channels": first[1],
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
        "num_decoder_blocks": levels,
        "num_encoder_blocks": levels[::-1],
    }
