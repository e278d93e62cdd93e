"""Image prompts of a request: keys and values of pictures for each cross-attention, made once per picture.

Ye et al. 2023 (arXiv 2308.06721), as diffusers' `load_ip_adapter` and its attention processors have it: the
unconditional rows attend to what the adapter makes of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Any

import numpy as np
from PIL import Image

from ...engines.errors import UsageError
from ...engines.spec import (
    IMAGE_FEATURES,
    IMAGE_KEYS,
    IMAGE_VALUES,
    Array,
    NetSpec,
    cross_attentions,
)
from ..controls.hints import named_pictures
from ..controls.image_prompt import ImagePrompt
from ..loop.job import ImagePromptJob
from ..pictures.read import read_image
from ..pictures.resize import clip_pixels
from ..pictures.write import Pixels
from ..request.inputs import describe_pictures
from .steered import OpenedControl, Rows


@dataclass(frozen=True, kw_only=True)
class _Group:
    """What one softmax goes over.

    Attributes:
        keys, values: for each layer, (B, heads, I, width) float32.
        mask: (H, W) float32, 1 where it counts and 0 elsewhere.
        on: (S,) bool.
    """

    keys: Sequence[Array]
    values: Sequence[Array]
    mask: Array
    on: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompted:
    """An image prompt with its net and its pictures, read and checked."""

    prompt: ImagePrompt
    opened: OpenedControl
    pictures: Sequence[Pixels]
    masks: Sequence[Pixels]

    @classmethod
    def read(cls, prompt: ImagePrompt, opened: OpenedControl) -> Prompted:
        """Raises UsageError for pictures that cannot be read, or for another number of masks."""
        pictures = [
            read_image(one, name=name) for name, one in named_pictures(prompt.image, "ip_adapter_image")
        ]
        given = [] if prompt.mask_image is None else named_pictures(prompt.mask_image, "ip_adapter_mask")
        masks = [read_image(one, name=name, background=0) for name, one in given]
        if len(masks) not in (0, 1, len(pictures)):
            raise UsageError(
                f"{len(masks)} masks for {len(pictures)} pictures of the IP-Adapter {prompt.model!r}",
                expected="no mask, one for all, or one for each",
                fix="Pass one mask for all of them.",
            )
        return cls(prompt=prompt, opened=opened, pictures=pictures, masks=masks)

    def groups(self, rows: Rows, unet: NetSpec) -> list[_Group]:
        """Its groups; one for each mask, or one for all.

        Raises:
            UsageError: strengths of blocks that the UNet does not have.
        """
        shapes = {item.name: item.shape for item in unet.inputs}
        strengths = self.prompt.strengths(cross_attentions(unet))  # refused before a net is called
        sides = self._keys_and_values(rows)
        each = len(self.masks) > 1
        everywhere = np.ones((rows.height, rows.width), np.float32)
        masks = [_mask(one, rows) for one in self.masks] or [everywhere]
        groups: list[_Group] = []
        for number, mask in enumerate(masks):
            chosen = slice(number, number + 1) if each else slice(None)
            keys: list[Array] = []
            values: list[Array] = []
            for layer, strength in enumerate(strengths):
                _, _, heads, width, _ = shapes[f"{IMAGE_KEYS}{layer}"]
                assert isinstance(heads, int)
                assert isinstance(width, int)
                split = partial(_heads, sides, chosen=chosen, heads=heads, rows=rows)
                keys.append(split(f"{IMAGE_KEYS}{layer}") * np.float32(width**-0.5))
                values.append(split(f"{IMAGE_VALUES}{layer}") * np.float32(strength))
            on = self.prompt.on(rows.schedule)[: rows.steps]
            groups.append(_Group(keys=keys, values=values, mask=mask, on=on))
        return groups

    def record(self) -> dict[str, Any]:
        """As a picture's record has it."""
        prompt = self.prompt
        values = {
            "model": prompt.model,
            "kind": self.opened.kind,
            "sha256": self.opened.package.manifest.sha256,
            "images": describe_pictures(prompt.image, self.pictures),
            "masks": describe_pictures(prompt.mask_image, self.masks),
            "strength": prompt.strength,
            "start": prompt.start,
            "end": prompt.end,
        }
        return {name: value for name, value in values.items() if value != []}

    def _keys_and_values(self, rows: Rows) -> list[dict[str, Array]]:
        """By the names of its outputs, (K, I, C), of the pictures; with guidance, before that of zeros."""
        from ...checkpoints.files.net_reads import normalisation

        manifest, call = self.opened.package.manifest, self.opened.loop.call
        processor = manifest.image_processor or {}
        mean, std = (np.array(one, np.float32) for one in normalisation(processor))
        cut = np.stack([clip_pixels(one, processor) for one in self.pictures])
        pixels = np.moveaxis((cut.astype(np.float32) / 255 - mean) / std, 3, 1)
        features = call("image_features", pixel_values=pixels)[IMAGE_FEATURES]
        nothing = np.zeros_like(features)
        if rows.guided and manifest.control["image_features"] == "hidden_states":
            nothing = call("image_features", pixel_values=np.zeros_like(pixels))[IMAGE_FEATURES]
        sides = [nothing, features] if rows.guided else [features]
        return [call("image_prompt", **{IMAGE_FEATURES: side}) for side in sides]


def image_prompt_job(prompted: Sequence[Prompted], rows: Rows, unet: NetSpec) -> ImagePromptJob | None:
    """What the loop is given of all image prompts of a request; None if there are none.

    Groups get as many tokens each, the least common multiple: each token as often as the others, which
    leaves a softmax as it is.
    """
    groups = [group for one in prompted for group in one.groups(rows, unet)]
    if not groups:
        return None
    tokens = lcm(*(group.keys[0].shape[2] for group in groups))
    inputs: dict[str, Array] = {}
    for layer in range(len(groups[0].keys)):
        keys: Array = np.stack([_repeated(group.keys[layer], tokens) for group in groups], 1)
        inputs[f"{IMAGE_KEYS}{layer}"] = np.swapaxes(keys, 3, 4)  # (B, G, heads, width, I)
        inputs[f"{IMAGE_VALUES}{layer}"] = np.stack(
            [_repeated(group.values[layer], tokens) for group in groups], 1
        )
    return ImagePromptJob(
        inputs=inputs,
        masks=np.stack([group.mask for group in groups]),
        on=np.stack([group.on for group in groups], 1),
    )


def _heads(sides: Sequence[dict[str, Array]], name: str, chosen: slice, heads: int, rows: Rows) -> Array:
    """(B, heads, I, width) float32 of (K, I, C) on each side: the tokens of the chosen pictures in a row."""
    split: list[Array] = []
    for side in sides:
        tokens = side[name][chosen].astype(np.float32)  # (K, I, C)
        found = np.reshape(tokens, (1, -1, heads, tokens.shape[2] // heads))
        split += [np.swapaxes(found, 1, 2)] * (rows.count // len(sides))
    return np.concatenate(split)


def _repeated(tokens: Array, count: int) -> Array:
    """(B, heads, I, width) with every token as often, `count` of them."""
    return np.tile(tokens, (1, 1, count // tokens.shape[2], 1))


def _mask(pixels: Pixels, rows: Rows) -> Array:
    """(H, W) of 0 and 1, as diffusers' `IPAdapterMaskProcessor` makes it of a grey picture."""
    gray = Image.fromarray(pixels).convert("L").resize((rows.width, rows.height), Image.Resampling.LANCZOS)
    return (np.asarray(gray, np.float32) / 255 >= 0.5).astype(np.float32)
