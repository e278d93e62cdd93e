"""The CUDA provider as far as it goes without a GPU: what it is asked for, and what is refused."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.errors import BackendError
from latentrt.engines.onnxruntime import cuda_libraries
from latentrt.engines.onnxruntime import nets as onnxruntime_nets
from latentrt.engines.onnxruntime import session as onnxruntime_session
from latentrt.engines.onnxruntime.nets import CPU, CUDA, cuda_available, cuda_refusal, open_onnxruntime_net
from latentrt.engines.package import Package

HOST = SimpleNamespace(name="host memory")


class Library:
    """onnxruntime with a CUDA provider that writes down what it is asked for."""

    def __init__(self, real: Any, providers: list[str]) -> None:
        self.real, self.providers, self.asked = real, providers, dict[str, Any]()
        self.preloaded, self.prints = list[dict[str, Any]](), ""
        self.cuda_version = "13.0"
        self.inputs_on, self.binding = "Cuda", Binding()
        self.__version__ = real.__version__

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def preload_dlls(self, **where: Any) -> None:
        self.preloaded.append(where)
        print(self.prints)

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
    for module in (onnxruntime_session, onnxruntime_nets, cuda_libraries):
        monkeypatch.setattr(module, "library", lambda: fake)
    monkeypatch.setattr(cuda_facts, "refusal", lambda: None)
    monkeypatch.setattr(cuda_libraries, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_libraries, "_CUDNN", None)  # the program itself, which always opens
    cuda_libraries.load_libraries.cache_clear()
    return fake


def test_a_cuda_session_gets_the_devices_stream(package: Package, cuda_library: Library) -> None:
    device: Any = SimpleNamespace(name="A GPU", stream=12345, index=1)
    net: Any = open_onnxruntime_net(package, "unet", device)
    assert cuda_library.asked["providers"] == [
        (
            CUDA,
            {
                "device_id": "1",
                "user_compute_stream": "12345",
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "HEURISTIC",
                "use_tf32": "0",
                "sdpa_kernel": "19",
                "prefer_nhwc": "0",
            },
        ),
        CPU,
    ]
    assert cuda_library.asked["fallback"] == 0
    assert not cuda_library.asked["options"].enable_mem_pattern
    open_onnxruntime_net(package, "unet", device)
    assert len(cuda_library.preloaded) == 1
    bound = net.bind({"x": (2, 4)}, {"x": 4096, "y": 8192}, 0)
    assert bound.profile == "onnxruntime CUDA plain, any shape"
    assert cuda_library.binding.bound == [
        ("input", "x", "cuda", 1, np.float32, (2, 4), 4096),
        ("output", "y", "cuda", 1, np.float32, (2, 4), 8192),
    ]
    net.close()


def test_an_experiment_changes_what_provider_and_session_get(package: Package, cuda_library: Library) -> None:
    device: Any = SimpleNamespace(name="A GPU", stream=12345, index=1)
    weights = "session.use_device_allocator_for_initializers"
    open_onnxruntime_net(package, "unet", device)
    assert cuda_library.asked["options"].get_session_config_entry(weights) == "1"
    changed = {"cudnn_conv_algo_search": "EXHAUSTIVE", "cudnn_conv_use_max_workspace": "0", weights: "0"}
    open_onnxruntime_net(package, "unet", device, settings=changed)
    (_, provider), _ = cuda_library.asked["providers"]
    assert cuda_library.asked["options"].get_session_config_entry(weights) == "0"
    assert provider["cudnn_conv_algo_search"] == "EXHAUSTIVE"
    assert provider["cudnn_conv_use_max_workspace"] == "0"
    assert weights not in provider


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


def opened(package: Package) -> tuple[Any, Any, Any, Recorded]:
    device: Any = SimpleNamespace(name="A GPU", stream=12345, index=0)
    net: Any = open_onnxruntime_net(package, "unet", device)
    bound: Any = net.bind({"x": (2, 4)}, {"x": 4096, "y": 8192}, 0)
    return device, net, bound, Recorded(net)


def test_every_run_returns_at_once(package: Package, cuda_library: Library) -> None:
    _, net, bound, recorded = opened(package)
    assert bound.capturable
    for _ in range(40):
        bound.enqueue()
    assert recorded.at_once == [True] * 40
    net.settle()
    net.close()


def test_shapes_are_computed_by_one_thread(package: Package, cuda_library: Library) -> None:
    opened(package)
    assert cuda_library.asked["options"].intra_op_num_threads == 1


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


# ── NVIDIA's libraries ──────────────────────────────────────────────────────────────────────────────────

A_GPU: Any = SimpleNamespace(name="A GPU", stream=1, index=0)


def test_libraries_are_loaded_from_where_their_wheels_are(
    package: Package,
    cuda_library: Library,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    logged: list[str],
) -> None:
    """As in a user's site, while onnxruntime is in a virtual environment: it looks only beside itself."""
    for name in ("cu13", "cudnn"):
        (tmp_path / "nvidia" / name / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cuda_libraries, "find_spec", find_spec)
    cuda_library.prints = "Failed to load libcublas.so.13: no such file"
    open_onnxruntime_net(package, "unet", A_GPU)
    assert cuda_library.preloaded == [
        {"cudnn": False, "directory": str(tmp_path / "nvidia" / "cu13" / "lib")},
        {"cuda": False, "directory": str(tmp_path / "nvidia" / "cudnn" / "lib")},
    ]


def test_the_library_prints_nothing(
    package: Package, cuda_library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda_library.prints = "Failed to load libcublas.so.13: no such file"
    open_onnxruntime_net(package, "unet", A_GPU)
    assert cuda_library.preloaded == [{"cuda": True, "cudnn": True}]
    assert capsys.readouterr() == ("", "")


def test_a_cudnn_that_is_missing_is_noticed_when_a_net_is_opened(
    package: Package, cuda_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider opens without it since 1.31, and fails at the first convolution."""
    monkeypatch.setattr(cuda_libraries, "_CUDNN", "libcudnn-of-nobody.so.9")
    with pytest.raises(BackendError, match=r"cuDNN does not load: libcudnn-of-nobody.*\[cuda\]"):
        open_onnxruntime_net(package, "unet", A_GPU)


def test_a_run_without_cudnn_says_what_to_install(package: Package, cuda_library: Library) -> None:
    _, net, bound, _ = opened(package)

    def fail(*_: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : cuDNN is unavailable or disabled")

    net._session.run_with_iobinding = fail
    with pytest.raises(BackendError, match=r"'unet' failed.*cuDNN is unavailable.*pip install .*\[cuda\]"):
        bound.enqueue()


def test_a_device_without_a_stream(package: Package, cuda_library: Library) -> None:
    for device in (HOST, SimpleNamespace(name="host memory", stream=0)):
        with pytest.raises(BackendError, match="host memory has no CUDA stream"):
            open_onnxruntime_net(package, "unet", device)  # type: ignore[arg-type]


def test_a_provider_that_does_not_load(package: Package, cuda_library: Library) -> None:
    cuda_library.providers = [CPU]
    cuda_library.prints = "Failed to load libcublas.so.13: no such file"
    with pytest.raises(BackendError, match=r"did not load.*\(Failed to load libcublas.so.13: no such file\)"):
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
