"""Hints: the control pictures as control nets take them, at the size that is drawn.

A picture is resized first and prepared then, so that edges have their full contrast, and a mask its exact
values, in every pass of a request. Hints are RGB from 0 to 1, not from -1 to 1 like the pictures of an
autoencoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image

from ...engines.errors import UsageError
from ...engines.spec import Array
from ..pictures.mask import read_mask
from ..pictures.read import ImageSource, read_image, read_map
from ..pictures.resize import resize
from ..pictures.write import Pixels
from .preparations import Preparation, Value, find_preparation

# how a picture takes another shape -> the mode of `resize`
RESIZE_MODES = {
    "stretch": "default",  # to the size, whatever its aspect ratio: diffusers
    "crop": "crop",  # fill the size, and cut off equally what lies beyond it on two sides
    "pad": "default",  # show all of it, in the middle
}

_LANCZOS, _NEAREST = Image.Resampling.LANCZOS, Image.Resampling.NEAREST


@dataclass(frozen=True, kw_only=True, eq=False)
class HintPictures:
    """Control pictures and their preparation, read and checked. Made by `read_hints`.

    Attributes:
        pictures: each (H, W, 3) uint8, of its own size.
        masks: one for each as (H, W, 3) uint8, white where it is masked; empty if the preparation takes none.
        preparation: what makes hints of them.
        settings: the preparation's.
        resize_mode: one of `RESIZE_MODES`.
        filters: what each is resized with.
    """

    pictures: Sequence[Pixels]
    masks: Sequence[Pixels]
    preparation: Preparation
    settings: Mapping[str, Value]
    resize_mode: str
    filters: Sequence[Image.Resampling]

    def at(self, height: int, width: int) -> Array:
        """The hints, (N, 3, height, width) float32: from 0 to 1, and -1 where "inpaint" masks.

        Beyond a padded picture they are black, which is nothing in most maps; "inpaint" masks it.

        Raises:
            UsageError: a mask of another shape than its picture or with nothing in it, or a picture so slim
                that cropping takes too many pixels.
        """
        return np.stack([self._hint(number, height, width) for number in range(len(self.pictures))])

    def _hint(self, number: int, height: int, width: int) -> Array:
        """(3, height, width)"""
        picture = self.pictures[number]
        own_size = (picture.shape[0], picture.shape[1])
        size = _inside(own_size, height, width) if self.resize_mode == "pad" else (height, width)
        mode = RESIZE_MODES[self.resize_mode]
        fitted = resize(picture, *size, mode, self.filters[number])
        shown = self.preparation.apply(fitted, **self.settings).astype(np.float32) / 255
        if self.masks:
            masked = read_mask(
                self.masks[number], *size, image_size=own_size, resize_mode=mode, name="control_mask"
            )
            shown[masked] = self.preparation.masked
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        hint = np.full((3, height, width), self.preparation.masked or 0, np.float32)
        hint[:, top : top + size[0], left : left + size[1]] = np.moveaxis(shown, 2, 0)
        return hint


def read_hints(
    image: ImageSource | Sequence[ImageSource],
    *,
    preparation: str | None = None,
    settings: Mapping[str, Any] | None = None,
    mask_image: ImageSource | Sequence[ImageSource] | None = None,
    resize_mode: str = "stretch",
) -> HintPictures:
    """Read control pictures; errors call them control_image, and their masks control_mask.

    Args:
        image: one picture as `read_image` takes it, a list of them, or an array (N, H, W, C).
        preparation: one of `PREPARATIONS`; None if `image` is a ready map. Transparent pixels of a map are
            black, those of other pictures white. Maps with a palette or 1 bit keep their colours; all else is
            resized with a Lanczos filter.
        settings: the preparation's, where they are not its defaults.
        mask_image: white where "inpaint" and "repaint" draw anew: one for all pictures, or one for each.
        resize_mode: one of `RESIZE_MODES`.

    Raises:
        UsageError: a picture that cannot be read, or none; values out of range; an unknown preparation, mode
            or setting; a mask that is missing, or that the preparation does not take.
    """
    prepare = find_preparation(preparation)
    if resize_mode not in RESIZE_MODES:
        raise UsageError(
            f"the resize mode of a control picture is {resize_mode!r}",
            expected=f"one of {', '.join(RESIZE_MODES)}",
            fix="Choose one of these.",
        )
    ready = preparation is None
    ground = 0 if ready else 255
    read = [
        read_map(one, name=name, background=ground) for name, one in named_pictures(image, "control_image")
    ]
    return HintPictures(
        pictures=[pixels for pixels, _ in read],
        masks=_read_masks(mask_image, prepare, len(read)),
        preparation=prepare,
        settings=prepare.check(settings or {}),
        resize_mode=resize_mode,
        filters=[_NEAREST if ready and unmixed else _LANCZOS for _, unmixed in read],
    )


def _read_masks(mask_image: Any, preparation: Preparation, pictures: int) -> Sequence[Pixels]:
    """A mask for each picture, or none where the preparation takes none."""
    if preparation.masked is None:
        if mask_image is not None:
            raise UsageError(
                f"a control_mask with {preparation.title}",
                expected="no mask",
                fix="Leave the mask out, or choose inpaint or repaint.",
            )
        return []
    if mask_image is None:
        raise UsageError(
            f"{preparation.title} without a control_mask",
            expected="a mask, white where the picture is drawn anew",
            fix="Pass the mask, or give the map itself and no preparation.",
        )
    masks = [
        read_image(one, name=name, background=0) for name, one in named_pictures(mask_image, "control_mask")
    ]
    if len(masks) not in (1, pictures):
        raise UsageError(
            f"{len(masks)} masks for {pictures} control pictures",
            expected="one mask, or one for every picture",
            fix="Pass one mask for all of them.",
        )
    return masks if len(masks) == pictures else masks * pictures


def named_pictures(images: Any, name: str) -> list[tuple[str, ImageSource]]:
    """Each picture of one or several, after what errors call it."""
    if isinstance(images, np.ndarray) and cast(Array, images).ndim == 4:
        images = list(cast(Array, images))
    if not isinstance(images, (list, tuple)):
        return [(name, images)]
    several = cast("Sequence[ImageSource]", images)
    if not several:
        raise UsageError(
            f"{name} has no pictures", expected="one, or one for every prompt", fix="Pass a picture."
        )
    return [(f"{name} {number}", one) for number, one in enumerate(several, 1)]


def _inside(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """The largest height and width of the same aspect ratio that fit, 1 or more."""
    scale = min(height / size[0], width / size[1])
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
