"""Steps of the GPU check over nets and pictures: built, on the GPU, right, replayed as drawn."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...engines.backends import BACKENDS
from ...engines.cuda import facts as cuda_facts
from ...engines.onnxruntime.backend import ONNXRUNTIME
from ...engines.profiles import Profile
from ...engines.spec import TEXT_ENCODERS, Array
from ...engines.store.engine_store import EngineStore
from ...engines.tensorrt.build import built_nets
from ...engines.tuning.choice import tuned_nets
from ...runtime.loop.device.programs import input_shapes
from ...runtime.loop.sharing import Ended, Failed, SharedSteps
from ...runtime.pipeline import Pipeline, Step
from ...runtime.result import Result
from ..case import HOST_NETS, Case, sizes_of
from ..likeness import psnr
from ..records import Row
from ..verbs.build import Builds, build_net
from ..verbs.latency import check
from ..verbs.parity import Inputs, measure_parity
from .opener import Opened, Opener, Scale, attempt, draw, encoder_inputs, mebibytes, row_of

SAMPLERS = ("dpmpp_2m", "ddim", "euler_a")  # the last draws noise in every row
REPLAY_DB = 50.0  # the same kernels in the same order: a few shades by one, where a library sums atomically
SHARED_ROWS = (2, 4, 8)
_WARM = 2  # runs: the first is plain, the second is captured
_REFUSED, _WRONG = "rows are not replayed: ", "from a plain one"  # begin, or are in, the line that says why
_RUN = {*HOST_NETS, *TEXT_ENCODERS, "step", "vae_encoder"}  # nets that `placement` runs
_FLOATS = {"float", "float16", "double", "bfloat16"}
_KERNEL = "_kernel_time"  # the event of a node's run is called by its name and this


def build(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Engines of every net, or the layouts of ONNX Runtime's, into the store (LATENTRT_CACHE)."""
    backend, package = opener.task.backend, opener.package
    if backend not in BACKENDS:
        yield row_of("engines", missing=f"{backend} builds nothing")
        return
    gpu = None if cuda_facts.available() else cuda_facts.facts()
    profile = Profile.parse(scale.profile, multiple=package.manifest.size_multiple)
    builds = Builds(backend=backend, profiles=(profile,))

    def built(net: str) -> Row:
        figures = build_net(net, package, builds, EngineStore(), gpu)
        problems = [] if figures.get("engine_mb", 1) > 0 else ["the engine is empty"]
        return row_of(net, figures, problems, [figures.pop("seconds")])

    for net in tuned_nets(package, ()) if builds.tunes else built_nets(package):
        yield attempt(net, built)


