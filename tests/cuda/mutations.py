"""Each rule of the tests, broken on purpose: what the stand-in says then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime

from latentrt.benchmarks.gpu.sections import read_placement
from latentrt.engines.errors import LatentrtError
from latentrt.engines.onnxruntime import nets
from latentrt.engines.onnxruntime.session import run_options
from tests.cuda.bench import Bench, Facts, cases_of


def every(bench: Bench) -> dict[str, Facts]:
    """What each mutation shows, by its name."""
    mutations: tuple[Callable[[Bench], Facts], ...] = (
        shapes_on_the_gpu,
        float_node_on_the_cpu,
        first_run_captured,
        another_shape_before_the_capture,
        run_that_waits,
        session_that_is_held,
        stream_that_is_not_destroyed,
    )
    return {mutation.__name__: mutation(bench) for mutation in mutations}


def shapes_on_the_gpu(bench: Bench) -> Facts:
    """The provider's own NHWC, which takes every node: its run copies to the host, and waits for that."""
    usual = nets.open_session

    def open_session(path: Path, options: Any, providers: Any, **more: Any) -> Any:
        (name, settings), *others = providers
        return usual(path, options, [(name, {**settings, "prefer_nhwc": "1"}), *others], **more)

    nets.open_session = open_session
    try:
        with bench.opened("unet", "plain") as net, bench.bound(net, cases_of(bench.package)[0]) as run:
            # a shape that was "computed" on the stand-in is zeros, so the run ends at the first use of one
            return bench.events(lambda: _attempt(run))
    finally:
        nets.open_session = usual


def float_node_on_the_cpu(bench: Bench) -> Facts:
    """A graph with an operator that has no CUDA kernel between two that have one."""
    make = onnx.helper
    matrix = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in ("a", "d")]
    nodes = [
        make.make_node("Exp", ["a"], ["b"]),
        make.make_node("Det", ["b"], ["c"]),
        make.make_node("Add", ["c", "b"], ["d"]),
    ]
    graph = make.make_graph(nodes, "float_node", matrix[:1], matrix[1:])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 22)], ir_version=10)
    with TemporaryDirectory() as folder:
        options: Any = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        session: Any = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        session.run(None, {"a": [[1.0, 2.0], [3.0, 4.0]]})
        nodes_run, on_cpu, misplaced = read_placement(Path(session.end_profiling()))
    return {"nodes": nodes_run, "on_cpu": on_cpu, **misplaced}


def first_run_captured(bench: Bench) -> Facts:
    """A capture without a plain run before it: the arena has to grow within it."""
    with bench.opened("text_encoder", "plain") as net, bench.bound(net, cases_of(bench.package)[0]) as run:
        return bench.capture(run)


def another_shape_before_the_capture(bench: Bench) -> Facts:
    """A, B, capture of A: a convolution remembers one shape, so its plans are built in the capture."""
    usual, other = cases_of(bench.package)
    with (
        bench.opened("vae_decoder", "plain") as net,
        bench.bound(net, usual) as a,
        bench.bound(net, other) as b,
    ):
        for run in (a, a, b):
            run()
        return bench.capture(a)


def run_that_waits(bench: Bench) -> Facts:
    """A run with the library's usual options waits for the stream."""
    with bench.opened("step", "plain") as net, bench.bound(net, cases_of(bench.package)[0]) as run:
        for _ in range(2):
            run()
        net.run_options = run_options()
        return bench.events(run)


def session_that_is_held(bench: Bench) -> Facts:
    """A session that somebody still holds after its net was closed."""
    before = bench.runtime.report()
    with bench.opened("step", "plain") as net:
        held = net.session()
    left = bench.runtime.report().since(before).of("open")
    del held
    return {"held": left, "after": bench.runtime.report().since(before).of("open")}


def stream_that_is_not_destroyed(bench: Bench) -> Facts:
    """A device that is closed while CUDA refuses to destroy its stream."""
    before = bench.runtime.report()
    another = Bench(bench.runtime, bench.package)
    bench.runtime.fail("cudaStreamDestroy", 400)
    another.close()
    return bench.runtime.report().since(before).of("open")


def _attempt(work: Callable[[], None]) -> None:
    try:
        work()
    except LatentrtError:
        pass
