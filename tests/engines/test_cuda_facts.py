import os
import sys
import time
from typing import Any

import pytest

from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.cuda.facts import DeviceFacts, Nvml, available, facts, load_runtime
from latentrt.engines.errors import BackendError
from tests.engines.simulated_cuda import SimulatedRuntime, cudaError_t
from tests.engines.simulated_nvml import Numbers, SimulatedNvml

IDENTITY = "00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_facts() -> None:
    assert facts(0, runtime=SimulatedRuntime(), nvml=SimulatedNvml()) == DeviceFacts(
        index=0,
        name="Simulated GPU",
        compute_capability=(8, 9),
        multiprocessors=58,
        driver="580.82.07",
        cuda="13.0",
        total=64 << 20,
        unified=False,
        uuid=f"GPU-{IDENTITY}",
    )
    assert facts(0, runtime=SimulatedRuntime(), nvml=SimulatedNvml()).sm == "sm_89"


@pytest.mark.parametrize("index", [-1, 2])
def test_no_such_device(index: int) -> None:
    with pytest.raises(BackendError, match=f"there is no CUDA device {index}; expected 0 to 1"):
        facts(index, runtime=SimulatedRuntime(devices=2))


def test_no_device_at_all() -> None:
    with pytest.raises(BackendError, match="no CUDA device: there is no NVIDIA GPU") as caught:
        facts(0, runtime=SimulatedRuntime(devices=0))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (cudaError_t.cudaErrorNoDevice, "there is no NVIDIA GPU"),
        (
            cudaError_t.cudaErrorInsufficientDriver,
            "driver is too old: it speaks CUDA 13.0, cuda-bindings 13.5",
        ),
        (cudaError_t.cudaErrorLaunchFailure, "CUDA cannot start: cudaErrorLaunchFailure"),
    ],
)
def test_reasons(error: cudaError_t, reason: str) -> None:
    cuda = SimulatedRuntime()
    assert available(cuda) is None
    cuda.fail("cudaGetDeviceCount", error)
    assert reason in str(available(cuda))
    assert cuda.last == cudaError_t.cudaSuccess


def test_available_never_raises() -> None:
    assert available(object()) is not None
    assert "fails" in str(available(object()))


def test_cuda_bindings_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match=r"cannot be loaded.*pip install cuda-bindings"):
        load_runtime()
    assert "cuda-bindings cannot be loaded" in str(available())


def test_the_real_library_gives_a_reason_within_a_second() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    start = time.perf_counter()
    reason = available()
    assert time.perf_counter() - start < 1
    if int(real.cudaGetDeviceCount()[0]) == 35 and not real.cudaDriverGetVersion()[1]:
        assert reason == "there is no NVIDIA driver"


# ── NVML ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["GPU", "MIG"])
def test_nvml_finds_the_device_by_its_identity(kind: str) -> None:
    assert Nvml(f"GPU-{IDENTITY}", SimulatedNvml(kind=kind)).memory() == (600, 1000)
    assert Nvml("another", SimulatedNvml(kind=kind)).memory() is None
    assert Nvml("another", SimulatedNvml(kind=kind)).process_memory() is None


@pytest.mark.parametrize(
    ("processes", "size"),
    [
        ([(os.getpid(), 70), (1, 5), (os.getpid(), 7)], 77),
        ([(1, 5)], None),  # in a container
        ([(os.getpid(), None)], None),  # Windows
        ([], None),
    ],
)
def test_process_memory(processes: list[Any], size: int | None) -> None:
    listed = [Numbers(pid=pid, usedGpuMemory=used) for pid, used in processes]
    assert Nvml(IDENTITY, SimulatedNvml(processes=listed)).process_memory() == size


def test_memory_of_other_processes() -> None:
    numbers = [(7, 70), (1, 5), (7, 7), (3, None), (3, 9)]
    listed = [Numbers(pid=pid, usedGpuMemory=used) for pid, used in numbers]
    nvml = Nvml(IDENTITY, SimulatedNvml(processes=listed))
    assert nvml.processes() == {7: 77, 1: 5}
    assert (nvml.process_memory(7), nvml.process_memory(1), nvml.process_memory(3)) == (77, 5, None)


def test_clocks_temperature_and_power() -> None:
    known = {"sm": 1980, "memory": 3201, "temperature": 41, "power": 78123}
    assert Nvml(IDENTITY, SimulatedNvml()).clocks() == known
    no_power = SimulatedNvml(unknown=("nvmlDeviceGetPowerUsage",))  # laptops
    assert Nvml(IDENTITY, no_power).clocks() == {n: v for n, v in known.items() if n != "power"}
    assert Nvml("another", SimulatedNvml()).clocks() == {}
    assert Nvml(IDENTITY, SimulatedNvml(unknown=("nvmlInit",))).clocks() == {}


def test_nvml_without_answers() -> None:
    unsupported = SimulatedNvml(
        unknown=(
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetComputeRunningProcesses",
            "nvmlSystemGetDriverVersion",
        )
    )
    for module in (unsupported, SimulatedNvml(unknown=("nvmlInit",))):
        nvml = Nvml(IDENTITY, module)
        assert (nvml.memory(), nvml.process_memory(), nvml.driver()) == (None, None, None)


def test_nvml_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Nvml(IDENTITY).memory() is None


def test_the_real_nvml_has_the_functions() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in (name for name in dir(SimulatedNvml) if name.startswith("nvml")):
        assert callable(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)
    assert pynvml.NVML_CLOCK_SM == cuda_facts._NVML_CLOCK_SM
    assert pynvml.NVML_CLOCK_MEM == cuda_facts._NVML_CLOCK_MEM
    assert pynvml.NVML_TEMPERATURE_GPU == cuda_facts._NVML_TEMPERATURE_GPU
    assert cuda_facts.Nvml(IDENTITY).memory() is None
