"""Latents as pictures, for looking on and for the end, and the record of how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, get_args

import numpy as np

from ..engines.errors import NumericError, UsageError, numeric_fix
from ..engines.package import Manifest
from ..engines.spec import DTYPES, Array
from .loop.denoise import narrow
from .loop.job import Loop
from .pictures.infotext import format_infotext
from .pictures.write import Pixels, encode_picture, save_picture, to_pil
from .record import STEERED_BY, a1111_parameters, make_record
from .request.request import Request
from .request.source import Masked

if TYPE_CHECKING:
    from PIL.Image import Image

PreviewKind = Literal["decoder", "tiny", "rgb", "fast"]
PREVIEWS: tuple[str, ...] = get_args(PreviewKind)


Images = TypeVar("Images")  # list[PIL.Image.Image], or an array


@dataclass(frozen=True, kw_only=True)
class Result(Generic[Images]):
    """Pictures of one call.

    Attributes:
        images: N PIL images (`output_type="pil"`), or an array: (N, H, W, 3) uint8 for "np", float32 from 0
            to 1 for "float" (diffusers' "np"), (N, C, H/8, W/8) float32 for "latent".
        request: what was asked, with every default filled in.
        seconds: wall time per stage.
        producer: package, backend and release, for the record.
        base: what a refiner went on with.
    """

    images: Images
    request: Request
    seconds: Mapping[str, float]
    producer: Mapping[str, Any]
    base: Result[Any] | None = None

    def record(self, index: int = 0) -> dict[str, Any]:
        """How picture `index` was made, as JSON: see `record.make_record`. `redraw` draws it again."""
        extra = {"base_record": self.base.record(index)} if self.base else {}
        return make_record(self.request, index, {**self.producer, **extra})

    def infotext(self, index: int = 0) -> str:
        """The `parameters` text of AUTOMATIC1111 for picture `index`."""
        # A refiner draws without controls and perhaps some adapters; the text has the base's for both.
        of = self.base.producer if self.base else dict[str, Any]()
        adapters = {name: of[name] for name in ("loras", "adapters", STEERED_BY) if name in of}
        return format_infotext(a1111_parameters(self.request, index, {**self.producer, **adapters}))

    def save(
        self,
        file: str | Path | IO[bytes],
        index: int = 0,
        *,
        format: str | None = None,
        quality: int | None = None,
        metadata: bool = True,
    ) -> None:
        """Write picture `index` with its record.

        Args:
            file: a path whose suffix is the format (.png, .jpg, .webp), or a binary file to write to.
            index: of the picture.
            format: "PNG", "JPEG" or "WEBP", for a binary file; None is PNG.
            quality: of JPEG and WebP, 1 to 100; None is 95.
            metadata: whether prompt and parameters go into the file.

        Raises:
            StorageError: the file cannot be written; an existing one stays as it was.
            UsageError: an unknown format or suffix, a quality out of range, or a result that holds latents.
        """
        if isinstance(file, (str, Path)):
            options: dict[str, Any] = {**self._metadata(index, metadata), "quality": quality}
            save_picture(file, self._pixels(index), **options)
        else:
            file.write(self.to_bytes(format or "PNG", index, quality=quality, metadata=metadata))

    def to_bytes(
        self,
        format: str = "PNG",
        index: int = 0,
        *,
        quality: int | None = None,
        metadata: bool = True,
    ) -> bytes:
        """The content of picture `index`'s file, for a network or a database; see `save`."""
        options: dict[str, Any] = {**self._metadata(index, metadata), "quality": quality}
        return encode_picture(self._pixels(index), format.upper().replace("JPG", "JPEG"), **options)

    def _metadata(self, index: int, wanted: bool) -> dict[str, Any]:
        return {"infotext": self.infotext(index), "record": self.record(index)} if wanted else {}

    def _pixels(self, index: int) -> Any:
        """Picture `index`: uint8 whatever the output type."""
        image = cast(Any, self.images)[index]
        if self.request.output_type == "float":
            return np.rint(np.asarray(image) * np.float32(255)).astype(np.uint8)
        return image


def preview(latent: Array, kind: str, *, manifest: Manifest, loop: Loop, request: Request) -> list[Image]:
    """Clean latents (N, C, H/8, W/8) as pictures; `kind` as `Step.preview` explains.

    Raises:
        UsageError: an unknown kind, or one that the package does not have.
        NumericError: the picture is not finite.
    """
    if kind == "fast":
        kind = "tiny" if "preview_decoder" in manifest.nets else "rgb" if manifest.latent_rgb else "decoder"
    if kind == "decoder":
        images = check_finite(*loop.decode(latent, tile=request.tile), manifest.dtype)
        return [to_pil(image) for image in put_back(images, request)]
    if kind == "tiny" and "preview_decoder" in manifest.nets:
        dtype = DTYPES[manifest.net("preview_decoder").spec.inputs[0].dtype]
        decoded = loop.call("preview_decoder", latent=narrow(latent, dtype))
        images = check_finite(decoded["image"], decoded["mean"], manifest.dtype)
        return [to_pil(image) for image in images]
    if kind == "rgb" and manifest.latent_rgb:
        return [to_pil(image) for image in project(latent, np.array(manifest.latent_rgb, np.float32))]
    raise UsageError(
        f"the preview {kind!r} of {manifest.name!r}",
        expected=f"one of {', '.join(PREVIEWS)}, with a tiny autoencoder for `tiny`",
        fix="Open the checkpoint, or export it, with --tiny-vae; or choose another kind.",
    )


def project(latent: Array, latent_rgb: Array) -> Pixels:
    """One pixel per latent cell.

    Args:
        latent: (N, C, h, w).
        latent_rgb: (C + 1, 3): shades 0 ... 1 per unit of each channel, the offset last.

    Returns:
        (N, h, w, 3) uint8.
    """
    shades: Array = np.einsum("nchw,cs->nhws", latent, latent_rgb[:-1]) + latent_rgb[-1]
    return np.rint(np.minimum(np.maximum(shades, 0), 1) * 255).astype(np.uint8)


def finished(images: Array, request: Request, dtype: str) -> list[Image] | Array:
    """Decoded pictures (N, H, W, 3) uint8 as the request's `output_type` returns them.

    `dtype` is the package's, for the error's advice.

    Raises:
        NumericError: a picture of one colour.
    """
    check_pictures(images, dtype)
    images = put_back(images, request)
    if request.output_type == "pil":
        return [to_pil(image) for image in images]
    return images if request.output_type == "np" else images.astype(np.float32) / np.float32(255)


def put_back(images: Array, request: Request) -> Array:
    """What lies outside a request's mask, put back into decoded pictures (N, H, W, 3) uint8."""
    if not isinstance(request.source, Masked):
        return images
    return np.stack([request.source.inpainting.paste(image) for image in images])


def check_finite(image: Array, mean: Array, dtype: str) -> Array:
    """The image (N, H, W, 3); its mean (N,), taken before clamping, shows what uint8 cannot.

    `dtype` is the package's, for the error's advice.

    Raises:
        NumericError: a mean is NaN or infinite.
    """
    if not np.isfinite(mean).all():
        raise NumericError(
            "the decoded picture is not finite",
            expected="finite numbers",
            fix=numeric_fix(dtype),
        )
    return image


def check_pictures(images: Pixels, dtype: str) -> None:
    """Refuse pictures of one colour: NaN or an overflow in the nets looks like this after the decoder.

    Args:
        images: ``(H, W, 3)`` or ``(B, H, W, 3)`` uint8.
        dtype: the package's, for the error's advice.

    Raises:
        NumericError: every pixel of a picture is the same; says which pictures of the batch.
    """
    batch = images if images.ndim == 4 else images[None]
    constant = (batch == batch[:, :1, :1]).all(axis=(1, 2, 3))
    if constant.any():
        numbers = ", ".join(str(index) for index in np.flatnonzero(constant))
        colour = tuple(int(value) for value in batch[int(constant.argmax()), 0, 0])
        raise NumericError(
            f"picture {numbers} of a batch of {len(batch)} (counted from 0) is a single colour, {colour}",
            expected="pixels that differ",
            fix=numeric_fix(dtype),
        )
