"""What diffusers' schedulers compute, read out as numbers.

A scheduler without clipping is linear in its start, the model's outputs and the noise. Feeding its `step()`
with unit vectors therefore reads out, for every UNet call, the model input as a row of coefficients over
(start, outputs, noises), and last the final latent. Our table, unrolled, gives the same rows. Equal rows mean
equal pictures for every model and every seed.

Relative error of a row: largest absolute difference / largest absolute coefficient; of a table: the worst
row.

diffusers is used as it is, its float32 schedules included: 1e-5 is above their rounding. Only the steps of
the Euler family run in float64 here: from a sigma of 4096, where zero terminal SNR begins, their float32
differences lose up to 2e-5, and how much depends on the processor.
"""

import contextlib
import sys
import types
import warnings
from collections.abc import Iterator

import diffusers
import numpy as np
import pytest
import torch

from latentrt.runtime.sampling.table import Table

SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
}
TOLERANCE = 1e-5
# torch tensors lack keywords that NumPy 2 asks for when diffusers calls np.array(tensor) and np.log(tensor)
NUMPY2 = ".*__array.*"


def _quad(function, low, high, **_):
    """Gauss-Legendre with 2 nodes: exact for the cubics that LMS integrates, and quicker than scipy."""
    middle, half = (float(low) + float(high)) / 2, (float(high) - float(low)) / 2
    return (half * (function(middle - half / 3**0.5) + function(middle + half / 3**0.5)), 0.0)


def make_scheduler(name: str, config: dict, **options):
    scheduler_class = getattr(diffusers, name)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        if name.startswith(
            ("KDPM2", "LMS", "Heun")
        ):  # their constructors lay 1000 steps, slowly, for nothing
            patch.setattr(scheduler_class, "set_timesteps", lambda *_: None)
            patch.setattr(scheduler_class, "sigmas", torch.zeros(1), raising=False)
        # DPM-Solver without "++" is announced as deprecated, each time one is made
        warnings.filterwarnings("ignore", message=".*algorithm_type.*is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=NUMPY2, category=DeprecationWarning)
        return scheduler_class.from_config(config, **options)


def set_steps(scheduler, steps, **kwargs) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NUMPY2, category=DeprecationWarning)
        scheduler.set_timesteps(steps, **kwargs)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


@contextlib.contextmanager
def noise_from(scheduler, source) -> Iterator[None]:
    """Replace the scheduler's noise by `source(shape)`."""
    module = sys.modules[type(scheduler).__module__]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NUMPY2, category=DeprecationWarning)
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda shape, **_: source(shape))
        if hasattr(module, "integrate"):
            patch.setattr(module, "integrate", types.SimpleNamespace(quad=_quad))
        yield


@contextlib.contextmanager
def in_float64(scheduler) -> Iterator[None]:
    """Let steps that would narrow the sample keep its float64."""
    narrow = torch.Tensor.to

    def to(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        kept = tensor.dtype == torch.float64 and args == (torch.float32,)
        return tensor if kept else narrow(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if type(scheduler).__name__.startswith("Euler"):
            patch.setattr(torch.Tensor, "to", to)
            patch.setattr(scheduler, "sigmas", scheduler.sigmas.double())
        yield


def run(scheduler, x, model, start=0, **step_options):
    """diffusers' own loop from step `start` on; returns (timesteps, model inputs, final)."""
    inputs, times = [], []
    for t in scheduler.timesteps[start * scheduler.order :]:
        y = scheduler.scale_model_input(x, t)
        inputs.append(y)
        times.append(float(t))
        x = scheduler.step(model(y, t), t, x, return_dict=False, **step_options)[0]
    return np.array(times), inputs, x


def probe(scheduler, start=0, **step_options) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """(timesteps, rows, whether noise was drawn) of a scheduler whose timesteps are set."""
    size = 1 + 2 * len(scheduler.timesteps[start * scheduler.order :])
    used = 0
    drawn: list[bool] = []

    def unit():
        nonlocal used
        vector = torch.zeros((1, size, 1, 1), dtype=torch.float64)
        vector[0, used] = 1
        used += 1
        return vector

    def model(*_):
        drawn.append(False)
        return unit()

    def noise(_):
        drawn[-1] = True
        return unit()

    x = unit()
    if start:  # image-to-image: what noise adds to a black image
        first = start * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(torch.zeros_like(x), x, scheduler.timesteps[first : first + 1])
    else:
        x = x * scheduler.init_noise_sigma
    with noise_from(scheduler, noise), in_float64(scheduler):
        times, inputs, final = run(scheduler, x, model, start, **step_options)
    rows = np.stack([row.numpy().ravel() for row in [*inputs, final]]).astype(np.float64)
    return times, rows, drawn


def loop(table: Table, x, model, noise, dtype=np.float64) -> list:
    """The three-line loop; returns all states, the final latent last. `x` is the unit noise."""
    t, p, q, a, b, c = (getattr(table, column).astype(dtype) for column in "tpqabc")
    y = dtype(table.init) * x
    states, h = [y], []
    for i in range(len(table)):
        h = [p[i] * y + q[i] * model(y, t[i]), *h][: table.history]
        y = a[i] * y + sum(b_j * h_j for b_j, h_j in zip(b[i], h, strict=False))
        if table.draws[i]:
            y = y + c[i] * noise()
        states.append(y)
    return states


def unroll(table: Table) -> np.ndarray:
    """The rows a table gives for unit vectors."""
    units = iter(np.eye(1 + 2 * len(table)))
    return np.stack(loop(table, next(units), lambda *_: next(units), lambda: next(units)))


def row_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)))


def check(table: Table, scheduler, *, fractional: float = 5e-4, **options) -> None:
    times, rows, drawn = probe(scheduler, **options)
    assert len(times) == len(table)
    assert table.draws.tolist() == drawn
    # fractional timesteps come out of float32 logarithms in diffusers; whole ones must be equal
    np.testing.assert_allclose(
        table.t, times, rtol=0, atol=fractional if scheduler.timesteps.is_floating_point() else 0
    )
    assert row_error(unroll(table), rows) <= TOLERANCE


# sampler -> (diffusers class, options on top of the model's config)
CLASSES: dict[str, tuple[str, dict]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
for order in (1, 2, 3):
    for kind, cls in (("m", "DPMSolverMultistepScheduler"), ("s", "DPMSolverSinglestepScheduler")):
        CLASSES[f"dpmpp_{order}{kind}"] = (cls, {"solver_order": order, "algorithm_type": "dpmsolver++"})
        noise_prediction = {
            "solver_order": order,
            "algorithm_type": "dpmsolver",
            "final_sigmas_type": "sigma_min",
        }
        CLASSES[f"dpm_solver_{order}{kind}"] = (cls, noise_prediction)
for order in (1, 2):
    cls = "DPMSolverMultistepScheduler"
    CLASSES[f"dpmpp_{order}m_sde"] = (cls, {"solver_order": order, "algorithm_type": "sde-dpmsolver++"})
    noise_prediction = {
        "solver_order": order,
        "algorithm_type": "sde-dpmsolver",
        "final_sigmas_type": "sigma_min",
    }
    CLASSES[f"dpm_solver_{order}m_sde"] = (cls, noise_prediction)


def step_options(name: str, eta: float = 0.0) -> dict:
    return {"eta": eta} if name in ("ddim", "DDIMScheduler", "tcd", "TCDScheduler") else {}
