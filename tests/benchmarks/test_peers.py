"""Peers draw our pictures, else no time of theirs counts; and when one cannot run it says why.

diffusers is the oracle that nobody here wrote; `test_another_seed_is_another_picture` is the control. Peers
that need a GPU draw on stand-ins of their libraries.
"""

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from polygraphy.backend import trt

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.likeness import difference, psnr
from latentrt.benchmarks.sides import contract, diffusers_pipeline, plain_loop, tensorrt_loop
from latentrt.benchmarks.sides.contract import NotAvailableError, OpenSide, Task, open_plain_package
from latentrt.engines.errors import BackendError
from latentrt.engines.onnxruntime.nets import CPU, CUDA
from latentrt.engines.spec import Array
from tests.benchmarks.stand_in_side import PACKAGE
from tests.tiny_package import write_tiny_package

TASK = Task(model=PACKAGE.root, checkpoint=PACKAGE.root.parent / "checkpoint", threads=1)
NEEDS = {
    "diffusers": "diffusers",
    "diffusers-compile": "torch",
    "onnxruntime": "onnxruntime",
    "onnxruntime-cuda": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
}
# diffusers' schedulers call np.array(tensor), and it announces what will move
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
# Large enough for pictures that depend on their seed: at 56x40 all unguided ones are alike, to 42 dB.
GUIDED = Case(width=96, height=72, guidance_scale=3.0, steps=4, pictures=2, sampler="dpmpp_2m")
UNGUIDED = Case(width=96, height=72, guidance_scale=1.0, steps=4, sampler="euler_a", seed=11)
CASES = (GUIDED, UNGUIDED)
WORKLOADS = ("text_encoder", "unet", "vae_decoder", "picture")
Pictures = Mapping[tuple[str, int], Mapping[str, Array]]  # by workload and case
BAR = 45.0  # dB
PEERS = ("onnxruntime", "openvino", "diffusers")
TRT_RUNNER = trt.TrtRunner


def run(side: OpenSide, workload: str, case: Case) -> Mapping[str, Array]:
    prepared = side.prepare(workload, case)
    prepared.run()
    prepared.run()  # what the first left behind does not matter
    return prepared.outputs()


# ── who cannot run here ────────────────────────────────────────────────────────────────────────


def refuses(name: str, task: Task, why: str) -> None:
    side = contract.side(name)
    assert why in (side.available(task) or "")
    with pytest.raises(NotAvailableError) as caught:
        contract.open_side(name, task)
    assert why in caught.value.found


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NEEDS[name], None)  # type: ignore[arg-type]
    refuses(name, TASK, NEEDS[name])


@pytest.mark.parametrize("name", ["diffusers", "diffusers-compile"])
def test_a_missing_checkpoint_is_told(name: str, tmp_path: Path) -> None:
    refuses(name, replace(TASK, checkpoint=None), "none was given")
    refuses(name, replace(TASK, checkpoint=tmp_path), "no model_index.json")


def test_a_missing_gpu_compiler_or_release_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("CXX", "no-such-compiler")
    refuses("diffusers-compile", TASK, "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses("diffusers", replace(TASK, device="cuda"), "no CUDA device")
    monkeypatch.setattr(plain_loop, "cuda_available", lambda: "no driver")
    refuses("onnxruntime-cuda", TASK, "no driver")
    monkeypatch.setattr(tensorrt_loop, "missing_modules", lambda *names: None)
    monkeypatch.setattr(tensorrt_loop.facts, "available", lambda: "no driver")
    refuses("tensorrt", TASK, "no driver")
    monkeypatch.setattr(tensorrt_loop.facts, "available", lambda: None)
    monkeypatch.setattr("latentrt.engines.tensorrt.flavour.installed_version", lambda name: "10.3.0")
    refuses("tensorrt", TASK, "tensorrt 10.3.0 is installed")


def test_a_package_without_the_plain_unet_is_told(tmp_path: Path) -> None:
    write_tiny_package(tmp_path)
    with pytest.raises(NotAvailableError, match="unet_whole"):
        open_plain_package(replace(TASK, model=tmp_path))


# ── diffusers, as far as it goes without a model or a GPU ──────────────────────────────────────


class FakePipe:
    """What is used of a StableDiffusionPipeline."""

    def __init__(self, device: str = "cpu") -> None:
        import torch

        self.unet = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3))
        self.unet.dtype = torch.float16  # type: ignore[assignment]
        self.vae = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3))
        self.device = SimpleNamespace(type=device)
        self.scheduler = SimpleNamespace(config={})
        self.moved: tuple[Any, ...] = ()

    def set_progress_bar_config(self, *, disable: bool) -> None:
        assert disable

    def to(self, *where: Any) -> None:
        self.moved = where

    def __call__(self, prompt: str, **parameters: Any) -> Any:
        return SimpleNamespace(images=np.full((1, 8, 8, 3), 0.5, np.float32))


