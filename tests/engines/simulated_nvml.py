"""The part of NVIDIA's management library that latentrt calls, for one device with numbers of its own."""
# ruff: noqa: N802 - the names are NVML's

from typing import Any


class NvmlError(Exception):
    pass


class Numbers:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class SimulatedNvml:
    """`pynvml`; `unknown` names functions that answer NotSupported, `kind` begins the device's identity."""

    NVMLError = NvmlError

    def __init__(self, *, unknown: tuple[str, ...] = (), kind: str = "GPU", processes: Any = ()) -> None:
        self.unknown, self.kind, self.processes = unknown, kind, processes

    def _answer(self, name: str, value: Any) -> Any:
        if name in self.unknown:
            raise NvmlError("Not Supported")
        return value

    def nvmlInit(self) -> None:
        self._answer("nvmlInit", None)

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._answer("nvmlSystemGetDriverVersion", "580.82.07")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"{self.kind}-00010203-0405-0607-0809-0a0b0c0d0e0f":
            raise NvmlError("Not Found")
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Numbers:
        assert handle == "handle"
        return self._answer("nvmlDeviceGetMemoryInfo", Numbers(free=600, total=1000, used=400))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:
        assert handle == "handle"
        return self._answer("nvmlDeviceGetComputeRunningProcesses", self.processes)

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        assert handle == "handle"
        return self._answer("nvmlDeviceGetClockInfo", {1: 1980, 2: 3201}[kind])

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert (handle, sensor) == ("handle", 0)
        return self._answer("nvmlDeviceGetTemperature", 41)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "handle"
        return self._answer("nvmlDeviceGetPowerUsage", 78123)
