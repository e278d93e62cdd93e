"""A model's training schedule: alpha_bar and sigma at a timestep.

Notation: the state is x = alpha*x0 + sigma*eps. In the variance-preserving form alpha^2 + sigma^2 = 1 and
alpha^2 = alpha_bar (Ho et al. 2020); in the variance-exploding form of Karras et al. 2022 alpha = 1. `sigma`
without a level always means the latter, sqrt((1 - alpha_bar) / alpha_bar); lambda = log(alpha / sigma) is the
same in both.

It is kept to float32 and computed in the order in which diffusers (and so most checkpoints' training code)
computes it. That costs nothing and makes rounded timesteps, and with them pictures, come out equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import SamplerError

Array: TypeAlias = NDArray[np.float64]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# What diffusers puts in place of a terminal alpha_bar of zero where the sampler divides by it: the smallest
# positive float16.
ZERO_SNR_FLOOR = 2.0**-24
_MOST_TIMESTEPS = 100_000  # models have 1000; a config from a stranger must not take all memory


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level, and the timestep the model is told there: x = alpha*x0 + sigma*eps."""

    t: float
    alpha: float
    sigma: float

    @property
    def vp_scale(self) -> float:
        """Factor that makes a state of this level variance preserving (c_in of Karras et al. 2022)."""
        return 1 / math.hypot(self.alpha, self.sigma)

    @property
    def lam(self) -> float:
        """Half log-SNR, log(alpha / sigma): infinite where sigma is 0."""
        return np.log(self.alpha) - np.log(self.sigma)


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """How noisy a training timestep is.

    Args:
        num_train_timesteps: T; timesteps run from 0 to T-1.
        beta_start: first beta, for "linear" and "scaled_linear".
        beta_end: last beta.
        beta_schedule: "linear" (Ho et al. 2020), "scaled_linear" (linear in sqrt(beta), latent diffusion) or
            "squaredcos_cap_v2" (Nichol & Dhariwal 2021, eq. 17).
        trained_betas: the T betas themselves; the fields above are then ignored.
        rescale_betas_zero_snr: shift the schedule to alpha_bar = 0 at T-1 (Lin et al. 2024, Algorithm 1).
        zero_snr_floor: alpha_bar to put there instead of 0; ZERO_SNR_FLOOR for samplers that divide by it.

    Raises:
        SamplerError: an unknown beta schedule, or a field out of range.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    zero_snr_floor: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.beta_schedule not in BETA_SCHEDULES and self.trained_betas is None:
            raise SamplerError(
                f"beta_schedule {self.beta_schedule!r}",
                expected=" or ".join(BETA_SCHEDULES),
                fix="Correct the model's scheduler_config.json.",
            )
        if isinstance(self.num_train_timesteps, int) and self.num_train_timesteps > _MOST_TIMESTEPS:
            raise SamplerError(
                f"num_train_timesteps is {self.num_train_timesteps}",
                expected=f"1 to {_MOST_TIMESTEPS}",
                fix="Correct the model's scheduler_config.json.",
            )
        betas = self._betas
        right_length = len(betas) == self.num_train_timesteps > 0
        if not right_length or not ((betas > 0) & (betas <= 1)).all():
            raise SamplerError(
                f"{len(betas)} betas between {betas.min(initial=1):g} and {betas.max(initial=0):g}",
                expected=f"num_train_timesteps = {self.num_train_timesteps} > 0 betas in (0, 1]",
                fix="Correct the model's scheduler_config.json.",
            )

    @cached_property
    def _betas(self) -> NDArray[np.float32]:
        steps = max(int(self.num_train_timesteps), 0)
        if self.trained_betas is not None:
            return np.array(self.trained_betas, dtype=np.float32)
        if self.beta_schedule == "linear":
            return _linspace32(self.beta_start, self.beta_end, steps)
        if self.beta_schedule == "scaled_linear":
            return np.square(_linspace32(self.beta_start**0.5, self.beta_end**0.5, steps))
        return np.array(_cosine_betas(steps), dtype=np.float32)

    @cached_property
    def alpha_bar(self) -> Array:
        """(T,) cumulative product of 1 - beta; float32 values."""
        betas = self._betas
        if self.rescale_betas_zero_snr:
            betas = _zero_terminal_snr(betas)
        alpha_bar = _cumprod32(np.subtract(1, betas)).astype(np.float64)
        if self.rescale_betas_zero_snr and self.zero_snr_floor > 0:
            alpha_bar[-1] = self.zero_snr_floor
        return _frozen(alpha_bar)

    @cached_property
    def sigmas(self) -> Array:
        """(T,) sqrt((1 - alpha_bar) / alpha_bar), ascending float32 values; infinite where alpha_bar is 0."""
        alpha_bar = self.alpha_bar.astype(np.float32)
        with np.errstate(divide="ignore"):
            odds = np.divide(np.subtract(1, alpha_bar), alpha_bar)
        return _frozen(np.sqrt(odds).astype(np.float64))

    @cached_property
    def log_sigmas(self) -> Array:
        """(T,) log(sigmas), which is -lambda; float32 values."""
        with np.errstate(divide="ignore"):
            return _frozen(np.log(self.sigmas.astype(np.float32)).astype(np.float64))

    def sigma_at(self, t: Array) -> Array:
        """Sigma at timesteps between 0 and T-1, linear in between, constant beyond; same shape as `t`."""
        return np.interp(t, np.arange(len(self.sigmas)), self.sigmas)

    def t_at(self, sigma: Array) -> Array:
        """Timestep of a sigma, linear in log sigma, between 0 and T-1: the inverse k-diffusion uses."""
        logs = self.log_sigmas
        wanted = np.log(np.maximum(sigma, 1e-10))
        low = np.searchsorted(logs[1:-1], wanted, side="right")  # of the interval that holds it
        weight = np.minimum(np.maximum((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0), 1)
        return low + np.asarray(weight, dtype=np.float64)

    def level(self, t: int) -> Level:
        """The variance-preserving level of an integer timestep.

        Raises:
            SamplerError: the timestep lies beyond the training schedule.
        """
        if not 0 <= t < len(self.alpha_bar):
            raise SamplerError(
                f"the schedule asks for timestep {t}",
                expected=f"0 to {len(self.alpha_bar) - 1}",
                fix="Use fewer steps, or a smaller steps_offset.",
            )
        alpha_bar = self.alpha_bar[t]
        return Level(float(t), np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def _linspace32(start: float, stop: float, count: int) -> NDArray[np.float32]:
    """torch.linspace in float32, bit for bit: it counts from both ends and rounds once per element."""
    if count < 2:
        return np.full(count, start, dtype=np.float32)
    ends = np.array([start, stop], dtype=np.float32)
    step = float((ends[1] - ends[0]) / np.float32(count - 1))
    index = np.arange(count)
    up, down = float(ends[0]) + step * index, float(ends[1]) - step * (count - 1 - index)
    return np.where(index < count // 2, up, down).astype(np.float32)


def _cumprod32(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """torch.cumprod on float32: accumulated in float64, stored in float32."""
    return np.cumprod(factors.astype(np.float64)).astype(np.float32)


def _cosine_betas(steps: int) -> list[float]:
    """Betas of the squared-cosine alpha_bar, each at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]


def _zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Betas whose last alpha_bar is 0 and whose first is unchanged (Lin et al. 2024, Algorithm 1)."""
    root = np.sqrt(_cumprod32(np.subtract(1, betas)))
    alpha_bar = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
    alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return np.subtract(1, alphas)


def _frozen(values: Array) -> Array:
    values.flags.writeable = False
    return values
