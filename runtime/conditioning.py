"""What a UNet is conditioned on, row by row: texts, sizes, guidance scale, a picture to vary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from ..engines.package import Manifest
from ..engines.spec import Array, guidance_embedding
from .prompts.encode import TextConditioner
from .request.request import Request
from .request.source import Varied
from .sampling.names import resolve
from .sampling.noise import NoiseSource

CallNet = Callable[..., dict[str, Array]]  # `Loop.call`


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The conditions of B UNet rows, as `job.DenoiseJob` has them.

    `dropped` has, by prompt, the end of it that found no room.
    """

    context: Array
    text_of_row: tuple[int, ...]
    vectors: Mapping[str, Array]
    dropped: Mapping[str, str]


# The texts of a picture for the two encoders. None stands for a missing negative prompt where the model takes
# zeros for it.
_Texts = tuple[str, "str | None"] | None


def make_conditioning(
    request: Request, manifest: Manifest, text: TextConditioner, source: NoiseSource, call: CallNet
) -> Conditioning:
    """Encode the texts that are not cached, and compute the vectors.

    `source` draws noise for the embeddings of pictures to vary, which advances it.

    Raises:
        UsageError: a prompt whose syntax nothing here executes, or more layers skipped than there are.
    """
    rows = _texts(request, manifest)
    unique = [texts for texts in dict.fromkeys(rows) if texts is not None]
    two = any(second is not None for _, second in unique)
    encoded = text.encode(
        [first for first, _ in unique],
        [second for _, second in unique] if two else None,
        syntax=request.prompt_syntax,
        clip_skip=request.clip_skip,
        embeddings=request.embeddings,
    )
    context, pooled = encoded.context, encoded.pooled
    if None in rows:
        context = np.concatenate([context, np.zeros_like(context[:1])])
        pooled = None if pooled is None else np.concatenate([pooled, np.zeros_like(pooled[:1])])
    places: dict[_Texts, int] = {texts: index for index, texts in enumerate(unique)}
    places[None] = len(unique)
    text_of_row = tuple(places[texts] for texts in rows)
    vectors: dict[str, Array] = {}
    for name in manifest.vectors:
        if name == "text_embeds":
            assert pooled is not None, "the contract has a pooled embedding where the UNet takes one"
            vectors[name] = pooled[list(text_of_row)].astype(np.float32)
        else:
            vectors[name] = _VECTORS[name](request, manifest, source, call)
    return Conditioning(
        context=context,
        text_of_row=text_of_row,
        vectors=vectors,
        dropped={texts[0]: rest for texts, rest in zip(unique, encoded.dropped, strict=True) if rest},
    )


def _texts(request: Request, manifest: Manifest) -> list[_Texts]:
    """The texts of every UNet row, unconditional rows first."""
    conditional: list[_Texts] = list(zip(request.prompts, request.prompts_2, strict=True))
    if not request.guided:
        return conditional
    unconditional: list[_Texts] = [
        None if first is None and manifest.zero_empty_prompt else (first or "", second)
        for first, second in zip(request.negative_prompts, request.negative_prompts_2, strict=True)
    ]
    return unconditional + conditional


def _time_ids(request: Request, manifest: Manifest, source: NoiseSource, call: CallNet) -> Array:
    """(B, 6) float32, or (B, 5) for a refiner."""
    return np.repeat(request.sizes.rows(guided=request.guided), len(request.prompts), axis=0)


def _timestep_cond(request: Request, manifest: Manifest, source: NoiseSource, call: CallNet) -> Array:
    """(B, width) float32."""
    row = guidance_embedding(cast(float, request.guidance_scale), manifest.vectors["timestep_cond"])
    return np.repeat(row[None], len(request.prompts), axis=0)


def _class_labels(request: Request, manifest: Manifest, source: NoiseSource, call: CallNet) -> Array:
    """(B, 2 * width) float: the noised embedding of the picture to vary, zeros for unconditional rows.

    As diffusers' StableUnCLIPImg2ImgPipeline.noise_image_embeddings, but every picture has noise of its own.
    """
    assert isinstance(request.source, Varied), "make_request refuses a request without one"
    pixels = request.source.pixels
    one = slice(1 if (pixels == pixels[:1]).all() else None)
    embeds = call("image_encoder", image=pixels[one])["image_embeds"]
    embeds = np.repeat(embeds, len(pixels) // len(embeds), axis=0)  # (N, width)
    # Only its betas are used; diffusers' class would clip samples, and none are taken.
    config = {**(manifest.image_noise or {}), "clip_sample": False}
    alpha_bar = resolve(None, config).noise.alpha_bar[request.noise_level]
    labels = call(
        "image_noiser",
        image_embeds=embeds,
        noise=source.draw(embeds.shape[1:]),
        noise_level=np.array([request.noise_level], np.float32),
        alpha=np.array([alpha_bar**0.5], np.float32),
        sigma=np.array([(1 - alpha_bar) ** 0.5], np.float32),
    )["class_labels"]
    return np.concatenate([np.zeros_like(labels), labels]) if request.guided else labels


_VECTORS: Mapping[str, Callable[[Request, Manifest, NoiseSource, CallNet], Array]] = {
    "time_ids": _time_ids,
    "timestep_cond": _timestep_cond,
    "class_labels": _class_labels,
}
