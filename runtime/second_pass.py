"""A picture in two passes: drawn small, its latent enlarged, and that drawn on at the larger size.

AUTOMATIC1111's "Hires. fix" with its upscaler "Latent" (modules/processing.py, `sample_hr_pass`, release
1.10). Its second pass runs one step more than ours: here a strength is what it is for any latent.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.spec import Array
from .loop.calls import Pause
from .loop.job import UNetCall
from .pipeline import Step
from .record import BEGAN_AS
from .request.request import Request, latent_shape
from .result import Result

if TYPE_CHECKING:
    from .pipeline import Pipeline


DIFFERENT = ("width", "height", "num_inference_steps")  # what a record says of a first pass


def draw_larger(
    pipe: Pipeline, first: Mapping[str, Any], changes: Mapping[str, Any]
) -> Generator[UNetCall | Pause | Step, None, Result[Any]]:
    """A generation of two passes whose calls of the UNet others answer, as `Pipeline.shared`.

    Args:
        pipe: draws both.
        first: "prompt" and parameters of the first pass, without a picture to start from.
        changes: what the second has other values of: `height`, `width`, `strength`, and what else there is.

    Returns:
        The second pass' result; its record says how it began (`began_as`).

    Raises:
        LatentrtError: as `Pipeline.shared`.
    """
    drawn = yield from pipe.shared({**first, "output_type": "latent"})
    latent = enlarged_for(pipe, drawn, changes)
    result = yield from pipe.shared({**first, **changes, "image": latent})
    return after(result, drawn)


def after(result: Result[Any], first: Result[Any]) -> Result[Any]:
    """A second pass' result, saying what the first one was."""
    was = {name: getattr(first.request, name) for name in DIFFERENT}
    seconds = {
        name: result.seconds.get(name, 0.0) + first.seconds.get(name, 0.0)
        for name in (*first.seconds, *result.seconds)
    }
    return replace(result, seconds=seconds, producer={**result.producer, BEGAN_AS: was})


def check_second(pipe: Pipeline, first: Mapping[str, Any], changes: Mapping[str, Any]) -> Request:
    """What a second pass would draw. Raises as `Pipeline.request_of`, before anything is drawn."""
    shape = latent_shape(pipe.package.manifest, changes["height"], changes["width"])
    return pipe.request_of({**first, **changes, "image": np.zeros((1, *shape), np.float32)})


def enlarged_for(pipe: Pipeline, first: Result[Any], changes: Mapping[str, Any]) -> Array:
    """A first pass' latents at the size of the second: (N, C, H/8, W/8) float32."""
    _, height, width = latent_shape(pipe.package.manifest, changes["height"], changes["width"])
    return enlarge_latent(first.images, height, width)


def enlarge_latent(latent: Array, height: int, width: int) -> Array:
    """Interpolate latents linearly: (N, C, h, w) to (N, C, height, width) float32.

    As `torch.nn.functional.interpolate` of mode "bilinear", without corners aligned.
    """
    rows, columns = _between(latent.shape[2], height), _between(latent.shape[3], width)
    larger: Array = rows @ latent.astype(np.float32) @ np.transpose(columns)
    return larger


def _between(side: int, larger: int) -> Array:
    """(larger, side): the shares of two neighbours in each of the larger side's values."""
    where = np.maximum((np.arange(larger) + 0.5) * side / larger - 0.5, 0)
    low = where.astype(int)
    high = np.minimum(low + 1, side - 1)
    shares = np.zeros((larger, side), np.float32)
    np.add.at(shares, (np.arange(larger), low), 1 - (where - low))
    np.add.at(shares, (np.arange(larger), high), where - low)
    return shares
