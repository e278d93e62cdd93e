"""Whole pictures on the stand-in: the pipeline, the loop and the nets of `OnnxRuntimeCudaBackend`.

A picture is of one colour here, which the pipeline refuses elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from latentrt import Control
from latentrt.benchmarks.case import Case
from latentrt.benchmarks.gpu.opener import Opened, Opener, Scale, draw
from latentrt.benchmarks.sides.contract import Task
from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.errors import LatentrtError
from latentrt.engines.onnxruntime.cuda_backend import ONNXRUNTIME_CUDA
from latentrt.engines.package import Package
from latentrt.engines.spec import TEXT_ENCODERS, no_extra_embeddings
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tensorrt.build import built_nets
from latentrt.runtime import result
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.loop.device.verdicts import Graphs
from latentrt.runtime.model import CONTROLS
from latentrt.runtime.pipeline import Pipeline
from tests.cuda.bench import Facts, cases_of, changed
from tests.cuda.runtime import StandIn

GRAPHS: tuple[Graphs, ...] = ("off", "on", "auto")
PICTURES = 6
PAGE = 2 * 2**20
LITTLE = 24  # pages
OUT_OF_MEMORY, LAUNCH_FAILURE, UNSUPPORTED, INVALIDATED = 2, 719, 900, 901
# What fails while pictures are drawn: a function, its error, and the how-manieth call from then on.
FAILURES = (
    ("cudaMalloc", OUT_OF_MEMORY, 1),
    ("cudaMalloc", OUT_OF_MEMORY, 4),
    ("cudaMallocHost", OUT_OF_MEMORY, 1),
    ("cudaMemsetAsync", LAUNCH_FAILURE, 1),
    ("cudaMemcpyAsync", LAUNCH_FAILURE, 1),
    ("cudaMemcpyAsync", LAUNCH_FAILURE, 20),
    ("cudaStreamSynchronize", LAUNCH_FAILURE, 1),
    ("__cudaLaunchKernel", LAUNCH_FAILURE, 100),
    ("cudnnBackendFinalize", 4000, 50),  # CUDNN_STATUS_INTERNAL_ERROR
    ("cudaStreamBeginCapture", UNSUPPORTED, 1),
    ("cudaStreamEndCapture", INVALIDATED, 1),
    ("cudaGraphInstantiate", OUT_OF_MEMORY, 1),
    ("cudaGraphUpload", OUT_OF_MEMORY, 1),
    ("cudaGraphLaunch", LAUNCH_FAILURE, 1),
)
# Pictures in turns: a name, whether a ControlNet steers, and steps.
_TURNS = (("few", True, 3), ("without", False, 3), ("more", True, 6))
# While a pipeline is opened: the stream, the first weights, some later ones.
OPENING_FAILURES = (
    ("cudaStreamCreateWithFlags", OUT_OF_MEMORY, 1),
    ("cudaMalloc", OUT_OF_MEMORY, 1),
    ("cudaMalloc", OUT_OF_MEMORY, 200),
    ("cublasCreate_v2", 3, 2),  # CUBLAS_STATUS_ALLOC_FAILED
)


@contextmanager
def opener_of(package: Package) -> Iterator[Opener]:
    """As a user opens it, with an engine store of its own, in which nothing was measured."""

    def accept(images: object, dtype: str) -> None:
        """Pictures of one colour are all there are."""

    usual, result.check_pictures = result.check_pictures, accept
    try:
        with TemporaryDirectory() as folder:
            open_device = partial(
                ONNXRUNTIME_CUDA.open_device, package, built_nets(package), store=EngineStore(Path(folder))
            )
            task = Task(model=package.root, backend="onnxruntime-cuda", device="cuda")
            yield Opener(
                task=task,
                package=package,
                open_device=open_device,
                watch=CudaDevice,
                folder=Path(folder),
            )
    finally:
        result.check_pictures = usual


def pictures(package: Package, runtime: StandIn) -> dict[str, Facts]:
    """What drawing does, by the way rows are run; and what is open after all of it."""
    facts: dict[str, Facts] = {}
    with opener_of(package) as opener:
        with opener.pipeline("off") as opened:
            draw(opened.pipe, cases_of(package)[0])  # what the libraries keep for ever is there now
        for graphs in GRAPHS:
            before = runtime.report()
            with opener.pipeline(graphs) as opened:
                facts[graphs] = _drawn(opened, package, runtime)
            found = runtime.report().since(before)
            facts[graphs] |= {"left_open": found.of("open"), "forbidden": found.of("forbidden")}
            facts[graphs]["notes"] = found.of("note")
    return facts


def alternating(package: Package, runtime: StandIn) -> Facts:
    """Two sizes in turns, then twice each: each is captured after the other has run."""
    a, b = cases_of(package)
    before = runtime.report()
    with opener_of(package) as opener, opener.pipeline("on") as opened:
        for case in (a, b, a, b, b, a, a):
            draw(opened.pipe, case)
        replays = opened.loop.replays
    found = runtime.report().since(before)
    return {"replays": replays, "notes": found.of("note"), "forbidden": found.of("forbidden")}


def adapted(package: Package, runtime: StandIn) -> Facts:
    """Pictures of the base and of a set of adapters that changes every weight, in turns."""
    before, case = runtime.report(), cases_of(package)[0]
    with opener_of(package) as opener:
        device, nets = opener.open_device()
        again = partial(ONNXRUNTIME_CUDA.open_another, device, store=opener.open_device.keywords["store"])
        base = DeviceLoop(device, nets, package.manifest, graphs="on", open_net=again)
        own = base.adapted(changed(package))
        with closing(base):
            opening = runtime.report()
            own.open_own()
            facts: Facts = {"opened": runtime.report().since(opening).events()}
            pipes = {"base": Pipeline.over(package, base, "base", cache_bytes=0)}
            pipes["set"] = Pipeline.over(package, own, "set", cache_bytes=0)
            for name in ("base", "set") * PICTURES:
                started = runtime.report()
                draw(pipes[name], case)
                facts.setdefault(name, []).append(runtime.report().since(started).events())
    found = runtime.report().since(before)
    return {**facts, "steps": case.steps, **{kind: found.of(kind) for kind in ("open", "forbidden", "note")}}


def steered(package: Package, runtime: StandIn) -> Facts:
    """Pictures with the demo's ControlNet, of fewer and of more steps, and without, in turns; by graphs."""
    options = Options(dtype="fp32", reads=BACKENDS["onnxruntime-cuda"].reads)
    before, case = runtime.report(), cases_of(package)[0]
    hint = Image.fromarray(np.eye(case.height, case.width, dtype=np.uint8) * 255)
    facts: Facts = {}
    with TemporaryDirectory() as cache, opener_of(package) as opener:
        control = open_control(CONTROLS["demo"] / "edges", options, store=Path(cache))
        for graphs in GRAPHS:
            device, nets = opener.open_device()
            again = partial(ONNXRUNTIME_CUDA.open_another, device, store=opener.open_device.keywords["store"])
            loop = DeviceLoop(device, nets, package.manifest, graphs=graphs, open_net=again)
            opened = Pipeline.over(
                package, loop, "cuda", cache_bytes=0, open_control=lambda path, encoder: control
            )
            drawn: dict[str, list[dict[str, int]]] = {}
            with opened as pipe:
                pipe.load_control("edges")
                controls = [Control(model="edges", image=hint)]
                for name, given, steps in _TURNS * PICTURES:
                    started = runtime.report()
                    pipe(
                        case.prompt,
                        output_type="np",
                        controls=controls if given else [],
                        **{**case.parameters, "num_inference_steps": steps},
                    )
                    drawn.setdefault(name, []).append(runtime.report().since(started).events())
            facts[graphs] = drawn
    found = runtime.report().since(before)
    return {**facts, **{kind: found.of(kind) for kind in ("open", "forbidden", "note")}}


