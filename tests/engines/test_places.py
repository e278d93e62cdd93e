"""Which backend is taken for a device, and on which of several a loop is opened."""

from typing import Any

import pytest

from latentrt.engines import backend as module
from latentrt.engines.backend import Place, choose_backend
from latentrt.engines.errors import BackendError, UsageError
from latentrt.engines.package import Package
from latentrt.runtime.loop import open as loops
from latentrt.runtime.loop.open import LoopOptions, open_loop
from latentrt.runtime.model import SHIPPED
from latentrt.runtime.pipeline import Pipeline


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("auto", Place(None, 0)),
        ("cpu", Place(False, 0)),
        ("cuda", Place(True, 0)),
        ("cuda:0", Place(True, 0)),
        ("cuda:3", Place(True, 3)),
        ("openvino:GPU", Place(False, 0, "GPU")),
        ("openvino:GPU.1", Place(False, 0, "GPU.1")),
    ],
)
def test_devices_by_name(text: str, place: Place) -> None:
    assert Place.parse(text) == place
    assert str(place) == text.removesuffix(":0").removesuffix(":3")


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cuda:99999", "openvino:", "openvino:gpu"]
)
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda, cuda:N, or as openvino:GPU"):
        Pipeline.open("demo", device=text)


def test_a_device_decides_which_backends_are_asked() -> None:
    assert choose_backend("auto", place=Place.parse("cpu"))[0] == "onnxruntime"
    assert choose_backend("onnxruntime", place=Place.parse("cpu"))[0] == "onnxruntime"
    with pytest.raises(BackendError, match="no backend can run here: onnxruntime-cuda"):
        choose_backend("auto", place=Place.parse("cuda"))
    with pytest.raises(UsageError, match="the backend onnxruntime with the device cuda"):
        choose_backend("onnxruntime", place=Place.parse("cuda:1"))
    with pytest.raises(UsageError, match="the backend tensorrt-rtx with the device cpu"):
        choose_backend("tensorrt-rtx", place=Place.parse("cpu"))


def test_a_device_of_openvino() -> None:
    """Here it has the CPU alone."""
    pytest.importorskip("openvino")
    for name in ("auto", "openvino"):
        with pytest.raises(BackendError, match=r"openvino has no device NPU: there is CPU.*--device cpu"):
            choose_backend(name, place=Place.parse("openvino:NPU"))
    name, backend = choose_backend("auto", place=Place.parse("openvino:CPU"))
    assert (name, backend.describe()[:9]) == ("openvino", "openvino ")
    with pytest.raises(UsageError, match="the backend onnxruntime with the device openvino:GPU"):
        choose_backend("onnxruntime", place=Place.parse("openvino:GPU"))


def test_the_loop_is_opened_on_the_device_of_that_index(monkeypatch: pytest.MonkeyPatch) -> None:
    class OpenedError(Exception):
        pass

    class Engine:
        def refusal(self) -> None:
            return None

        def describe(self, index: int = 0) -> str:
            return f"engine on {index}"

        def open_device(self, package: Package, names: Any, *, index: int = 0) -> Any:
            raise OpenedError(index)

    monkeypatch.setattr(loops, "choose_backend", lambda *_: ("engine", Engine()))
    assert isinstance(Engine(), module.DeviceBackend)
    with pytest.raises(OpenedError) as opened:
        open_loop(Package.open(SHIPPED["demo"]), LoopOptions(device="cuda:2"))
    assert opened.value.args == (2,)
