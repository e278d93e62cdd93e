"""The denoising loop. Every sampler is a table (docs/samplers.md); this runs any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...engines.errors import NumericError, UsageError, numeric_fix
from ...engines.spec import Array
from ..sampling.table import Table

# NumPy would warn first; the loop looks at the result and says in which step it happened.
_overflow_is_found_below = partial(np.errstate, over="ignore", invalid="ignore")
Predict = Callable[[Array, int], Array]  # (state (N, C, h, w), row) -> model output (N, C, h, w), guided


@dataclass(kw_only=True)
class State:
    """After one row: what the UNet was given, what it answered (guided), and the latent made of both.

    All (N, C, H/8, W/8) float32, variance-preserving. `profile` is of the UNet's engine; "" on the host.
    """

    index: int
    given: Array
    prediction: Array
    latent: Array
    profile: str = ""

    def replace(self, latent: Array) -> None:
        """Let the loop go on with another latent. Raises UsageError for another shape."""
        given = np.asarray(latent, np.float32)
        if given.shape != self.latent.shape:
            raise UsageError(
                f"latents of shape {given.shape} from a callback",
                expected=f"{self.latent.shape}",
                fix="Return the latents with the shape they came in.",
            )
        self.latent = given

    def denoised(self, table: Table) -> Array:
        """What the model takes the clean latent to be, solved from y = alpha * x0 + sigma * eps."""
        alpha_bar = float(table.alpha_bar[self.index])
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        y, m = self.given, self.prediction
        if table.prediction_type == "epsilon":
            return (y - sigma * m) / alpha
        return alpha * y - sigma * m if table.prediction_type == "v_prediction" else m


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A picture that stays outside a mask: RePaint's step 8 (arXiv 2201.09865) without its resampling.

    Attributes:
        latent: (N, C, h, w) float32, clean.
        noise: (N, C, h, w) float32 unit noise, that of the first state.
        mask: (N, 1, h, w) float32, 1 is repainted.
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
    keeps = table.keeps.tolist()
    h: list[Array] = []
    # Plain floats: they take the state's float32, where NumPy's own float64 scalars would widen it.
    rows = zip(*(column.tolist() for column in (table.p, table.q, table.a, table.b, table.c)), strict=True)
    for i, (p, q, a, b, c) in enumerate(rows):
        given, m = y, predict(y, i)
        with _overflow_is_found_below():
            h = [p * y + q * m, *h[: table.history - 1]]
            y = a * y + sum(b_j * h_j for b_j, h_j in zip(b, h, strict=False) if b_j)
            if table.draws[i]:
                y = y + c * noise()
            if kept is not None:
                y = kept.put_back(y, *keeps[i])
        if not np.isfinite(y).all():
            raise NumericError(
                f"the latent is not finite after step {i + 1} of {len(table)}",
                expected="finite numbers",
                fix=numeric_fix(dtype),
            )
        state = State(index=i, given=given, prediction=m, latent=y)
        yield state
        y = state.latent


def narrow(latent: Array, dtype: type[np.generic]) -> Array:
    """The latent as a net wants it; what fp16 cannot hold becomes infinity, which the net's answer shows."""
    with np.errstate(over="ignore"):
        return latent.astype(dtype, copy=False)