def memory(package: Package, runtime: StandIn) -> Facts:
    """Many large pictures with little memory left, and with none; then a usual one with enough again."""
    scale, total = Scale.of(package.manifest), runtime.report().of("memory")["total"]
    facts: Facts = {}
    with opener_of(package) as opener:
        with opener.pipeline("off") as opened:
            draw(opened.pipe, scale.case)  # what the libraries keep for ever is there now
        before = runtime.report()
        with opener.pipeline("off") as opened:
            facts |= _with_less(opened, scale, runtime, total)
    facts["left_open"] = runtime.report().since(before).of("open")
    return facts


def _with_less(opened: Opened, scale: Scale, runtime: StandIn, total: int) -> Facts:
    facts: Facts = {}
    draw(opened.pipe, scale.case)
    for what, pages in (("little", LITTLE), ("none", 0)):
        runtime.set_total(runtime.report().of("memory")["used"] + pages * PAGE)
        facts[what] = _error_of(lambda: draw(opened.pipe, scale.large))
        facts[f"log_{what}"] = list(opened.log)
        opened.log.clear()
    runtime.set_total(total)
    facts["enough"] = _error_of(lambda: draw(opened.pipe, scale.case))
    return facts


def _drawn(opened: Opened, package: Package, runtime: StandIn) -> Facts:
    usual, other = cases_of(package)

    def events(work: Callable[[], object]) -> dict[str, int]:
        before = runtime.report()
        work()
        return runtime.report().since(before).events()

    def picture(case: Case, seed: int) -> dict[str, int]:
        return events(lambda: draw(opened.pipe, replace(case, seed=seed)))

    encoders = [name for name in TEXT_ENCODERS if name in package.manifest.nets]
    facts: Facts = {"steps": usual.steps, "text_encoders": len(encoders)}
    facts["extra_embeddings"] = sum(
        bool(no_extra_embeddings(package.manifest.nets[name].spec)) for name in encoders
    )
    facts["pictures"] = [picture(usual, seed) for seed in range(PICTURES)]
    facts["replays"] = opened.loop.replays
    facts["other_size"] = [picture(other, seed) for seed in range(3)]
    facts["first_size_again"] = [picture(usual, seed) for seed in range(3)]
    held = runtime.report().of("memory")["used"]
    facts["freed_idle"] = opened.loop.free_idle()
    facts["freed_bytes"] = held - runtime.report().of("memory")["used"]
    facts["after_freeing"] = [picture(usual, seed) for seed in range(2)]
    facts["log"] = list(opened.log)
    return facts


