"""Our pipeline for measurements: prompts are not cached, for a user draws another one each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..engines.package import Manifest, Package
from ..engines.spec import Array
from ..runtime.loop.open import LoopOptions, open_loop
from ..runtime.pipeline import Pipeline
from ..runtime.prompts.tokenizer import ClipTokenizer
from ..runtime.request.request import latent_shape, make_request
from ..runtime.sampling.noise import NoiseSource
from ..runtime.sampling.samplers import make_table
from ..runtime.sampling.table import Table
from .case import Case, net_inputs

BETWEEN = 20  # steps of the loop in one run of `update`


def open_pipeline(root: Path, options: LoopOptions) -> Pipeline:
    """A package's, as `Pipeline.open` opens it."""
    package = Package.open(root)
    return Pipeline.over(package, *open_loop(package, options), cache_bytes=0)


def inputs_of(pipe: Pipeline, workload: str, case: Case) -> dict[str, Array]:
    """`case.net_inputs` with the package's own tokenizer."""
    tokenizer = ClipTokenizer.open(pipe.package.root / "tokenizer")
    return net_inputs(workload, case, pipe.package.manifest, tokenizer)


def schedule_of(case: Case, manifest: Manifest) -> tuple[Table, Callable[[], Array]]:
    """The sampler's table, and what draws unit noise (N, C, H/8, W/8) float32, from the seeds on."""
    request = make_request(manifest, case.prompt, **case.parameters)
    source = NoiseSource(request.seeds, request.rng)
    shape = latent_shape(manifest, case.height, case.width)
    return make_table(request.sampler, request.num_inference_steps), partial(source.draw, shape)
