"""The CUDA provider as far as it goes without a GPU: what it is asked for, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.engines import onnxruntime_backend, onnxruntime_nets
from latentrt.engines.errors import BackendError
from latentrt.engines.onnxruntime_nets import CPU, CUDA, cuda_available, open_onnxruntime_net
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
    fake = Library(onnxruntime_backend.library(), [CUDA, CPU])
    for module in (onnxruntime_backend, onnxruntime_nets):
        monkeypatch.setattr(module, "library", lambda: fake)
    monkeypatch.setattr(onnxruntime_nets, "cuda_device_available", lambda: None)
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
    key = "disable_synchronize_execution_providers"
    assert cuda_library.asked["run"].get_run_config_entry(key) == "1"
    assert bound.profile == "onnxruntime CUDA, any shape"
    assert cuda_library.binding.bound == [
        ("input", "x", "cuda", 1, np.float32, (2, 4), 4096),
        ("output", "y", "cuda", 1, np.float32, (2, 4), 8192),
    ]
    net.close()


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
    fake = Library(onnxruntime_backend.library(), [CUDA, CPU])
    monkeypatch.setattr(onnxruntime_nets, "library", lambda: fake)
    monkeypatch.setattr(onnxruntime_nets, "cuda_device_available", lambda: "there is no NVIDIA driver")
    assert cuda_available() == "there is no NVIDIA driver"
    monkeypatch.setattr(fake, "get_available_providers", lambda: [CPU])
    assert "no CUDA provider" in str(cuda_available())
    monkeypatch.setattr(onnxruntime_backend, "find_spec", lambda name: None)
    assert cuda_available() == "onnxruntime is not installed"


def test_cuda_where_there_is_none(package: Package) -> None:
    if cuda_available() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(BackendError, match=r"cannot run on CUDA.*pip install"):
        open_onnxruntime_net(package, "unet", HOST)  # type: ignore[arg-type]
