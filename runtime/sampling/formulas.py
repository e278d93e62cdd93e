"""The samplers, each as the formula of its paper.

A formula walks along `run.steps`, pairs of noise levels (s, t) with x = alpha*x0 + sigma*eps at each, and
calls `predict(x, s)` once per UNet evaluation. What comes back is the clean latent x0, the noise eps or the
model's own output, as the sampler's `history` in `samplers.SAMPLERS` says. `noise()` returns fresh unit
normal noise. Every formula must be linear in x, predictions and noise: `table.trace` runs it on unit vectors.
In the k-diffusion family alpha = 1, so that x = x0 + sigma*eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from ...engines.noise_schedule import Level
from .levels import Run
from .table import Noise, Predict, Vector

Formula: TypeAlias = Callable[[Vector, Predict, Noise, Run], Vector]
Past: TypeAlias = list[tuple[Level, Vector]]  # (where, prediction), newest first

# --- one step at a time -----------------------------------------------------------------------------------


def ddpm(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Sample the posterior of the forward process (Ho et al. 2020, eq. 6-7)."""
    for s, t in run.steps:
        x0 = predict(x, s)
        alpha = s.alpha / t.alpha  # of the jump t -> s
        beta = 1 - alpha**2
        x = (t.alpha * beta * x0 + alpha * t.sigma**2 * x) / s.sigma**2
        if s.t > 0:
            deviation = math.sqrt(beta) if run.config.variance_type == "fixed_large" else _posterior(s, t)
            x = x + deviation * noise()
    return x


