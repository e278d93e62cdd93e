"""Decodes latents and encodes pictures in overlapping tiles, where memory does not allow more at once.

The grid and the linear cross-fade are those of diffusers' `AutoencoderKL.tiled_decode` and `tiled_encode`,
but for three things:

1. diffusers cuts tiles off at the border, and always adds a last one that lies within the one before, so that
   the last overlap fades into a sliver decoded without context. Here the last tile is moved inwards until it
   ends with the picture, and fades over all that it shares with the one before. So every call of the decoder
   has the same shape, as an engine of fixed shapes needs it.
2. A tile's weight is the product of one weight along y and one along x. diffusers fades one axis after the
   other in place: where four tiles meet, some of the upper tile's weight goes to its neighbour.
3. Decoded tiles are uint8 pictures, so they are clamped and rounded before they are blended, and the result
   is rounded again. Encoded tiles have their standard deviations blended; diffusers blends log-variances.

A tile knows nothing of the others, while a decoder's group norms and attention span the whole picture. So a
tiled picture differs from the untiled one in tone, and the fade turns the step between tiles into a slope.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np

from ...engines.errors import UsageError
from ...engines.spec import Array

Decode = Callable[[Array], tuple[Array, Array]]
Encode = Callable[[Array, Array], tuple[Array, ...]]


# The share of a tile that the next one covers too: diffusers' `tile_overlap_factor`.
OVERLAP = 0.25


def tile_stride(size: int, scale: int, overlap: float = OVERLAP) -> int:
    """Pixels from one tile to the next: diffusers' `overlap_size`, times `scale`.

    Rounded down to whole latent values, so the real overlap may be a little larger; then diffusers fades over
    less than tiles share, and its picture gets another size.

    Raises:
        UsageError: `size` is no multiple of `scale`, or too small to leave a stride of one latent value.
    """
    stride = int(size // scale * (1 - overlap)) * scale
    if size % scale or not stride:
        raise UsageError(
            f"tiles of {size} pixels with an overlap of {overlap}",
            expected=f"a multiple of {scale} pixels, and {2 * scale} or more where tiles overlap",
            fix=f"Use {max(2, size // scale) * scale}.",
        )
    return stride


def decode_tiled(
    decode: Decode, latent: Array, size: int, scale: int = 8, overlap: float = OVERLAP
) -> tuple[Array, Array]:
    """Decode tile by tile, and blend.

    The work is linear in the number of tiles. Besides what one call of `decode` takes, memory holds the
    picture (uint8), one row of tiles and one tile (float32), each for all N pictures, which go into every
    call together. If that is too much, decode one picture at a time.

    Args:
        decode: (N, C, h, w) -> image (N, h * scale, w * scale, 3) uint8 and mean (N,) float32, as the net
            `vae_decoder`. All calls have one shape: the tile's, or the picture's where that is shorter.
        latent: (N, C, H / scale, W / scale), any float dtype; passed on as it is.
        size: the side of tiles in pixels. A picture no larger than one takes a single call.
        scale: pixels per latent value along each axis.
        overlap: the share of a tile that the next one covers too, 0 to 0.5.

    Returns:
        The picture (N, H, W, 3) uint8, and (N,) float32, the mean of the tiles' means, each weighted with the
        area that its tile has in the picture. It is not finite when any tile's mean is not.

    Raises:
        UsageError: a tile that does not fit the scale, or a decoder that returns another shape or dtype.
    """
    tiles = decode_in_turns(latent, size, scale, overlap)
    try:
        part = next(tiles)
        while True:
            part = tiles.send(decode(part))
    except StopIteration as end:
        image, mean = end.value
        return image, mean


def decode_in_turns(
    latent: Array, size: int, scale: int = 8, overlap: float = OVERLAP
) -> Generator[Array, tuple[Array, Array], tuple[Array, Array]]:
    """The same for who decodes the tiles between other work; arguments, result and errors are those.

    Yields:
        What is to be decoded, (N, C, h, w), and is sent what `decode` returns for it.
    """
    count, _, rows, columns = latent.shape
    height, width, stride = rows * scale, columns * scale, tile_stride(size, scale, overlap)
    if max(height, width) <= size:
        return (yield from _tile(latent, scale))
    down, across = axis_tiles(height, size, stride), axis_tiles(width, size, stride)
    # the unfinished part of the picture, from row `top` on
    strip = np.zeros((count, len(down[0][1]), width, 3), np.float32)
    image = np.empty((count, height, width, 3), np.uint8)
    mean = np.zeros(count, np.float64)
    bottoms = [*(start for start, _ in down[1:]), height]
    for (top, along_y), bottom in zip(down, bottoms, strict=True):
        band = latent[:, :, top // scale : (top + len(along_y)) // scale]
        for left, along_x in across:
            right = left + len(along_x)
            tile, tile_mean = yield from _tile(band[..., left // scale : right // scale], scale)
            strip[:, :, left:right] += tile * (along_y[:, None, None] * along_x[:, None])
            share = float(along_y.sum()) * float(along_x.sum()) / (height * width)
            with np.errstate(invalid="ignore"):  # inf - inf: the mean must show that a tile is not finite
                mean += tile_mean.astype(np.float64) * share
        done = bottom - top  # no later tile reaches these rows
        image[:, top:bottom] = np.rint(strip[:, :done], out=strip[:, :done])
        _move_up(strip, done)
    return image, mean.astype(np.float32)


def encode_tiled(
    encode: Encode, image: Array, mask: Array, size: int, scale: int = 8, overlap: float = OVERLAP
) -> tuple[Array, ...]:
    """Encode tile by tile, and blend; the tiles are those of `decode_tiled`.

    Args:
        encode: image (N, h, w, 3) and mask (N, h, w, 1) -> mean, and standard deviation where there is a
            posterior, (N, C, h / scale, w / scale) float32, as the net `vae_encoder`. All calls have one
            shape: the tile's, or the picture's where that is shorter.
        image: (N, H, W, 3), passed on as it is.
        mask: (N, H, W, 1), likewise.
        size: the side of tiles in pixels. A picture no larger than one takes a single call.
        scale: pixels per latent value along each axis.
        overlap: as in `decode_tiled`.

    Returns:
        What `encode` returns, for the whole picture: (N, C, H / scale, W / scale) float32 each.

    Raises:
        UsageError: a tile that does not fit the scale, or an encoder that returns another shape or dtype.
    """
    tiles = encode_in_turns(image, mask, size, scale, overlap)
    try:
        part = next(tiles)
        while True:
            part = tiles.send(encode(*part))
    except StopIteration as end:
        return end.value


def encode_in_turns(
    image: Array, mask: Array, size: int, scale: int = 8, overlap: float = OVERLAP
) -> Generator[tuple[Array, Array], tuple[Array, ...], tuple[Array, ...]]:
    """The same for who encodes the tiles between other work; arguments, result and errors are those.

    Yields:
        Image and mask of a tile, and is sent what `encode` returns for them.
    """
    count, rows, columns = image.shape[0], image.shape[1] // scale, image.shape[2] // scale
    side, stride = size // scale, tile_stride(size, scale, overlap) // scale  # in latent values from here on
    if max(rows, columns) <= side:
        return (yield from _encoded_tile(image, mask, scale))
    blended: tuple[Array, ...] = ()
    for top, along_y in axis_tiles(rows, side, stride):
        bottom = top + len(along_y)
        for left, along_x in axis_tiles(columns, side, stride):
            right = left + len(along_x)
            cut = np.s_[:, top * scale : bottom * scale, left * scale : right * scale]
            tiles = yield from _encoded_tile(image[cut], mask[cut], scale)
            if not blended:
                blended = tuple(np.zeros((count, tile.shape[1], rows, columns), np.float32) for tile in tiles)
            for whole, tile in zip(blended, tiles, strict=True):
                whole[:, :, top:bottom, left:right] += tile * (along_y[:, None] * along_x)
    return blended


def axis_tiles(length: int, size: int, stride: int) -> list[tuple[int, Array]]:
    """Cut one axis into tiles with weights: each fades in linearly over all that earlier tiles cover.

    Args:
        length: of the picture, in pixels or latent values.
        size: of a tile, cut to `length` if it is longer.
        stride: from one tile to the next, at most `size`; less before the last tile, which ends where the
            picture ends.

    Returns:
        For each tile its start and its weights, float32 of the tile's length. At every place of the axis
        the weights of all tiles add up to 1. The first weight of an overlap is 0, as in diffusers' `blend_v`.
    """
    size = min(size, length)
    starts = [*range(0, length - size, stride), length - size]
    weights: list[Array] = [np.ones(size)]
    for index, start in enumerate(starts[1:], 1):
        overlap = starts[index - 1] + size - start
        fade_in: Array = np.ones(size)
        fade_in[:overlap] = np.arange(overlap) / max(overlap, 1)
        for earlier in range(index):
            if (offset := start - starts[earlier]) < size:
                weights[earlier][offset:] *= 1 - fade_in[: size - offset]
        weights.append(fade_in)
    return [(start, weight.astype(np.float32)) for start, weight in zip(starts, weights, strict=True)]


def _tile(latent: Array, scale: int) -> Generator[Array, tuple[Array, Array], tuple[Array, Array]]:
    """Have one tile decoded, and check the shapes: a wrong one might be broadcast when tiles are blended."""
    image, mean = yield np.ascontiguousarray(latent)
    count, _, rows, columns = latent.shape
    expected = (count, rows * scale, columns * scale, 3)
    if image.shape != expected or image.dtype != np.uint8 or mean.shape != (count,):
        raise UsageError(
            f"for {latent.shape} the decoder gave {image.dtype} {image.shape}, mean {mean.shape}",
            expected=f"uint8 {expected}, mean ({count},)",
            fix="Pass the decoder's own scale, and a decoder of this contract.",
        )
    return image, mean


def _encoded_tile(
    image: Array, mask: Array, scale: int
) -> Generator[tuple[Array, Array], tuple[Array, ...], tuple[Array, ...]]:
    """Have one tile encoded, and check the shapes."""
    results = yield np.ascontiguousarray(image), np.ascontiguousarray(mask)
    count, height, width, _ = image.shape
    expected = (count, height // scale, width // scale)
    shapes = [(str(result.dtype), result.shape) for result in results]
    if not shapes or any(
        dtype != "float32" or len(shape) != 4 or (shape[0], *shape[2:]) != expected for dtype, shape in shapes
    ):
        raise UsageError(
            f"for {image.shape} the encoder gave {shapes}",
            expected=f"float32 ({count}, C, {expected[1]}, {expected[2]})",
            fix="Pass the encoder's own scale, and an encoder of this contract.",
        )
    return results


def _move_up(strip: Array, done: int) -> None:
    """Drop the first `done` rows and add as many zeros below; in blocks, to take no memory for a copy."""
    height = strip.shape[1]
    for row in range(0, height - done, done):
        block = min(done, height - done - row)
        strip[:, row : row + block] = strip[:, row + done : row + done + block]
    strip[:, height - done :] = 0
