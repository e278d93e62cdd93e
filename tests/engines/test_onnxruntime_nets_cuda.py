"""The CUDA provider as far as it goes without a GPU: what it is asked for, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.errors import BackendError
from latentrt.engines.onnxruntime import nets as onnxruntime_nets
from latentrt.engines.onnxruntime import session as onnxruntime_runs
from latentrt.engines.onnxruntime import session as onnxruntime_session
from latentrt.engines.onnxruntime.nets import CPU, CUDA, cuda_available, cuda_refusal, open_onnxruntime_net
from latentrt.engines.onnxruntime.session import WAIT_EVERY
from latentrt.engines.package import Package

HOST = SimpleNamespace(name="host memory")


class Library:
    """onnxruntime with a CUDA provider that writes down what it is asked for."""

    def __init__(self, real: Any, providers: list[str]) -> None:
        self.real, self.providers, self.asked = real, providers, dict[str, Any]()
        self.preloaded = 0
        self.inputs_on, self.binding = "Cuda", Binding()
        self.__version__ = real.__version__

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def preload_dlls(self) -> None:
        self.preloaded += 1

    def SessionOptions(self) -> Any:  # noqa: N802
        self.asked["options"] = self.real.SessionOptions()
        return self.asked["options"]

    def RunOptions(self) -> Any:  # noqa: N802
        self.asked["run"] = self.real.RunOptions()
        return self.asked["run"]

    def InferenceSession(self, path: str, options: Any, *, providers: Any, enable_fallback: int) -> Any:  # noqa: N802
        self.asked.update(providers=providers, fallback=enable_fallback)
        session = self.real.InferenceSession(path, options, providers=[CPU])
        session.get_providers = lambda: self.providers
        session.get_input_memory_infos = lambda: [SimpleNamespace(name=self.inputs_on)]
        session.io_binding = lambda: self.binding
        return session


class Binding:
    """An IO binding that writes down what it is given."""

    def __init__(self) -> None:
        self.bound: list[tuple[Any, ...]] = []

    def bind_input(self, *arguments: Any) -> None:
        self.bound.append(("input", *arguments))

    def bind_output(self, *arguments: Any) -> None:
        self.bound.append(("output", *arguments))


@pytest.fixture
def cuda_library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library(onnxruntime_session.library(), [CUDA, CPU])
    for module in (onnxruntime_session, onnxruntime_nets, onnxruntime_runs):
        monkeypatch.setattr(module, "library", lambda: fake)
    monkeypatch.setattr(cuda_facts, "refusal", lambda: None)
    onnxruntime_nets._load_libraries.cache_clear()
    return fake


def test_a_cuda_session_gets_the_devices_stream(package: Package, cuda_library: Library) -> None:
    device: Any = SimpleNamespace(name="A GPU", stream=12345, index=1)
    net: Any = open_onnxruntime_net(package, "unet", device, prefer_nhwc=True)
    assert cuda_library.asked["providers"] == [
        (
            CUDA,
            {
                "device_id": "1",
                "user_compute_stream": "12345",
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "HEURISTIC",
                "use_tf32": "0",
                "prefer_nhwc": "1",
            },
        ),
        CPU,
    ]
    assert cuda_library.asked["fallback"] == 0
    assert not cuda_library.asked["options"].enable_mem_pattern
    open_onnxruntime_net(package, "unet", device)
    assert cuda_library.preloaded == 1
    bound = net.bind({"x": (2, 4)}, {"x": 4096, "y": 8192}, 0)
    assert bound.profile == "onnxruntime CUDA, any shape"
    assert cuda_library.binding.bound == [
        ("input", "x", "cuda", 1, np.float32, (2, 4), 4096),
        ("output", "y", "cuda", 1, np.float32, (2, 4), 8192),
    ]
    net.close()


class Recorded:
    """What `run_with_iobinding` was given: whether each run returned at once."""

    def __init__(self, net: Any) -> None:
        self.at_once: list[bool] = []
        net._session.run_with_iobinding = lambda binding, options: self.at_once.append(
            returns_at_once(options)
        )


def returns_at_once(options: Any) -> bool:
    try:
        return options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
    except RuntimeError:  # it is not set
        return False


def opened(package: Package, **options: Any) -> tuple[Any, Any, Any, Recorded]:
    device: Any = SimpleNamespace(name="A GPU", stream=12345, index=0, capturing=False)
    net: Any = open_onnxruntime_net(package, "unet", device, **options)
    bound: Any = net.bind({"x": (2, 4)}, {"x": 4096, "y": 8192}, 0)
    return device, net, bound, Recorded(net)


def test_one_run_in_many_waits(package: Package, cuda_library: Library) -> None:
    """Else ONNX Runtime never frees its page-locked buffers."""
    _, net, bound, recorded = opened(package)
    other = net.bind({"x": (2, 4)}, {"x": 4096, "y": 8192}, 0)  # the buffers are the session's
    for _ in range(WAIT_EVERY):
        bound.enqueue()
        other.enqueue()
    waits = [not at_once for at_once in recorded.at_once]
    assert [index for index, wait in enumerate(waits) if wait] == [0, WAIT_EVERY]
    net.settle()
    net.close()


def test_a_run_is_not_captured_unless_that_was_asked_for(package: Package, cuda_library: Library) -> None:
    device, net, bound, recorded = opened(package)
    assert not bound.capturable
    device.capturing = True
    with pytest.raises(BackendError, match=r"a run of 'unet' is being captured.* expected a net opened with"):
        bound.enqueue()
    assert not recorded.at_once
    net.close()


def test_no_run_waits_while_a_graph_may_read_the_buffers(package: Package, cuda_library: Library) -> None:
    device, net, bound, recorded = opened(package, capture=True)
    assert bound.capturable
    bound.enqueue()
    device.capturing = True
    bound.enqueue()
    device.capturing = False
    for _ in range(2 * WAIT_EVERY):
        bound.enqueue()
    assert recorded.at_once == [False, *[True] * (1 + 2 * WAIT_EVERY)]
    net.release()  # its caller has closed the graph
    bound.enqueue()
    assert not recorded.at_once[-1]
    net.close()


def test_the_arena_of_the_gpu_is_shrunk(package: Package, cuda_library: Library) -> None:
    _, net, _, _ = opened(package)
    given: list[tuple[Any, ...]] = []
    net._session.run = lambda *arguments: given.append(arguments)
    net.release()
    ((outputs, feeds, options),) = given
    assert outputs is None
    assert {name: array.shape for name, array in feeds.items()} == {"x": (1, 4)}
    assert options.terminate
    assert options.get_run_config_entry("memory.enable_memory_arena_shrinkage") == "gpu:0"
    net.close()
    net.release()
    assert len(given) == 1


def test_an_input_that_the_cpu_wants(package: Package, cuda_library: Library) -> None:
    cuda_library.inputs_on = "Cpu"
    with pytest.raises(BackendError, match=r"runs the first nodes of 'unet' behind \['x'\] on the CPU"):
        open_onnxruntime_net(package, "unet", SimpleNamespace(name="A GPU", stream=1))  # type: ignore[arg-type]


def test_a_device_without_a_stream(package: Package, cuda_library: Library) -> None:
    for device in (HOST, SimpleNamespace(name="host memory", stream=0)):
        with pytest.raises(BackendError, match="host memory has no CUDA stream"):
            open_onnxruntime_net(package, "unet", device)  # type: ignore[arg-type]


def test_a_provider_that_does_not_load(package: Package, cuda_library: Library) -> None:
    cuda_library.providers = [CPU]
    with pytest.raises(BackendError, match="did not load, and the CPU would run"):
        open_onnxruntime_net(package, "unet", SimpleNamespace(name="A GPU", stream=1))  # type: ignore[arg-type]


def test_cuda_available(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Library(onnxruntime_session.library(), [CUDA, CPU])
    monkeypatch.setattr(onnxruntime_nets, "library", lambda: fake)
    refused = BackendError("there is no NVIDIA driver", expected="one", fix="Install it.")
    monkeypatch.setattr(cuda_facts, "refusal", lambda: refused)
    assert cuda_available() == "there is no NVIDIA driver"
    monkeypatch.setattr(fake, "get_available_providers", lambda: [CPU])
    assert "no CUDA provider" in str(cuda_available())
    assert "pip install" in str(cuda_refusal())
    monkeypatch.setattr(onnxruntime_session, "find_spec", lambda name: None)
    assert cuda_available() == "onnxruntime is not installed"


def test_cuda_where_there_is_none(package: Package) -> None:
    if cuda_available() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(BackendError, match=r"cannot run on CUDA.*pip install"):
        open_onnxruntime_net(package, "unet", HOST)  # type: ignore[arg-type]