def ddim(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Song et al. 2021, eq. 12 and 16; eta = 0 is deterministic, eta = 1 has DDPM's noise."""
    eta = run.config.eta
    for s, t in run.steps:
        x0 = predict(x, s)
        eps = (x - s.alpha * x0) / s.sigma
        up = eta * _posterior(s, t)
        x = t.alpha * x0 + math.sqrt(t.sigma**2 - up**2) * eps
        if eta > 0:
            x = x + up * noise()
    return x


def _posterior(s: Level, t: Level) -> float:
    """Standard deviation of q(x_t | x_s, x0) (Ho et al. 2020, eq. 7)."""
    return t.sigma / s.sigma * math.sqrt(max(1 - (s.alpha / t.alpha) ** 2, 0))


def euler(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Euler's method in sigma (Karras et al. 2022, Algorithm 1 without its second-order correction)."""
    for s, t in run.steps:
        d = (x - predict(x, s)) / s.sigma
        x = x + d * (t.sigma - s.sigma)
    return x


def euler_ancestral(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Euler to sigma_down, then noise up to the next sigma (k-diffusion `sample_euler_ancestral`)."""
    for s, t in run.steps:
        down, up = _ancestral(s, t)
        d = (x - predict(x, s)) / s.sigma
        x = x + d * (down - s.sigma) + up * noise()
    return x


def _ancestral(s: Level, t: Level) -> tuple[float, float]:
    """(sigma_down, sigma_up), whose squares sum to t.sigma^2: mean and noise of the posterior."""
    up = t.sigma * math.sqrt(max(1 - (t.sigma / s.sigma) ** 2, 0))
    return t.sigma**2 / s.sigma, up


def heun(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Karras et al. 2022, Algorithm 1: trapezoidal rule, plain Euler into sigma = 0."""
    for s, t in run.steps:
        d = predict(x, s)
        dt = t.sigma - s.sigma
        end = x + d * dt
        x = end if t.sigma == 0 else x + (d + predict(end, t)) / 2 * dt
    return x


def dpm2(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Midpoint rule, the middle taken in log sigma (k-diffusion `sample_dpm_2`; Lu et al. 2022, Alg. 1)."""
    for s, t in run.steps:
        d = predict(x, s)
        if t.sigma > 0:
            middle = _log_middle(run, s, t.sigma)
            d = predict(x + d * (middle.sigma - s.sigma), middle)
        x = x + d * (t.sigma - s.sigma)
    return x


def dpm2_ancestral(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """`dpm2` down to sigma_down, then noise back up (k-diffusion `sample_dpm_2_ancestral`)."""
    for s, t in run.steps:
        d = predict(x, s)
        if t.sigma == 0:
            return x - d * s.sigma
        down, up = _ancestral(s, t)
        middle = _log_middle(run, s, down)
        d = predict(x + d * (middle.sigma - s.sigma), middle)
        x = x + d * (down - s.sigma) + up * noise()
    return x


def dpmpp_2s_ancestral(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """DPM-Solver++(2S) down to sigma_down, then noise back up (k-diffusion `sample_dpmpp_2s_ancestral`)."""
    for s, t in run.steps:
        x0 = predict(x, s)
        if t.sigma == 0:
            return x0
        down, up = _ancestral(s, t)
        middle = _log_middle(run, s, down)
        r = middle.sigma / s.sigma
        x0 = predict(r * x + (1 - r) * x0, middle)
        r = down / s.sigma
        x = r * x + (1 - r) * x0 + up * noise()
    return x


def _log_middle(run: Run, s: Level, sigma: float) -> Level:
    middle = math.sqrt(s.sigma * sigma)
    return Level(float(run.config.noise.t_at(np.array(middle))), s.alpha, np.float64(middle))


def lcm(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Latent consistency sampling (Luo et al. 2023, Algorithm 3): predict, then noise again, but at the end.

    c_skip and c_out are the boundary conditions of Song et al. 2023, eq. 25, with sigma_data = 0.5.
    Departure, as in diffusers: the timestep in them is scaled by 10, which makes c_skip vanish.
    """
    for i, (s, t) in enumerate(run.steps):
        scaled = s.t * run.config.timestep_scaling
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        x = c_out * predict(x, s) + c_skip * x
        if i < len(run.steps) - 1:
            x = t.alpha * x + t.sigma * noise()
    return x


def tcd(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Trajectory consistency (Zheng et al. 2024, Algorithm 2): jump below the target, then noise up to it."""
    for i, (s, t) in enumerate(run.steps):
        x0 = predict(x, s)
        below = run.config.noise.level(math.floor((1 - run.config.eta) * t.t))
        x = below.alpha * x0 + below.sigma * (x - s.alpha * x0) / s.sigma
        if run.config.eta > 0 and i < len(run.steps) - 1:
            ratio = t.alpha / below.alpha
            x = ratio * x + math.sqrt(1 - ratio**2) * noise()
    return x


# --- samplers with a memory, and the exponential integrators ----------------------------------------------
# Exponential integrators (DPM-Solver, DEIS, UniPC) solve the linear part of the diffusion ODE exactly and
# expand the prediction in the half log-SNR lambda. All of them make the same step,
#
#     x_t = keep * x_s - weight * (phi1(z)*D0 + phi2(z)*D1 + phi3(z)*D2) [+ noise]
# where D0, D1, D2 are the prediction and its divided differences, and (keep, weight, z) depends on what is
# predicted.


def plms(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Pseudo linear multistep (Liu et al. 2022, eq. 9, 12); its first step is made twice, no Runge-Kutta.

    Departure, as in diffusers: raw outputs are mixed, and a mix of v-predictions is turned into noise after.
    """
    outputs: list[Vector] = []
    first = x
    for i, (s, t) in enumerate(run.steps):
        if i == 1:
            mixed, x = (predict(x, t) + outputs[0]) / 2, first
        else:
            outputs = [predict(x, s), *outputs[:3]]
            mixed = sum(w * m for w, m in zip(_ADAMS_BASHFORTH[len(outputs)], outputs, strict=True))
        if run.config.prediction_type == "v_prediction":
            mixed = s.alpha * mixed + s.sigma * x
        x = t.alpha / s.alpha * x + (t.sigma - t.alpha * s.sigma / s.alpha) * mixed
    return x


_ADAMS_BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def lms(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """Adams-Bashforth on the uneven grid of sigmas, order 4 (k-diffusion `sample_lms`)."""
    past: list[tuple[float, Vector]] = []
    for s, t in run.steps:
        past = [(s.sigma, predict(x, s)), *past[:3]]
        dt = t.sigma - s.sigma
        nodes = [(sigma - s.sigma) / dt for sigma, _ in past]
        weights = interpolatory_weights(nodes, [1 / (k + 1) for k in range(len(past))])
        x = x + dt * sum(w * d for w, (_, d) in zip(weights, past, strict=True))
    return x


def interpolatory_weights(nodes: Sequence[float], moments: Sequence[float]) -> Vector:
    """Weights w with sum_j w_j * nodes_j^k = moments_k, so exact for the polynomial through the nodes."""
    powers = np.arange(len(nodes))[:, None]
    try:
        return np.linalg.solve(np.power(np.array(nodes), powers), np.array(moments))
    except np.linalg.LinAlgError:  # two levels coincide; `trace` refuses what is not finite
        return np.full(len(nodes), np.nan)


class _Jump(NamedTuple):
    """The exact part of a step between two levels."""

    keep: float
    weight: float
    z: float
    noise: float


def _jump(s: Level, t: Level, algorithm: str) -> _Jump:
    """Lu et al. 2022a, eq. 3.4 (noise); Lu et al. 2022b, eq. 9 (data, "++") and eq. 12-13 (SDE variants)."""
    h = t.lam - s.lam
    if algorithm == "dpmsolver++":
        return _Jump(t.sigma / s.sigma, t.alpha, -h, 0.0)
    if algorithm == "dpmsolver":
        return _Jump(t.alpha / s.alpha, t.sigma, h, 0.0)
    if algorithm == "sde-dpmsolver++":
        return _Jump(t.sigma / s.sigma * np.exp(-h), t.alpha, -2 * h, t.sigma * np.sqrt(-np.expm1(-2 * h)))
    return _Jump(t.alpha / s.alpha, 2 * t.sigma, h, t.sigma * np.sqrt(np.expm1(2 * h)))


def _phi(z: float) -> tuple[float, float, float]:
    """phi1 = e^z - 1, and the weights of the first and second divided difference."""
    if z == 0:  # a last step that stands still: a sigma ramp with final_sigmas_type "sigma_min"
        return 0.0, 0.0, 0.0
    phi1 = np.expm1(z)
    phi2 = phi1 / z - 1
    return phi1, phi2, phi2 / z - 0.5


def dpm_multistep(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """DPM-Solver(++) multistep, orders 1 to 3 (Lu et al. 2022b, Algorithm 2; SDE variants in the appendix).

    Departure from diffusers: its third-order SDE update has the wrong sign on the constant of phi3, so that
    the second difference does not vanish with the step. This follows k-diffusion's `sample_dpmpp_3m_sde`.
    """
    config = run.config
    past: Past = []
    for i, (s, t) in enumerate(run.steps):
        past = [(s, predict(x, s)), *past[:2]]
        jump = _jump(s, t, config.algorithm_type)
        used = past[: _multistep_order(run, i)]
        x = jump.keep * x - jump.weight * _differences(used, t, jump.z, config.solver_type)
        if config.algorithm_type.startswith("sde"):
            x = x + jump.noise * noise()
    return x


def _multistep_order(run: Run, i: int) -> int:
    """Order of step i: limited by the outputs at hand, and lowered at the end."""
    config = run.config
    short = config.lower_order_final and run.total < 15
    order = min(config.solver_order, i + 1)
    if i == len(run.steps) - 1 and (short or config.euler_at_final or run.steps[i][1].sigma == 0):
        return 1
    return min(order, 2) if short and i == len(run.steps) - 2 else order


def _differences(past: Past, t: Level, z: float, solver_type: str) -> Vector:
    """phi1*D0 + phi2*D1 + phi3*D2 around the newest prediction (Lu et al. 2022b, eq. 14 and Algorithm 2)."""
    phi1, phi2, phi3 = _phi(z)
    s, m0 = past[0]
    h = t.lam - s.lam
    if len(past) == 1:
        return phi1 * m0
    h0 = s.lam - past[1][0].lam
    d1 = (m0 - past[1][1]) * (h / h0)
    if len(past) == 2:
        return phi1 * m0 + (phi1 / 2 if solver_type == "midpoint" else phi2) * d1
    h1 = past[1][0].lam - past[2][0].lam
    bend = (d1 - (past[1][1] - past[2][1]) * (h / h1)) / (h0 + h1)
    return phi1 * m0 + phi2 * (d1 + h0 * bend) + phi3 * h * bend


def dpm_singlestep(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """DPM-Solver(++) singlestep: groups of 1 to 3 steps start again from the group's first state.

    Lu et al. 2022a, Algorithms 1 and 2, with the grid's own levels between, as in diffusers.
    """
    config = run.config
    orders = _singlestep_orders(run)
    past: Past = []
    base = x
    for i, (s, t) in enumerate(run.steps):
        past = [(s, predict(x, s)), *past[:2]]
        group = past[: orders[run.start + i]][::-1]  # oldest first
        if len(group) == 1:
            base = x
        jump = _jump(group[0][0], t, config.algorithm_type)
        x = jump.keep * base - jump.weight * _group_differences(group, t, jump.z, config.solver_type)
        if config.algorithm_type.startswith("sde"):
            x = x + jump.noise * noise()
    return x


def _singlestep_orders(run: Run) -> list[int]:
    """Orders 1, 2, .., p over and over; lower at the end where groups do not fit or the final sigma is 0."""
    order, total = run.config.solver_order, run.total
    cycle = list(range(1, order + 1))
    to_zero = run.steps[-1][1].sigma == 0
    orders = (cycle * (total // order + 1))[:total]
    if (run.config.lower_order_final or to_zero) and total % order == 0:
        orders[-order:] = [[1], [1, 1], [1, 2, 1]][order - 1]
    return [*orders[:-1], 1] if to_zero else orders


def _group_differences(group: Past, t: Level, z: float, solver_type: str) -> Vector:
    """phi1*D0 + phi2*D1 + phi3*D2 around the oldest prediction of a group (Lu et al. 2022a, Algs. 1, 2)."""
    phi1, phi2, phi3 = _phi(z)
    s, m0 = group[0]
    h = t.lam - s.lam
    slopes = [(m - m0) / ((level.lam - s.lam) / h) for level, m in group[1:]]
    if not slopes:
        return phi1 * m0
    if len(slopes) == 1:
        return phi1 * m0 + (phi1 / 2 if solver_type == "midpoint" else phi2) * slopes[0]
    if solver_type == "midpoint":
        return phi1 * m0 + phi2 * slopes[1]
    r1, r2 = ((level.lam - s.lam) / h for level, _ in group[1:])
    d1 = (r2 * slopes[0] - r1 * slopes[1]) / (r2 - r1)
    d2 = 2 * (slopes[1] - slopes[0]) / (r2 - r1)
    return phi1 * m0 + phi2 * d1 + phi3 * d2


def deis(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """DEIS (Zhang & Chen 2023, eq. 15): eps as a polynomial in log rho, integrated exactly over rho."""
    past: Past = []
    for i, (s, t) in enumerate(run.steps):
        past = [(s, predict(x, s)), *past[:2]]
        used = past[: _multistep_order(run, i)]
        v = s.lam - t.lam  # log rho_t - log rho_s; the integrals of v^k e^v from 0 to v follow
        moments = [np.expm1(v), (v - 1) * np.exp(v) + 1, (v * v - 2 * v + 2) * np.exp(v) - 2]
        weights = interpolatory_weights([s.lam - level.lam for level, _ in used], moments[: len(used)])
        slope = sum(w * m for w, (_, m) in zip(weights, used, strict=True))
        x = t.alpha / s.alpha * (x + s.sigma * slope)
    return x


def unipc(x: Vector, predict: Predict, noise: Noise, run: Run) -> Vector:
    """UniPC-p (Zhao et al. 2023, Algorithms 1 and 2): each output first corrects the step that led to it."""
    config = run.config
    past: Past = []
    before, order = x, 1
    for i, (s, t) in enumerate(run.steps):
        m = predict(x, s)
        if i > 0 and run.start + i - 1 not in config.disable_corrector:
            x = _unipc_step(before, past[:order], s, run, corrector=m)
        past = [(s, m), *past[:2]]
        order = min(config.solver_order, i + 1, len(run.steps) - i if config.lower_order_final else i + 1)
        before = x
        x = _unipc_step(x, past[:order], t, run)
    return x


def _unipc_step(x: Vector, past: Past, t: Level, run: Run, corrector: Vector | None = None) -> Vector:
    """A UniP step from past[0]'s level to t; UniC once t's output is known (Zhao et al. 2023, Alg. 1, 2)."""
    config = run.config
    s, m0 = past[0]
    jump = _jump(s, t, "dpmsolver++" if config.predict_x0 else "dpmsolver")
    h, z = t.lam - s.lam, jump.z
    scale = z if config.solver_type == "bh1" else np.expm1(z)  # B(h)
    points = [((level.lam - s.lam) / h, m) for level, m in past[1:]]
    if corrector is not None:
        points.append((np.float64(1), corrector))
    update = np.expm1(z) * m0
    if points:  # at order 1 B(h) must not enter: bh1 has B = infinity on the step into sigma = 0
        weights = _unipc_weights([r for r, _ in points], z, scale)
        update = update + scale * sum(w / r * (m - m0) for w, (r, m) in zip(weights, points, strict=True))
    return jump.keep * x - jump.weight * update


def _unipc_weights(ratios: list[float], z: float, scale: float) -> Vector:
    """Solve R(h) a = phi(h) / B(h) (Zhao et al. 2023, eq. 5); a single weight is 1/2 for any h."""
    if len(ratios) == 1:
        return np.array([0.5])
    phi, right = np.expm1(z), list[float]()
    for k in range(1, len(ratios) + 1):
        phi = phi / z - 1 / math.factorial(k)
        right.append(phi * math.factorial(k) / scale)
    return interpolatory_weights(ratios, right)