def failures(package: Package, runtime: StandIn) -> list[Facts]:
    """What each failure becomes: an error or none, whether the next picture works, and what is left open."""
    case = replace(cases_of(package)[0], steps=3)
    facts: list[Facts] = []
    with opener_of(package) as opener:
        for graphs in GRAPHS:  # what the libraries keep for ever is there then
            with opener.pipeline(graphs) as opened:
                draw(opened.pipe, case)
        for name, error, call in OPENING_FAILURES:
            before = runtime.report()
            runtime.fail(name, error, call=call)
            fact: Facts = {
                "failing": f"{name} while opening, call {call}",
                "error": _error_of(partial(_open, opener)),
            }
            runtime.mend()
            facts.append({**fact, "next": "", "left_open": runtime.report().since(before).of("open")})
        for name, error, call in FAILURES:
            before = runtime.report()
            with opener.pipeline("on") as opened:
                runtime.fail(name, error, call=call)
                fact = {"failing": f"{name}, call {call}", **_failing(opened, case, runtime)}
            facts.append({**fact, "left_open": runtime.report().since(before).of("open")})
    return facts


def _failing(opened: Opened, case: Case, runtime: StandIn) -> Facts:
    """A picture of a new size, those that capture and replay a row, and one after the failure is over."""
    found = [_error_of(lambda: draw(opened.pipe, case)) for _ in range(3)]
    runtime.mend()
    after = _error_of(lambda: draw(opened.pipe, case))
    return {"error": next(filter(None, found), ""), "next": after, "log": list(opened.log)}


def _open(opener: Opener) -> None:
    with opener.pipeline("off"):
        pass


def _error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except LatentrtError as error:
        return f"{type(error).__name__}: {error.found}"
    return ""
