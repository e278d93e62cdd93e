"""What the CUDA runtime and NVML say about a device, and what their errors mean; nothing here allocates.

The CUDA runtime is a parameter (`runtime`) wherever it is used, so that tests can pass one that fails on
purpose. It is `cuda.bindings.runtime`: its primary context is the one ONNX Runtime and TensorRT use, so that
addresses and streams are theirs as well. Each of its functions returns a tuple that begins with the error.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import BackendError, MemoryLimitError

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver: also the answer where there is no driver at all
_NO_DEVICE = 100  # cudaErrorNoDevice
_NVML_CLOCK_SM, _NVML_CLOCK_MEM, _NVML_TEMPERATURE_GPU = 1, 2, 0
_ON_CPU = "Without one, run on the CPU: --backend onnxruntime"
_LOOK = f"See what `nvidia-smi` says. {_ON_CPU}"
_FEWER = "Draw fewer or smaller pictures at once, or close what else uses the GPU (`nvidia-smi` lists it)."


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a device is. `total` is in bytes; `unified` devices share their memory with the host.

    `multiprocessors` is their number, the first thing in which GPUs of one name differ.

    `driver` is the driver's version ("580.82.07"), None where NVML does not tell; `cuda` is the newest CUDA
    version that the driver speaks ("13.0"); `uuid` is as NVML and `nvidia-smi -L` print it.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    driver: str | None
    cuda: str
    total: int
    unified: bool
    uuid: str

    @property
    def sm(self) -> str:
        """The architecture as compilers name it: `sm_89`."""
        return "sm_{}{}".format(*self.compute_capability)

    @property
    def driver_line(self) -> str:
        """The driver's major version, as keys of engines have it: "580", or "any" if it is not known."""
        return (self.driver or "any").partition(".")[0]

    @property
    def kind(self) -> str:
        """What engines are timed for. A name alone covers different GPUs: modules of Orin, the RTX 3060."""
        return f"{self.name}, {self.multiprocessors} SMs, {round(self.total / 2**30)} GiB"


def load_runtime() -> Any:
    """`cuda.bindings.runtime`, imported on first use (0.1 s). Its functions are untyped, hence Any.

    Raises:
        BackendError: cuda-bindings is not installed, or cannot be loaded.
    """
    try:
        return import_module("cuda.bindings.runtime")
    except Exception as error:  # a damaged installation raises OSError, RuntimeError and others
        raise BackendError(
            f"cuda-bindings cannot be loaded: {error}",
            expected="the package cuda-bindings",
            fix="Install it: pip install cuda-bindings",
        ) from error


def checked(runtime: Any, result: tuple[Any, ...], doing: str) -> Any:
    """The value that a call of the CUDA runtime returned.

    A failed call also leaves its error behind for whoever asks this runtime's `cudaGetLastError` next in this
    thread, so it is taken away here. That is for others who use cuda-bindings: the runtime is linked into it
    statically (its release notes), and ONNX Runtime and TensorRT ask copies of their own, which keep errors
    of their own. What this runtime did cannot be seen there, nor could it be cleared from here. ONNX Runtime
    clears its copy itself whenever a call fails (CudaCall in core/providers/cuda/cuda_call.cc).

    Args:
        runtime: the CUDA runtime.
        result: what the call returned: (error, value...).
        doing: what it was for, to begin a message: "allocating 4096 bytes".

    Raises:
        MemoryLimitError: the device is out of memory.
        BackendError: any other error.
    """
    error, *values = result
    if not int(error):
        return values[0] if len(values) == 1 else tuple(values)
    runtime.cudaGetLastError()
    name, meaning = _text(runtime.cudaGetErrorName(error)), _text(runtime.cudaGetErrorString(error))
    what = f"{doing} failed: {name} ({meaning})"
    if int(error) == _OUT_OF_MEMORY:
        raise MemoryLimitError(f"{what}; {_room(runtime)}", expected="enough free memory", fix=_FEWER)
    raise BackendError(
        what,
        expected="a CUDA device that works",
        fix="Check it with `nvidia-smi` and start again: CUDA may refuse all further work of this process.",
    )


def _text(result: tuple[Any, ...]) -> str:
    # bytes in cuda-bindings 12 and 13
    text = result[1]
    return text.decode() if isinstance(text, bytes) else str(text)


def _room(runtime: Any) -> str:
    error, free, total = runtime.cudaMemGetInfo()
    if int(error):
        runtime.cudaGetLastError()
        return "how much is free is not known"
    return f"{free} of {total} bytes are free"


def refusal(runtime: Any = None) -> BackendError | None:
    """None if a CUDA device can be used here, else the error that says why not. Never raises."""
    try:
        runtime = runtime or load_runtime()
        error, count = runtime.cudaGetDeviceCount()
        if int(error):
            return _refusal(runtime, error)
        return None if count else _without("there is no NVIDIA GPU", _ON_CPU)
    except BackendError as error:
        return error
    except Exception as error:  # whatever goes wrong while asking is itself the answer
        return _without(f"the CUDA runtime fails: {error}", _LOOK)


def available(runtime: Any = None) -> str | None:
    """None if a CUDA device can be used here, else the reason. Never raises."""
    found = refusal(runtime)
    return None if found is None else found.found


