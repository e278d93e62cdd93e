"""Why blocks of the UNet are not reused from step to step: at the same cost, fewer steps are nearer the end.

DeepCache (Ma et al. 2023, arXiv 2312.00858) keeps what the inner blocks made and runs the outer ones alone in
most steps. It is measured with its authors' own implementation over diffusers, on the demo model:

    pip install DeepCache
    pytest -m slow -s tests/demo/test_block_reuse.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentrt.demo.checker import score
from latentrt.demo.shapes import held_out_scenes

CHECKPOINT = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"
SCENES = held_out_scenes()[:20]
STEPS, END = 20, 200
GUIDANCE = 3.0

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Last latents, their pictures, and the operations of the UNet that they took."""

    latents: np.ndarray
    pictures: np.ndarray
    operations: int

    def distance(self, end: "Drawn") -> float:
        """The median of the relative L2 of the latents."""
        pairs = zip(self.latents, end.latents, strict=True)
        return float(np.median([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))

    @property
    def right(self) -> float:
        """The share of pictures that the checker accepts."""
        found = score(list(self.pictures), list(SCENES))
        return found.strict / found.count


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    made: Any = StableDiffusionPipeline.from_pretrained(CHECKPOINT, safety_checker=None, dtype=torch.float32)
    made.scheduler = DPMSolverMultistepScheduler.from_config(made.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, steps: int) -> Drawn:
    start = torch.randn((len(SCENES), 4, 16, 16), generator=torch.Generator().manual_seed(0))
    prompts = [scene.prompt() for scene in SCENES]
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        latents = pipe(
            prompts,
            latents=start,
            height=128,
            width=128,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="latent",
        ).images
    with torch.inference_mode():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pictures = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return Drawn(latents=latents.numpy(), pictures=pictures.numpy(), operations=counted.get_total_flops())


@pytest.fixture(scope="module")
def end(pipe: Any) -> Drawn:
    return draw(pipe, END)


@pytest.fixture(scope="module")
def plain(pipe: Any) -> Drawn:
    return draw(pipe, STEPS)


@contextmanager
def reused(pipe: Any, interval: int) -> Iterator[None]:
    """One step in `interval` runs all blocks."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_fewer_steps_at_the_same_cost_are_nearer(pipe: Any, end: Drawn, plain: Drawn, interval: int) -> None:
    with reused(pipe, interval):
        found = draw(pipe, STEPS)
    cost = found.operations / plain.operations
    assert 0.3 < cost < 0.95, "blocks were left out"
    fewer = draw(pipe, int(cost * STEPS))
    rows = {f"{STEPS} steps": plain, f"one in {interval} whole": found, f"{int(cost * STEPS)} steps": fewer}
    for name, row in rows.items():
        work = row.operations / plain.operations
        print(f"{name:>16}: work {work:.2f}, distance {row.distance(end):.3f}, right {row.right:.0%}")
    assert fewer.operations <= found.operations
    assert fewer.distance(end) < found.distance(end)
