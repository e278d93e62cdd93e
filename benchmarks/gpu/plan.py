"""The steps of the GPU check, in the order of what they are worth, and how long each may take."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter

from ...engines.package import Package
from ..records import Row
from ..skeletons import fill_skeleton
from .full_size import net, outlived, shapes, whole
from .opener import Opener, Scale, backend_opener, mebibytes, row_of, why_not
from .sections import build, graphs, parity, picture, placement, sharing
from .smoke import environment, smoke
from .torch_unet import torch_unet

ORT, TENSORRT = "onnxruntime-cuda", ("tensorrt", "tensorrt-rtx")
BACKENDS = (ORT, *TENSORRT)
SKELETON = "sd15-fp16"


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a step runs on.

    Attributes:
        backend: one of BACKENDS.
        package: a small one, whose pictures can be checked.
        full_size: where the other one is, or will be made by the first step that needs it.
        folder: where steps leave what later ones compare with.
    """

    backend: str
    package: Path
    full_size: Path
    folder: Path


Section = Callable[[Opener, Scale], Iterator[Row]]
Run = Callable[[Place], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to find out, in a process of its own.

    Attributes:
        run: yields the rows, in that process.
        limit: seconds it may take, the start of the process included.
        backends: it is run for these.
        environment: variables of its process.
    """

    run: Run
    limit: float
    backends: Sequence[str] = (ORT,)
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def _with(section: Section, *, full: bool = False) -> Run:
    """A step over a package; whether the backend can run here at all is asked before anything is made."""

    def run(place: Place) -> Iterator[Row]:
        if reason := why_not(place.backend):
            yield row_of("backend", missing=reason)
            return
        package = _full_size(place) if full else Package.open(place.package)
        opener = backend_opener(place.backend, package, place.folder)
        yield from section(opener, Scale.of(package.manifest))

    return run


def _full_size(place: Place) -> Package:
    """The package of full size; made of the skeleton where there is none."""
    if not place.full_size.exists():
        unfinished = place.full_size.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a step that was killed
        fill_skeleton(SKELETON, unfinished)
        unfinished.rename(place.full_size)
    return Package.open(place.full_size)


def _skeleton(place: Place) -> Iterator[Row]:
    began = perf_counter()
    package = _full_size(place)
    size = sum(path.stat().st_size for path in package.root.rglob("*") if path.is_file())
    yield row_of(package.manifest.name, {"mib": mebibytes(size)}, samples=[perf_counter() - began])


def _net(**options: object) -> Run:
    return _with(partial(net, **options), full=True)  # pyright: ignore[reportArgumentType]


STEPS: Mapping[str, Step] = {
    "environment": Step(run=lambda place: environment(place.backend), limit=40, backends=BACKENDS),
    "torch_eager": Step(run=lambda place: torch_unet(""), limit=60),
    "torch_compiled": Step(run=lambda place: torch_unet("reduce-overhead"), limit=150),
    "smoke": Step(run=_with(smoke), limit=45),
    "build": Step(run=_with(build), limit=300, backends=TENSORRT),
    "picture": Step(run=_with(picture), limit=75, backends=BACKENDS),
    "placement": Step(run=_with(placement), limit=45, backends=BACKENDS),
    "parity": Step(run=_with(parity), limit=60, backends=BACKENDS),
    "graphs": Step(run=_with(graphs), limit=60, backends=BACKENDS),
    "sharing": Step(run=_with(sharing), limit=60, backends=BACKENDS),
    "skeleton": Step(run=_skeleton, limit=60),
    "unet": Step(run=_net(), limit=60),
    "whole": Step(run=_with(whole, full=True), limit=90),
    "decoder": Step(run=_net(workload="vae_decoder"), limit=45),
    "text_encoder": Step(run=_net(workload="text_encoder"), limit=45),
    "unet_plain": Step(run=_net(layout="plain"), limit=60),
    # experiments: each decides one question
    "shapes": Step(run=_with(shapes, full=True), limit=60),
    "weights_in_arena": Step(
        run=_net(settings={"session.use_device_allocator_for_initializers": "0"}), limit=60
    ),
    "decoder_workspace": Step(
        run=_net(workload="vae_decoder", settings={"cudnn_conv_use_max_workspace": "0"}), limit=45
    ),
    "eager_loading": Step(run=_net(), limit=60, environment={"CUDA_MODULE_LOADING": "EAGER"}),
    "cudnn_attention": Step(run=_net(settings={"sdpa_kernel": "0"}), limit=60),
    "exhaustive": Step(run=_net(settings={"cudnn_conv_algo_search": "EXHAUSTIVE"}), limit=90),
    "outlived": Step(run=_with(outlived, full=True), limit=60),
}


def planned(backends: Sequence[str], names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What to run, in this order, as (step, backend): the plan, or what is named of it."""
    return [
        (name, backend)
        for backend in backends
        for name, step in STEPS.items()
        if backend in step.backends and (not names or name in names)
    ]
