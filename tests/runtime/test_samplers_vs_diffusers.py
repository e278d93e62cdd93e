"""Our tables against diffusers' schedulers.

A scheduler without clipping is linear in its start, the model's outputs and the noise. Feeding its `step()` with unit
vectors therefore reads out, for every UNet call, the model input as a row of coefficients over (start, outputs,
noises), and last the final latent. Our table, unrolled, gives the same rows. Equal rows mean equal pictures for every
model and every seed.

Relative error of a row: largest absolute difference / largest absolute coefficient; of a table: the worst row.

diffusers computes parts in float32. Where its rounding exceeds 1e-5, the comparison casts the scheduler's finished
float32 grid (sigmas, alpha_bar) to float64 before stepping (`wide=True`), so that only its formulas are compared.
"""

import contextlib
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Iterator

import diffusers
import numpy as np
import pytest
import torch

from latentrt.runtime.samplers import SAMPLERS, Table, make_table, resolve

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


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """The schedulers log advice about ignored keys and odd step counts; none of it bears on the numbers."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def _quad(function, low, high, **_):
    """Gauss-Legendre with 8 nodes: exact for the cubics that LMS integrates."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    low, high = float(low), float(high)
    middle, half = (low + high) / 2, (high - low) / 2
    return (half * sum(w * float(function(middle + half * x)) for x, w in zip(nodes, weights, strict=True)), 0.0)


def scheduler_class(name: str) -> type:
    if name != "LMSDiscreteScheduler":
        return getattr(diffusers, name)
    module = "diffusers.schedulers.scheduling_lms_discrete"
    if module not in sys.modules:  # diffusers hides LMS unless scipy is there; all it needs is `integrate.quad`
        scipy = types.ModuleType("scipy")
        scipy.integrate = types.SimpleNamespace(quad=_quad)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "scipy", scipy)
            importlib.import_module(module)
    return getattr(sys.modules[module], name)


def make_scheduler(name: str, config: dict, **options):
    with warnings.catch_warnings():
        # DPM-Solver without "++" is announced as deprecated, each time one is made
        warnings.filterwarnings("ignore", message=".*algorithm_type.*is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=NUMPY2, category=DeprecationWarning)
        return scheduler_class(name).from_config(config, **options)


def set_steps(scheduler, steps, *, wide, **kwargs) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NUMPY2, category=DeprecationWarning)
        scheduler.set_timesteps(steps, **kwargs)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if wide:
        for name in ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "alphas_cumprod"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).double())
        for name in ("final_alpha_cumprod", "one"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).double())


@contextlib.contextmanager
def noise_from(scheduler, source) -> Iterator[None]:
    """Replace the scheduler's noise by `source(shape)`."""
    module = sys.modules[type(scheduler).__module__]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NUMPY2, category=DeprecationWarning)
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda shape, **_: source(shape))
        yield


def run(scheduler, x, model, **step_options):
    """diffusers' own loop; yields nothing, returns (timesteps, model inputs, final)."""
    inputs, times = [], []
    for t in scheduler.timesteps:
        y = scheduler.scale_model_input(x, t)
        inputs.append(y)
        times.append(float(t))
        x = scheduler.step(model(y, t), t, x, return_dict=False, **step_options)[0]
    return np.array(times), inputs, x


def probe(scheduler, **step_options) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, rows) of a scheduler whose timesteps are set."""
    size = 1 + 2 * len(scheduler.timesteps)
    used = 0

    def unit(*_):
        nonlocal used
        vector = torch.zeros((1, size, 1, 1), dtype=torch.float64)
        vector[0, used] = 1
        used += 1
        return vector

    with noise_from(scheduler, unit):
        times, inputs, final = run(scheduler, unit() * scheduler.init_noise_sigma, unit, **step_options)
    return times, np.stack([row.numpy().ravel() for row in [*inputs, final]]).astype(np.float64)


def unroll(table: Table) -> np.ndarray:
    """The rows a table gives for unit vectors."""
    size = 1 + 2 * len(table)
    used = 0

    def unit():
        nonlocal used
        vector = np.zeros(size)
        vector[used] = 1
        used += 1
        return vector

    y = table.init * unit()
    rows, h = [y], []
    for i in range(len(table)):
        h = [table.p[i] * y + table.q[i] * unit(), *h][: table.history]
        y = table.a[i] * y + sum(b * past for b, past in zip(table.b[i], h, strict=False))
        if table.draws[i]:
            y = y + table.c[i] * unit()
        rows.append(y)
    return np.stack(rows)


def row_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max(axis=1)))


WORST: dict[str, float] = {}


def check(table: Table, scheduler, **step_options) -> None:
    times, rows = probe(scheduler, **step_options)
    assert len(times) == len(table)
    np.testing.assert_allclose(table.t, times, rtol=1e-6, atol=2e-4)
    whole = times == np.round(times)
    np.testing.assert_array_equal(table.t[whole], times[whole])
    error = row_error(unroll(table), rows)
    WORST[table.name] = max(WORST.get(table.name, 0.0), error)
    assert error <= TOLERANCE


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
        noise_prediction = {"solver_order": order, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
        CLASSES[f"dpm_solver_{order}{kind}"] = (cls, noise_prediction)
for order in (1, 2):
    cls = "DPMSolverMultistepScheduler"
    CLASSES[f"dpmpp_{order}m_sde"] = (cls, {"solver_order": order, "algorithm_type": "sde-dpmsolver++"})
    noise_prediction = {"solver_order": order, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}
    CLASSES[f"dpm_solver_{order}m_sde"] = (cls, noise_prediction)


@pytest.mark.parametrize("steps", [8, 20, 50])
@pytest.mark.parametrize("name", CLASSES)
def test_named_sampler_equals_from_config(name: str, steps: int) -> None:
    cls, options = CLASSES[name]
    scheduler = make_scheduler(cls, SD, **options)
    set_steps(scheduler, steps, wide=True)
    step_options = {"eta": 0.0} if name == "tcd" else {}
    check(make_table(resolve(name, SD), steps), scheduler, **step_options)
