"""Our calls type-check against the stubs of TensorRT 10.13; names of newer libraries alone are left out.

Needs the stubs, see `test_tensorrt_names.py`. The library is `Any` in the sources, in three aliases; here a
copy of the sources has the stubs' types in their place.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import latentrt.engines
from tests.engines.test_tensorrt_names import SOURCES

FOLDER = Path(latentrt.engines.__path__[0])
NEWER = {
    "EngineStat",
    "EngineValidity",
    "EngineInvalidityDiagnostics",
    "get_engine_stat",
    "get_engine_validity",
    "is_stream_capturable",
    "CudaGraphStrategy",
    "cuda_graph_strategy",
    "DynamicShapesKernelSpecializationStrategy",
    "dynamic_shapes_kernel_specialization_strategy",
    "create_runtime_cache",
    "set_runtime_cache",
}
ALIASES = {
    "tensorrt_contexts.py": [
        ("Engine: TypeAlias = Any", 'Engine: TypeAlias = "trt10.ICudaEngine"'),
        ("Context: TypeAlias = Any", 'Context: TypeAlias = "trt10.IExecutionContext"'),
    ],
    "tensorrt_flavour.py": [("Trt: TypeAlias = Any", "from trt10 import Trt as Trt")],
}
FUTURE = "from __future__ import annotations\n"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources and the stubs, ready for the checker."""
    found = os.environ.get("LATENTRT_TENSORRT_STUBS")
    files = list(Path(found).rglob("tensorrt.pyi")) if found else []
    if not files:
        pytest.skip("LATENTRT_TENSORRT_STUBS names no folder with the stubs")
    root = tmp_path_factory.mktemp("types")
    shutil.copytree(FOLDER, root / "sources" / "engines")
    stubs = files[0].read_text(encoding="utf-8")
    # The live class has the sequence protocol, which the stubs spell as __getitem__ alone.
    stubs = stubs.replace(
        "class Dims:\n", "class Dims:\n    def __iter__(self) -> typing.Iterator[int]: ...\n"
    )
    names = sorted({name for name in re.findall(r"^class (\w+)", stubs, re.MULTILINE) if name[0] != "_"})
    module = "".join(f"    {name} = {name}\n" for name in names)
    nptype = "    @staticmethod\n    def nptype(trt_type: DataType) -> typing.Any: ...\n"
    stubs += f"\nclass Trt:\n    __version__: str\n{module}{nptype}"
    (root / "typings").mkdir()
    (root / "typings" / "trt10.pyi").write_text(stubs, encoding="utf-8")
    for name, pairs in ALIASES.items():
        path = root / "sources" / "engines" / name
        text = path.read_text(encoding="utf-8").replace(FUTURE, f"{FUTURE}\nimport trt10\n", 1)
        for alias, typed in pairs:
            assert alias in text
            text = text.replace(alias, typed)
        path.write_text(text, encoding="utf-8")
    settings = {
        "typeCheckingMode": "basic",
        "stubPath": "typings",
        "pythonVersion": "3.10",
        "include": [f"sources/engines/tensorrt_{name}.py" for name in SOURCES],
    }
    (root / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    return root


def _errors(root: Path) -> list[str]:
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)["generalDiagnostics"]
    texts = [f"{item['file']}: {item['message']}" for item in found if item["severity"] == "error"]
    return [text for text in texts if not any(f'"{name}"' in text for name in NEWER)]


def test_every_call_fits_its_signature(checked: Path) -> None:
    assert _errors(checked) == []


def test_the_check_can_fail(checked: Path) -> None:
    path = checked / "sources" / "engines" / "tensorrt_nets.py"
    text = path.read_text(encoding="utf-8")
    for old, new in (
        ("context.set_device_memory(scratch, needed)", "context.set_device_memory(scratch)"),
        ("context.infer_shapes()", "context.infer_shape()"),
    ):
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        assert len(_errors(checked)) == 1
    path.write_text(text, encoding="utf-8")
