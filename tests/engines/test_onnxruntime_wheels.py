"""Broken and colliding installations of onnxruntime, as pip leaves them."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from latentrt.engines.backend import choose_backend
from latentrt.engines.errors import BackendError
from latentrt.engines.installed import install_command
from latentrt.engines.onnxruntime import session
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME, OnnxRuntimeBackend
from latentrt.engines.onnxruntime.cuda_backend import ONNXRUNTIME_CUDA, OnnxRuntimeCudaBackend
from latentrt.engines.onnxruntime.nets import cuda_available
from latentrt.engines.onnxruntime.wheels import imported_wheel, installed_wheels, reinstall_command
from latentrt.runtime import Pipeline

CPU, GPU = install_command("cpu"), install_command("cuda")


def add_wheel(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all others on the path of imports."""
    monkeypatch.syspath_prepend(str(tmp_path))
    session._tell_several_wheels.cache_clear()  # pyright: ignore[reportPrivateUsage]
    return tmp_path


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import onnxruntime` finds a folder without Python files: what a removed second wheel leaves."""
    module = ModuleType("onnxruntime")
    module.__spec__ = importlib.util.spec_from_loader("onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


@pytest.mark.usefixtures("empty_folder")
def test_a_folder_without_the_library(site: Path) -> None:
    for backend in (ONNXRUNTIME, ONNXRUNTIME_CUDA):
        refused = backend.refusal()
        assert isinstance(refused, BackendError)
        assert refused.found.startswith("onnxruntime is installed (onnxruntime) and broken: AttributeError: ")
        assert refused.fix == f"Install it anew: pip uninstall -y onnxruntime && {CPU}"
    with pytest.raises(BackendError, match=r"no backend can run here.*broken") as caught:
        Pipeline.open("demo")
    assert caught.value.fix.endswith(CPU)
    add_wheel(site, "onnxruntime-gpu", "1.25.0")  # as pip knows it, and it is this one that is wanted
    refused = ONNXRUNTIME.refusal()
    assert refused is not None
    assert "(onnxruntime and onnxruntime-gpu)" in refused.found
    assert refused.fix.endswith(f": pip uninstall -y onnxruntime onnxruntime-gpu && {GPU}")


@pytest.mark.parametrize(
    "error",
    ["ImportError('libonnxruntime.so: cannot open shared object file')", "OSError('x')", "RuntimeError"],
)
def test_a_library_that_does_not_load(tmp_path: Path, error: str) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text(f"raise {error}")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from latentrt.engines.backend import choose_backend\n"
        "from latentrt.engines.errors import BackendError\n"
        "for name in ('auto', 'onnxruntime', 'onnxruntime-cuda'):\n"
        "    try: choose_backend(name)\n"
        "    except BackendError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert f" and broken: {error.partition('(')[0]}: " in line
        assert line.endswith(f"&& {CPU}")


def test_two_wheels_are_named_once(site: Path, logged: list[str]) -> None:
    add_wheel(site, "onnxruntime-gpu", "1.25.0")
    for _ in range(2):
        assert ONNXRUNTIME.refusal() is None
    (line,) = logged
    number = installed_wheels()["onnxruntime"]
    assert line == (
        f"onnxruntime {number} and onnxruntime-gpu 1.25.0 are installed into one folder; what is imported is"
        f" onnxruntime. Keep one of them: pip uninstall -y onnxruntime onnxruntime-gpu && {GPU}"
    )


@pytest.mark.parametrize("name", ["onnxruntime-directml", "onnxruntime-rocm", "onnxruntime-openvino"])
def test_other_wheels_collide_as_well(site: Path, logged: list[str], name: str) -> None:
    add_wheel(site, name, "1.24.4")
    assert ONNXRUNTIME.refusal() is None
    assert f"onnxruntime {installed_wheels()['onnxruntime']} and {name} 1.24.4 are installed" in logged[0]
    assert logged[0].endswith(f": pip uninstall -y onnxruntime {name} && {CPU}")


def test_one_wheel_is_nothing_to_tell(site: Path, logged: list[str]) -> None:
    assert list(installed_wheels()) == ["onnxruntime"]
    assert imported_wheel() == "onnxruntime"
    assert ONNXRUNTIME.refusal() is None
    assert logged == []
    assert reinstall_command(gpu=True) == f"pip uninstall -y onnxruntime && {GPU}"


def test_the_name_of_a_wheel_that_does_not_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.capi.build_and_package_info", None)
    assert imported_wheel() == ""


def test_auto_says_what_it_takes_and_why(logged: list[str]) -> None:
    if cuda_available() is None:
        pytest.skip("there is a CUDA device")
    name, backend = choose_backend("auto")
    assert logged == [f"auto takes {name}: {backend.describe()}; not onnxruntime-cuda: {cuda_available()}"]
    choose_backend("onnxruntime")
    assert len(logged) == 1, "whoever names a backend knows it"


def test_auto_goes_on_where_the_best_does_not_open(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    """A CUDA provider without cuDNN is listed, and fails when a session is opened."""
    broken = BackendError("the CUDA provider did not load", expected="cuDNN", fix="Install it.")

    def fails(*_: Any, **__: Any) -> Any:
        raise broken

    monkeypatch.setattr(OnnxRuntimeCudaBackend, "refusal", lambda self: None)
    monkeypatch.setattr(OnnxRuntimeCudaBackend, "describe", lambda self, index=0: "a GPU")
    monkeypatch.setattr(OnnxRuntimeCudaBackend, "open_device", fails)
    with Pipeline.open("demo", threads=1) as pipe:
        assert pipe.backend == ONNXRUNTIME.describe()
    assert logged == [
        "auto takes onnxruntime-cuda: a GPU",
        f"onnxruntime-cuda does not open: {broken}",
        f"auto takes onnxruntime: {ONNXRUNTIME.describe()}; not onnxruntime-cuda: {broken.found}",
    ]
    with pytest.raises(BackendError, match="did not load"):
        Pipeline.open("demo", backend="onnxruntime-cuda")
    monkeypatch.setattr(OnnxRuntimeBackend, "open_net", fails)
    with pytest.raises(BackendError, match=r"no backend can run here.*cuda: .*; onnxruntime: the CUDA"):
        Pipeline.open("demo")


def test_the_error_of_a_named_backend_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = BackendError("there is no NVIDIA driver", expected="a GPU", fix="Install the driver.")

    def load(row: Any) -> Any:
        return type("Refusing", (), {"refusal": lambda self: refused})()

    monkeypatch.setattr("latentrt.engines.backends.BackendRow.load", load)
    with pytest.raises(BackendError, match="the backend tensorrt cannot run here: there is no") as caught:
        choose_backend("tensorrt")
    assert (caught.value.expected, caught.value.fix) == ("a GPU", "Install the driver.")
    with pytest.raises(BackendError, match=r"onnxruntime-cuda: there is no .*; onnxruntime: there is no"):
        choose_backend("auto")