def placement(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Every net opens; ONNX Runtime runs floating-point nodes on the GPU, and copies nothing to or from it.

    Engines run on the GPU as a whole.
    """
    with TemporaryDirectory() as folder:
        options: dict[str, Any] = {"profile": Path(folder)} if opener.onnxruntime else {}
        with opener.pipeline(**options) as opened:
            nets, sizes = opened.loop.nets, sizes_of(scale.case, opener.package.manifest)
            for net in nets.values():
                net.scratch(input_shapes(net.spec, sizes))  # engines are opened by their first request
            weights = mebibytes(sum(net.memory.weights for net in nets.values()))
            yield row_of("every net", {"device": opened.loop.device.name, "weights_mib": weights})
            if opener.onnxruntime:
                draw(opened.pipe, scale.case)
                if "vae_encoder" in nets:
                    opened.loop.call("vae_encoder", **encoder_inputs(scale.case))
                for name in sorted(_RUN & nets.keys()):
                    yield attempt(name, _placed, nets[name])


def _placed(name: str, net: Any) -> Row:
    nodes, on_cpu, found = read_placement(net.end_profile())
    problems = [f"{len(those)} {what}: {', '.join(those[:4])}" for what, those in found.items() if those]
    problems += [] if nodes else ["the profile has no node that ran"]
    return row_of(name, {"nodes": nodes, "on_cpu": on_cpu}, problems)


def read_placement(profile: Path) -> tuple[int, int, dict[str, list[str]]]:
    """How many nodes ran, how many of them on the CPU, and what is misplaced: the nodes by fault.

    The library's profile has an event of each node that ran, with `args` that name types and provider.
    """
    events: list[dict[str, Any]] = json.loads(profile.read_bytes())
    nodes = {
        f"{event['name'].removesuffix(_KERNEL)} ({event['args']['op_name']})": event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)
    }
    on_cpu = {node for node, args in nodes.items() if args.get("provider") == "CPUExecutionProvider"}
    misplaced = {
        "copies between CPU and GPU": [node for node in nodes if "(Memcpy" in node],
        # activations that left the GPU; integer arithmetic on shapes belongs on the CPU
        "floating-point nodes on the CPU": [node for node in on_cpu if _FLOATS & _types(nodes[node])],
    }
    return len(nodes), len(on_cpu), {what: sorted(those) for what, those in misplaced.items()}


def _types(args: dict[str, Any]) -> set[str]:
    """The types of inputs and outputs, which are listed like [{"float": [2, 4]}, {"int64": []}]."""
    tensors = [*args.get("input_type_shape", ()), *args.get("output_type_shape", ())]
    return {kind for tensor in tensors for kind in tensor}


def parity(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Single nets, for one guided picture and for three that are not square, against the CPU's."""
    inputs = Inputs(cases=(scale.case, scale.several), samplers=(), samples=1)
    yield from _against_the_cpu(opener, inputs)
    if "vae_encoder" in opener.package.manifest.nets:  # no workload of the benchmarks runs it
        yield attempt("vae_encoder", _encoder, opener, scale.case)


def _encoder(what: str, opener: Opener, case: Case) -> Row:
    inputs, threads = encoder_inputs(case), opener.task.threads
    with ONNXRUNTIME.open_net(opener.package, what, threads=threads) as host, opener.pipeline() as opened:
        return row_of(what, check(opened.loop.call(what, **inputs), host(**inputs), opener.package))


def picture(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Three pictures at once, not square: three samplers, guidance on and off."""
    cases = scale.several, replace(scale.several, guidance_scale=1.0)
    yield from _against_the_cpu(opener, Inputs(cases=cases, nets=(), samplers=SAMPLERS, samples=1))


def _against_the_cpu(opener: Opener, inputs: Inputs) -> Iterator[Row]:
    """The rows of `latentrt bench parity`; the reference is the plain loop over ONNX Runtime."""
    for row in measure_parity(opener.package, opener.task, inputs, reference="onnxruntime").rows:
        names = ("sampler", "width", "height", "pictures", "guidance_scale")
        what = [f"{name} {row.case[name]}" for name in names if name in row.case]
        yield replace(row, workload=", ".join([row.workload, *what]))


def graphs(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Loops replayed as captured graphs draw what plain ones draw, in turns.

    Each run has a seed of its own, and noise in every row: a graph that replays yesterday's data shows.
    """
    with opener.pipeline("off") as plain, opener.pipeline("on") as replayed:
        for sampler in (SAMPLERS[0], SAMPLERS[-1]):
            yield attempt(sampler, _graphs, plain, replayed, scale)


def _graphs(sampler: str, plain: Opened, replayed: Opened, scale: Scale) -> Row:
    likeness = list[float]()
    for run in range(_WARM + scale.runs):
        case = replace(scale.case, sampler=sampler, seed=100 + run)
        wanted, found = (draw(opened.pipe, case) for opened in (plain, replayed))
        likeness.append(psnr(found, wanted))
    worst = min(likeness)
    problem, missing = why_not_replayed(worst, replayed)
    return row_of(sampler, {"psnr_db": worst}, [problem] if problem else (), missing=missing)


def sharing(opener: Opener, scale: Scale) -> Iterator[Row]:
    """Requests that share calls of the UNet draw what each draws alone, in calls of as many rows.

    What a row computes must not depend on the others. How far a call of another number of rows is from it,
    which may have other kernels, is told beside it.
    """
    with opener.pipeline() as opened:
        for rows in SHARED_ROWS:
            yield attempt(f"{rows} rows", _shared, opened.pipe, scale, rows)


def _shared(what: str, pipe: Pipeline, scale: Scale, rows: int) -> Row:
    cases = [
        replace(scale.case, sampler=sampler, guidance_scale=guidance, seed=200 + number)
        for number, (sampler, guidance) in enumerate(product(SAMPLERS, (scale.case.guidance_scale, 1.0)))
    ]
    together = _drawn(pipe, cases, rows)
    alone = [_drawn(pipe, [case], rows)[0] for case in cases]
    worst = min(map(psnr, together, alone))
    figures = {
        "equal": sum(map(np.array_equal, together, alone)),
        "pictures": len(cases),
        "psnr_db": worst,
        "psnr_db_of_other_numbers": min(map(psnr, alone, [draw(pipe, case) for case in cases])),
    }
    wrong = f"{worst:.1f} dB between shared and alone, below {REPLAY_DB:g}"
    return row_of(what, figures, [wrong] if worst < REPLAY_DB else ())


def _drawn(pipe: Pipeline, cases: Sequence[Case], rows: int) -> list[Array]:
    """Pictures (1, H, W, 3) uint8 of cases that share calls, all of so many rows."""
    shared: SharedSteps[Step, Result[Any]] = SharedSteps(rows, (rows,))
    found: dict[Hashable, Array] = {}
    with closing(shared):
        for number, case in enumerate(cases):
            shared.add(number, pipe.shared({"prompt": case.prompt, "output_type": "np", **case.parameters}))
        while len(shared):
            for event in shared.turn():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Ended):
                    found[event.name] = np.asarray(event.value.images)
    return [found[number] for number in range(len(cases))]


def why_not_replayed(likeness: float, opened: Opened, bar: float = REPLAY_DB) -> tuple[str, str]:
    """What is wrong with pictures that are `likeness` dB from plain ones, and why they were plain themselves.

    Plain loops are what the loop falls back on, and it says why; "" where there is nothing to say.
    """
    if likeness < bar:
        return f"{likeness:.1f} dB between plain and replayed, below {bar:g}", ""
    if opened.loop.replays:
        return "", ""
    refused = next((line for line in opened.log if line.startswith(_REFUSED)), "")
    if _WRONG in refused or not refused:
        return refused or "no graph is replayed, and nothing says why", ""
    return "", refused