def _refusal(runtime: Any, error: Any) -> BackendError:
    runtime.cudaGetLastError()
    if int(error) == _NO_DEVICE:
        return _without("there is no NVIDIA GPU", _ON_CPU)
    if int(error) != _INSUFFICIENT_DRIVER:
        return _without(f"CUDA cannot start: {_text(runtime.cudaGetErrorName(error))}", _LOOK)
    _, newest = runtime.cudaDriverGetVersion()
    if not newest:
        return _without("there is no NVIDIA driver", f"With an NVIDIA GPU, install its driver. {_ON_CPU}")
    _, needed = runtime.cudaRuntimeGetVersion()
    return _without(
        f"the NVIDIA driver is too old: it speaks CUDA {_version(newest)}, cuda-bindings {_version(needed)}",
        f"Update the NVIDIA driver. {_ON_CPU}",
    )


def _without(found: str, fix: str) -> BackendError:
    return BackendError(found, expected="an NVIDIA GPU that CUDA can use", fix=fix)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def facts(index: int = 0, *, runtime: Any = None, nvml: Any = None) -> DeviceFacts:
    """What the device of that index is (as CUDA_VISIBLE_DEVICES numbers them).

    Raises:
        BackendError: no device can be used here, or none has that index.
    """
    if reason := available(runtime):
        raise BackendError(
            f"no CUDA device: {reason}",
            expected="an NVIDIA GPU with its driver and cuda-bindings",
            fix="Check with `nvidia-smi`, or run on the CPU: --backend onnxruntime",
        )
    runtime = runtime or load_runtime()
    count = checked(runtime, runtime.cudaGetDeviceCount(), "counting devices")
    if not 0 <= index < count:
        raise BackendError(
            f"there is no CUDA device {index}",
            expected=f"0 to {count - 1}",
            fix="List them: nvidia-smi -L.",
        )
    properties = checked(runtime, runtime.cudaGetDeviceProperties(index), f"asking for device {index}")
    newest = checked(runtime, runtime.cudaDriverGetVersion(), "asking for the driver's version")
    identity = str(uuid.UUID(bytes=bytes(properties.uuid.bytes)))
    return DeviceFacts(
        index=index,
        name=_text((0, properties.name)),
        compute_capability=(int(properties.major), int(properties.minor)),
        multiprocessors=int(properties.multiProcessorCount),
        driver=Nvml(identity, nvml).driver(),
        cuda=_version(newest),
        total=int(properties.totalGlobalMem),
        unified=bool(properties.integrated),
        uuid=f"GPU-{identity}",
    )


class Nvml:
    """The management library's view of one device: of all processes. Every answer is None where it has none.

    The device is looked up by its identity: NVML's numbers ignore CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, identity: str, module: Any = None) -> None:
        self._module: Any = module
        self._handle: Any = None
        try:
            self._module = module or import_module("pynvml")
            self._module.nvmlInit()
        except Exception:  # not installed, no driver, no permission: nothing to see
            self._module = None
            return
        identity = identity.removeprefix("GPU-")
        for kind in ("GPU", "MIG"):  # CUDA gives a slice of a GPU the slice's identity
            if self._handle is None:
                self._handle = self._ask("nvmlDeviceGetHandleByUUID", f"{kind}-{identity}")

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._module, name)(*arguments)
        except (self._module.NVMLError, AttributeError):  # older releases lack some functions
            return None

    def driver(self) -> str | None:
        """The driver's version, like "580.82.07"."""
        return None if self._module is None else self._ask("nvmlSystemGetDriverVersion")

    def memory(self) -> tuple[int, int] | None:
        """Free and total bytes of the device. None on those that share the host's memory (Jetson, GB10)."""
        answer = None if self._handle is None else self._ask("nvmlDeviceGetMemoryInfo", self._handle)
        return None if answer is None else (int(answer.free), int(answer.total))

    def clocks(self) -> dict[str, int]:
        """In MHz `sm` and `memory`, `temperature` in degrees Celsius and `power` in milliwatts, if known."""
        if self._handle is None:
            return {}
        queries = {
            "sm": ("nvmlDeviceGetClockInfo", _NVML_CLOCK_SM),
            "memory": ("nvmlDeviceGetClockInfo", _NVML_CLOCK_MEM),
            "temperature": ("nvmlDeviceGetTemperature", _NVML_TEMPERATURE_GPU),
            "power": ("nvmlDeviceGetPowerUsage",),
        }
        answers = {name: self._ask(function, self._handle, *of) for name, (function, *of) in queries.items()}
        return {name: int(answer) for name, answer in answers.items() if answer is not None}

    def process_memory(self, pid: int | None = None) -> int | None:
        """Bytes of the device that a process holds, with the context and the libraries' kernels.

        None where NVML does not tell: on Windows' own driver model, and in a container whose process numbers
        are not the host's. `pid`: this process unless given.
        """
        return self.processes().get(os.getpid() if pid is None else pid)

    def processes(self) -> dict[int, int]:
        """Bytes of the device that each process holds, by its number; without those NVML does not tell."""
        listed = (
            None if self._handle is None else self._ask("nvmlDeviceGetComputeRunningProcesses", self._handle)
        )
        sizes: dict[int, int] = {}
        unknown: set[int] = set()
        for item in listed or ():
            if item.usedGpuMemory is None:
                unknown.add(item.pid)
            else:
                sizes[item.pid] = sizes.get(item.pid, 0) + item.usedGpuMemory
        return {pid: size for pid, size in sizes.items() if pid not in unknown}
