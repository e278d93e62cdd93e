"""The denoising loop. Every sampler is a table (docs/samplers.md); this runs any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...engines.errors import NumericError, UsageError, numeric_fix
from ...engines.spec import Array
from ..sampling.table import Table

# NumPy would only warn; the loop checks the result and says in which step it happened.
_overflow_is_found_below = partial(np.errstate, over="ignore", invalid="ignore")
Predict = Callable[[Array, int], Array]  # (state (N, C, h, w), row) -> model output (N, C, h, w), guided


@dataclass(kw_only=True)
class State:
    """The loop after one row of the table. Arrays are (N, C, H/8, W/8) float32, variance-preserving.

    Attributes:
        index: of the row.
        unet_input: the state that the UNet saw.
        prediction: its output after guidance.
        latent: the state after the row; what the loop goes on with.
        profile: the profile that the UNet's engine runs with; "" on the host.
    """

    index: int
    unet_input: Array
    prediction: Array
    latent: Array
    profile: str = ""

    def replace(self, latent: Array) -> None:
        """Let the loop go on with another latent. Raises UsageError for another shape."""
        replacement = np.asarray(latent, np.float32)
        if replacement.shape != self.latent.shape:
            raise UsageError(
                f"latents of shape {replacement.shape} from a callback",
                expected=f"{self.latent.shape}",
                fix="Return the latents with the shape they came in.",
            )
        self.latent = replacement

    def denoised(self, table: Table) -> Array:
        """The clean latent x0 that the prediction stands for, solved from y = alpha * x0 + sigma * eps."""
        alpha_bar = float(table.alpha_bar[self.index])
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        y, m = self.unet_input, self.prediction
        if table.prediction_type == "epsilon":
            return (y - sigma * m) / alpha
        return alpha * y - sigma * m if table.prediction_type == "v_prediction" else m


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A picture that stays as it is outside a mask (RePaint, arXiv 2201.09865, step 8; no resampling).

    Attributes:
        latent: (N, C, h, w) float32, clean.
        noise: (N, C, h, w) float32 unit noise, that of the first state.
        mask: (N, 1, h, w) float32, 1 where the picture is repainted.
    """

    latent: Array
    noise: Array
    mask: Array

    def put_back(self, y: Array, signal: float, noise: float) -> Array:
        """`y` inside the mask; outside, the kept latent at the same noise."""
        return (1 - self.mask) * (signal * self.latent + noise * self.noise) + self.mask * y


def denoise(
    table: Table,
    noise: Callable[[], Array],
    predict: Predict,
    first: Array,
    kept: Kept | None = None,
    dtype: str = "fp16",
) -> Iterator[State]:
    """Run the table; yields once per row, the final latent last.

    Args:
        table: one row per UNet call.
        noise: draws unit noise (N, C, h, w) float32, continuing each picture's own stream.
        predict: the guided UNet.
        first: (N, C, h, w) float32, the variance-preserving state that enters the first row.
        kept: what is put back outside the mask after every row.
        dtype: the package's, for the error's advice.

    Raises:
        NumericError: the state is no longer finite.
    """
    y = first
    history: list[Array] = []
    for i, row in enumerate(table.rows()):
        unet_input, m = y, predict(y, i)
        with _overflow_is_found_below():
            history = [row.p * y + row.q * m, *history[: table.history - 1]]
            y = row.a * y + sum(b * h for b, h in zip(row.b, history, strict=False) if b)
            if row.draws:
                y = y + row.c * noise()
            if kept is not None:
                y = kept.put_back(y, *row.keep)
        check_finite(y, f"after step {i + 1} of {len(table)}", dtype)
        state = State(index=i, unet_input=unet_input, prediction=m, latent=y)
        yield state
        y = state.latent


def guided_batch(rows: Array, guided: bool) -> Array:
    """(N, …) -> (B, …): the UNet's rows, with guidance each picture twice (unconditional rows first)."""
    return np.concatenate([rows, rows]) if guided else rows


def guide(prediction: Array, scale: float, rescale: float, guided: bool) -> Array:
    """One prediction per picture from the rows of a UNet call.

    Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, in the form u + scale * (c - u); with
    `rescale` > 0 the result's standard deviation is drawn towards that of the conditional rows
    (Lin et al. 2023, arXiv 2305.08891, eqs. 14 to 16).

    Args:
        prediction: (B, C, H/8, W/8), any float dtype; B = 2N if guided, else N.
        scale: guidance scale.
        rescale: phi, 0 to 1.
        guided: whether the first half of the rows is unconditional.

    Returns:
        (N, C, H/8, W/8) float32.
    """
    rows = prediction.astype(np.float32, copy=False)
    if not guided:
        return rows
    half = len(rows) // 2
    unconditional, conditional = rows[:half], rows[half:]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the loop checks the result
        combined: Array = unconditional + scale * (conditional - unconditional)
        if rescale:
            axes = tuple(range(1, rows.ndim))
            # ddof=1 as torch.std, which diffusers uses
            wanted: Array = np.std(conditional, axes, ddof=1, keepdims=True)
            found: Array = np.std(combined, axes, ddof=1, keepdims=True)
            combined = combined * (rescale * (wanted / found) + (1 - rescale))
    return combined


def check_finite(latent: Array, when: str, dtype: str) -> None:
    """Raise NumericError if a latent, (N, C, H/8, W/8), holds NaN or infinity; `dtype` is the package's."""
    if not np.isfinite(latent).all():
        raise NumericError(
            f"the latent is not finite {when}",
            expected="finite numbers",
            fix=numeric_fix(dtype),
        )


def narrow(latent: Array, dtype: type[np.generic]) -> Array:
    """The latent in a net's dtype. What fp16 cannot hold becomes infinity, and shows in the net's output."""
    with np.errstate(over="ignore"):
        return latent.astype(dtype, copy=False)