@pytest.mark.parametrize(
    ("dtype", "device", "half", "last"),
    [("fp16", "cuda", True, True), ("fp32", "cuda", False, False), ("fp16", "cpu", False, True)],
)
def test_half_precision_is_for_cuda_and_channels_come_last_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, dtype: str, device: str, half: bool, last: bool
) -> None:
    import torch

    pipe = FakePipe()
    monkeypatch.setattr(diffusers_pipeline, "assemble", lambda checkpoint: pipe)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    manifest = replace(PACKAGE.manifest, dtype=dtype)
    monkeypatch.setattr(diffusers_pipeline.Package, "open", lambda root: replace(PACKAGE, manifest=manifest))
    diffusers_pipeline.open_side(replace(TASK, device=device))
    assert pipe.moved == (device, torch.float16 if half else torch.float32)
    for net in (pipe.unet, pipe.vae):
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last) == last
    assert torch.backends.cudnn.benchmark == half


def test_on_cuda_a_run_ends_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    library = ModuleType("diffusers")
    library.DDIMScheduler = SimpleNamespace(from_config=lambda config, **options: {**config, **options})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", library)
    pipe = FakePipe("cuda")
    monkeypatch.setattr(diffusers_pipeline, "assemble", lambda checkpoint: pipe)
    side = diffusers_pipeline.open_side(replace(TASK, device="cuda"))
    prepared = side.prepare("picture", replace(CASES[1], sampler="ddim"))
    prepared.run()
    assert pipe.scheduler == {"clip_sample": False}
    assert waits == [1]
    assert (prepared.outputs()["image"] == 128).all()
    with pytest.raises(NotAvailableError, match="dpm2_a"):
        side.prepare("picture", replace(CASES[0], sampler="dpm2_a"))


# ── the plain loop around libraries that need a GPU, which are stood in for ────────────────────


