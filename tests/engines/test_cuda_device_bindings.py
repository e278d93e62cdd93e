"""What latentrt calls exists in the installed cuda-bindings and takes these arguments. Needs no driver."""

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.cuda import device as cuda_device
from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.errors import BackendError, MemoryLimitError
from tests.engines.simulated_cuda import SimulatedRuntime
from tests.engines.simulated_nvml import SimulatedNvml


def sources() -> list[ast.AST]:
    modules = cuda_device, cuda_facts
    return [ast.parse(Path(module.__file__).read_text("utf-8")) for module in modules]


def calls() -> set[tuple[str, int]]:
    """Every call of the CUDA runtime in the sources: the function's name and how many arguments it gets."""
    found = set[tuple[str, int]]()
    for node in (node for tree in sources() for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert not any(isinstance(item, ast.Starred) for item in node.args) or node.func.attr != "_call"
            match node.func.attr, node.args:
                case "_call", [ast.Constant(value=str(name)), *arguments]:
                    found.add((name, len(arguments)))
                case name, arguments if name.startswith("cuda"):
                    found.add((name, len(arguments)))
                case _:
                    pass
    return found


@pytest.mark.parametrize("real", [True, False])
def test_every_function_that_is_called_takes_that_many_arguments(real: bool) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime") if real else SimulatedRuntime()
    assert len(calls()) >= 28
    for name, count in calls():
        inspect.signature(getattr(runtime, name)).bind(*range(count))


def test_constants_and_fields_exist_and_are_equal() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    for name in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        for item in getattr(SimulatedRuntime, name):
            assert int(getattr(getattr(real, name), item.name)) == item.value
    assert int(real.cudaStreamNonBlocking) == SimulatedRuntime.cudaStreamNonBlocking
    assert int(real.cudaError_t.cudaErrorMemoryAllocation) == cuda_facts._OUT_OF_MEMORY
    assert int(real.cudaError_t.cudaErrorInsufficientDriver) == cuda_facts._INSUFFICIENT_DRIVER
    assert int(real.cudaError_t.cudaErrorNoDevice) == cuda_facts._NO_DEVICE
    properties = real.cudaDeviceProp()
    for name in ("name", "major", "minor", "integrated", "totalGlobalMem", "multiProcessorCount"):
        assert hasattr(properties, name)
    assert len(properties.uuid.bytes) == 16


class Both:
    """Each call goes to the real library first, which must accept its arguments; the simulation answers."""

    def __init__(self, real: Any, simulated: SimulatedRuntime) -> None:
        self.real, self.simulated, self.accepted = real, simulated, set[str]()

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(self.simulated, name)) or isinstance(getattr(self.simulated, name), type):
            return getattr(self.real, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name.startswith("cudaGetError"):
                given = tuple(self.real.cudaError_t(int(item)) for item in arguments)
            else:
                given = arguments
            results = getattr(self.real, name)(*given), getattr(self.simulated, name)(*arguments)
            # 35: cudaErrorInsufficientDriver, after the arguments have been converted
            assert int(results[0][0]) in (0, 35)
            assert len(results[0]) == len(results[1]), name
            self.accepted.add(name)
            return results[1]

        return call


def test_the_real_library_accepts_every_argument() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    if int(real.cudaGetDeviceCount()[0]) != 35:
        pytest.skip("there is a driver: tests/engines/test_cuda_device_gpu.py runs the real thing")
    cuda = SimulatedRuntime()
    both = Both(real, cuda)
    device = CudaDevice(runtime=both, nvml=SimulatedNvml(unknown=("nvmlInit",)))
    a, b = device.allocate(64), device.allocate(64)
    device.upload(a, np.arange(64, dtype=np.uint8))
    with device.capture() as graphs:
        device.copy(b, a, 4)
        device.copy(b, a, 4, rows=2, to_pitch=8, pitch=4)
    stopwatch = device.stopwatch()
    stopwatch.start()
    graphs[0].launch()
    stopwatch.stop()
    array = np.empty(16, np.uint8)
    device.download(b, array)
    device.synchronize()
    assert stopwatch.seconds() == pytest.approx(3e-3)  # the simulation's: three runs of the two copies
    assert array.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 4, 5, 6, 7, 0, 0, 0, 0]
    with pytest.raises(BackendError, match="cannot be captured: no"), device.capture():
        raise RuntimeError("no")
    with pytest.raises(MemoryLimitError):
        device.allocate(2**30)
    device.memory()
    device.free(b)
    device.close()
    assert cuda.nothing_left()
    assert both.accepted == {name for name, _ in calls()} - {"cudaRuntimeGetVersion"}
