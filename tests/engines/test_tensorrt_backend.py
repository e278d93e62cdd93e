import pytest

from latentrt.engines.backend import DeviceBackend
from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.errors import BackendError
from latentrt.engines.tensorrt import backend as tensorrt_backend
from latentrt.engines.tensorrt import rtx_backend as tensorrt_rtx_backend
from tests.engines import tensorrt_setting as setting


class NoGpu:
    """A CUDA runtime that finds none."""

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return (100, 0)

    def cudaGetLastError(self) -> tuple[int]:  # noqa: N802
        return (100,)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_reason_is_the_first_thing_that_is_missing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.engines.tensorrt.flavour.installed_version", lambda _: None)
    assert "is not installed" in (tensorrt_backend.available(backend) or "")
    monkeypatch.setattr("latentrt.engines.tensorrt.flavour.installed_version", lambda _: "9.0")
    assert "9.0 is installed" in (tensorrt_backend.available(backend) or "")
    version = {"tensorrt": "10.14.1", "tensorrt-rtx": "1.7.1"}[backend]
    monkeypatch.setattr("latentrt.engines.tensorrt.flavour.installed_version", lambda _: version)
    assert tensorrt_backend.available(backend, runtime=NoGpu()) == "there is no NVIDIA GPU"


def test_the_second_module_is_the_first_with_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_backend, "available", lambda backend="tensorrt": f"asked for {backend}")
    monkeypatch.setattr(tensorrt_backend, "describe", lambda backend="tensorrt": f"is {backend}")
    assert tensorrt_rtx_backend.available() == "asked for tensorrt-rtx"
    assert tensorrt_rtx_backend.describe() == "is tensorrt-rtx"


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.engines.tensorrt.flavour.installed_version", lambda _: "1.7.1")
    monkeypatch.setattr(tensorrt_backend, "installed_version", lambda _: "1.7.1")

    class Facts:
        name, sm = "a GPU", "sm_89"

    monkeypatch.setattr(cuda_facts, "facts", Facts)
    assert tensorrt_backend.describe("tensorrt-rtx") == "tensorrt_rtx 1.7.1 (a GPU, sm_89)"


def test_an_unknown_backend() -> None:
    assert tensorrt_backend.available("tensorrt-lean")
    with pytest.raises(BackendError):
        tensorrt_backend.describe("tensorrt-lean")


def test_without_a_gpu_no_device_opens() -> None:
    assert isinstance(tensorrt_backend, DeviceBackend)
    assert isinstance(tensorrt_rtx_backend, DeviceBackend)
    if cuda_facts.available() is not None and tensorrt_rtx_backend.available():
        with pytest.raises(BackendError):
            tensorrt_rtx_backend.open_device(setting.PACKAGE, ("unet",))