def no_gpu(monkeypatch: pytest.MonkeyPatch, providers: Sequence[str] = (CUDA, CPU)) -> list[Any]:
    """Have CUDA sessions run on the CPU, and say they have `providers`; returns what they were asked for."""
    asked: list[Any] = []

    def open_session(path: Path, options: Any, wanted: list[Any], **more: Any) -> Any:
        asked.append(wanted)
        session = open_on_cpu(path, options, [CPU], **more)
        return SimpleNamespace(run=session.run, get_providers=lambda: providers)

    open_on_cpu = plain_loop.onnxruntime.open_session
    monkeypatch.setattr(plain_loop.onnxruntime, "open_session", open_session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    return asked


class Runner:
    """Polygraphy's runner over ONNX Runtime: its outputs are buffers that the next run writes anew."""

    def __init__(self, engine: str) -> None:
        assert signature(TRT_RUNNER).bind(engine)
        self.session = onnxruntime.InferenceSession(engine, providers=[CPU])
        self.buffers: dict[str, Array] = {}
        self.active = False

    def __enter__(self) -> "Runner":
        self.active = True
        return self

    def __exit__(self, *error: object) -> None:
        self.active = False

    def infer(self, feeds: dict[str, Array], *, check_inputs: bool) -> dict[str, Array]:
        assert self.active
        names = [output.name for output in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            self.buffers.setdefault(name, np.empty_like(array))[...] = array
        return self.buffers


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[Runner]:
    """Polygraphy's own profiles and configurations, but no network, engine or runner of TensorRT."""
    found = list[Runner]()

    def network(path: str, *, strongly_typed: bool) -> str:
        assert strongly_typed
        return path

    def engine(network: tuple[str, str], *, config: Any) -> str:
        graph, attention = network
        assert attention == "decomposable"
        (profile,) = config.profiles
        assert profile
        assert all(item.min == item.opt == item.max for item in profile.values())
        return graph

    def runner(engine: str) -> Runner:
        found.append(Runner(engine))
        return found[-1]

    monkeypatch.setattr(trt, "network_from_onnx_path", network)
    monkeypatch.setattr(trt, "set_decomposable_attentions", lambda network: (network, "decomposable"))
    monkeypatch.setattr(trt, "engine_from_network", engine)
    monkeypatch.setattr(trt, "TrtRunner", runner)
    return found


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "tensorrt"])
def test_on_a_gpu_the_loop_is_the_plain_one(
    name: str, ours: Pictures, runners: list[Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = no_gpu(monkeypatch) if name == "onnxruntime-cuda" else []
    with closing(opened(name)) as side:
        for index in range(len(CASES)):
            test_every_output_is_ours(side, ours, index)
        test_what_is_prepared_stays_beside_something_else(side)
        settings = {"cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"}
        assert asked == [[(CUDA, settings), CPU]] * len(asked)
        versions = {"provider": CUDA, **settings} if asked else {"precision": "strongly typed"}
        assert side.versions.items() >= versions.items()
        # Three nets for two cases, then the UNet for them again: only the latest shapes of a net are kept.
        assert len(runners) == (0 if asked else 3 * 2 + 2)
    assert not any(runner.active for runner in runners)


def test_the_cpu_does_not_stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch, [CPU])
    with pytest.raises(BackendError, match="CUDA provider did not load"):
        opened("onnxruntime-cuda")


# ── peers draw our pictures ────────────────────────────────────────────────────────────────────


def opened(name: str) -> OpenSide:
    return contract.side(name).open_side(TASK)


@pytest.fixture(scope="module")
def ours() -> Pictures:
    with closing(opened("latentrt")) as side:
        return {(w, index): run(side, w, case) for index, case in enumerate(CASES) for w in WORKLOADS}


@pytest.fixture(scope="module", params=PEERS)
def peer(request: pytest.FixtureRequest) -> Generator[OpenSide]:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    with closing(opened(request.param)) as side:
        yield side


@pytest.mark.parametrize("index", range(len(CASES)))
def test_every_output_is_ours(peer: OpenSide, ours: Pictures, index: int) -> None:
    for workload in WORKLOADS:
        found, wanted = run(peer, workload, CASES[index]), ours[workload, index]
        (output,) = found
        assert found[output].dtype == wanted[output].dtype, workload
        if wanted[output].dtype == np.uint8:
            assert wanted[output].std() > 10, "too flat to compare"
            assert psnr(found[output], wanted[output]) >= BAR, workload
        else:
            assert difference(output, found[output], wanted[output])["relative_l2"] <= 1e-4, workload


def test_another_seed_is_another_picture(peer: OpenSide, ours: Pictures) -> None:
    for index, case in enumerate(CASES):
        other = run(peer, "picture", replace(case, seed=case.seed + 100))["image"]
        assert psnr(other, ours["picture", index]["image"]) < 30


def test_what_is_prepared_stays_beside_something_else(peer: OpenSide) -> None:
    first, *others = (peer.prepare("unet", case) for case in (GUIDED, replace(GUIDED, seed=8), UNGUIDED))
    first.run()
    before = np.array(first.outputs()["prediction"])
    for other in others:
        other.run()
        np.testing.assert_array_equal(first.outputs()["prediction"], before)
    first.run()
    np.testing.assert_allclose(first.outputs()["prediction"], before, atol=1e-6)


def test_it_tells_who_it_is(peer: OpenSide) -> None:
    assert all(isinstance(text, str) and text for text in peer.versions.values())
    assert "1" in (peer.versions.get("threads") or peer.versions["INFERENCE_NUM_THREADS"])
    assert peer.versions.get("memory_format", "channels_last") == "channels_last"


@pytest.mark.parametrize(
    ("device", "mode", "expected"),
    [("cuda", "", "max-autotune"), ("cpu", "", "default"), ("cuda", "reduce-overhead", "reduce-overhead")],
)
def test_the_mode_of_compiled_nets(
    monkeypatch: pytest.MonkeyPatch, device: str, mode: str, expected: str
) -> None:
    monkeypatch.setattr(diffusers_pipeline, "assemble", lambda checkpoint: None)
    monkeypatch.setattr(diffusers_pipeline, "side_over", lambda name, task, pipe, compiled: compiled)
    task = replace(TASK, device=device, compile_mode=mode)
    assert diffusers_pipeline.Compiled.open_side(Task.parse(task.text)) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own import
def test_compiled_outputs_are_ours(ours: Pictures) -> None:
    with closing(opened("diffusers-compile")) as side:
        test_every_output_is_ours(side, ours, 0)
