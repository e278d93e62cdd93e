"""Who answers the calls of the UNet that jobs wait for: at once, or who steps through several jobs.

Where several share them, a job also lets others have a turn before it encodes or decodes a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from ...engines.spec import Array
from ..pictures.tiling import decode_in_turns, encode_in_turns
from .job import Clock, Loop, Stop, UNetCall

Item = TypeVar("Item")
# (state (N, C, h, w), row) -> the calls that it takes, and at their end the model output (N, C, h, w), guided
Predict = Callable[[Array, int], Generator[UNetCall, None, Array]]


def answered(items: Iterable[UNetCall | Item]) -> Iterator[Item]:
    """Run each call where a job waits for it; yields all else."""
    for item in items:
        if isinstance(item, UNetCall):
            with item.clock.stage("unet"):
                item.answer(item.run(**item.inputs)["prediction"])
        else:
            yield item


def at_once(
    predict: Callable[[Array, int], Array],
) -> Callable[[Array, int], Generator[UNetCall, None, Array]]:
    """A UNet that is no net and waits for nothing, as `denoise.denoise` takes it."""

    def predicted(latent: Array, row: int) -> Generator[UNetCall, None, Array]:
        yield from ()
        return predict(latent, row)

    return predicted


class Pause:
    """What a job yields before it works for longer than others should wait: they have their turn first."""


class SharedLoop:
    """A loop whose steps have the calls of the UNet between them, for who answers those of several jobs."""

    def __init__(self, loop: Loop) -> None:
        self.call, self.draw, self.decode, self.close = loop.call, loop.draw, loop.decode, loop.close
        self.steps: Any = loop.unet_calls
        self.unet_calls = loop.unet_calls


def decoded(
    loop: Loop, latent: Array, tile: int | None, scale: int, clock: Clock, stop: Stop
) -> Generator[Pause, None, tuple[Array, Array]]:
    """Pictures of latents as `Loop.decode` returns them; in a `SharedLoop` with a pause before each tile."""

    def decode(part: Array, tile: int | None = None) -> tuple[Array, Array]:
        with clock.stage("vae_decoder"):
            return loop.decode(part, tile=tile, stop=stop)

    if not isinstance(loop, SharedLoop):
        return decode(latent, tile)
    if tile is None:
        yield Pause()
        return decode(latent)
    tiles = decode_in_turns(latent, tile, scale)
    try:
        part = next(tiles)
        while True:
            yield Pause()
            part = tiles.send(decode(part))
    except StopIteration as end:
        image, mean = end.value
        return image, mean


def encoded(
    loop: Loop, tile: int | None, scale: int, clock: Clock, stop: Stop, image: Array, mask: Array
) -> Generator[Pause, None, tuple[Array, ...]]:
    """What the net `vae_encoder` makes of pictures; in a `SharedLoop` with a pause before each tile.

    Args:
        loop: runs the net.
        tile: the side of tiles in pixels; None encodes the picture as a whole.
        scale: pixels per latent value along each axis.
        clock: is charged with each tile.
        stop: is looked at before each.
        image: (N, H, W, 3) uint8.
        mask: (N, H, W, 1) uint8, what is hidden from the encoder.

    Returns:
        The mean, and the standard deviation if there is a posterior, (N, C, H / scale, W / scale) float32.
    """

    def encode(image: Array, mask: Array) -> tuple[Array, ...]:
        stop.check("before the encoder")
        with clock.stage("vae_encoder"):
            return tuple(loop.call("vae_encoder", image=image, mask=mask).values())

    shared = isinstance(loop, SharedLoop)
    if tile is None:
        if shared:
            yield Pause()
        return encode(image, mask)
    tiles = encode_in_turns(image, mask, tile, scale)
    try:
        part = next(tiles)
        while True:
            if shared:
                yield Pause()
            part = tiles.send(encode(*part))
    except StopIteration as end:
        return end.value
