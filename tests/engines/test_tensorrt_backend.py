import pytest

from latentrt.engines.backend import DeviceBackend
from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.errors import BackendError
from latentrt.engines.tensorrt import backend as tensorrt_backend
from latentrt.engines.tensorrt.backend import TENSORRT, TENSORRT_RTX, TensorRTBackend
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
    assert "is not installed" in str(TensorRTBackend(backend).refusal())
    monkeypatch.setattr("latentrt.engines.tensorrt.flavour.installed_version", lambda _: "9.0")
    assert "9.0 is installed" in str(TensorRTBackend(backend).refusal())
    version = {"tensorrt": "10.14.1", "tensorrt-rtx": "1.7.1"}[backend]
    monkeypatch.setattr("latentrt.engines.tensorrt.flavour.installed_version", lambda _: version)
    refused = TensorRTBackend(backend).refusal(runtime=NoGpu())
    assert refused is not None
    assert refused.found == "there is no NVIDIA GPU"
    assert "pip" not in refused.fix, "the library is there"


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.engines.tensorrt.flavour.installed_version", lambda _: "1.7.1")
    monkeypatch.setattr(tensorrt_backend, "installed_version", lambda _: "1.7.1")

    class Facts:
        name, sm = "a GPU", "sm_89"

    monkeypatch.setattr(cuda_facts, "facts", lambda index: Facts)
    assert TENSORRT_RTX.describe() == "tensorrt_rtx 1.7.1 (a GPU, sm_89)"


def test_an_unknown_backend() -> None:
    assert TensorRTBackend("tensorrt-lean").refusal()
    with pytest.raises(BackendError):
        TensorRTBackend("tensorrt-lean").describe()


def test_without_a_gpu_no_device_opens() -> None:
    assert isinstance(TENSORRT, DeviceBackend)
    assert isinstance(TENSORRT_RTX, DeviceBackend)
    if cuda_facts.available() is not None and TENSORRT_RTX.refusal():
        with pytest.raises(BackendError):
            TENSORRT_RTX.open_device(setting.PACKAGE, ("unet",))
