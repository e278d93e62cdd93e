"""The house rules that a machine can check: import arrows, lengths of functions, names, docstrings."""

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.structure import FOLDERS, Import, draw_files, draw_folder, entry_of, read_imports, sources

ROOT = Path(__file__).resolve().parent.parent

# folder -> folders it may import from, besides itself
ARROWS = {
    "engines": set[str](),
    "checkpoints": {"engines"},
    "adapters": {"engines", "checkpoints"},
    "runtime": {"engines", "checkpoints", "adapters"},
    "export": {"engines", "checkpoints", "adapters", "runtime"},  # the runtime's tokenizer
    "demo": {"engines", "runtime", "export"},
    "benchmarks": {"engines", "checkpoints", "adapters", "runtime", "export", "serve", "demo"},
    "serve": {"engines", "runtime"},
    "hosts": {"engines", "runtime", "serve"},
    "cli": {
        "engines",
        "checkpoints",
        "adapters",
        "runtime",
        "export",
        "benchmarks",
        "serve",
        "demo",
        "hosts",
    },
}
# folder -> its rooms, from the ground up: a room may import from those on lower floors
ROOMS: dict[str, list[set[str]]] = {
    "runtime": [{"sampling", "pictures", "prompts"}, {"controls"}, {"request"}, {"loop"}, {"steering"}],
    "runtime/loop": [{"device"}],
    "engines": [
        {"cuda", "store", "graphs", "tuning"},
        {"tensorrt"},
        {"onnxruntime", "openvino"},
        {"contest"},
    ],
    "engines/onnxruntime": [{"lowering"}, {"tuning"}],
    "adapters": [{"kinds"}],
    "checkpoints": [{"files"}, {"controls", "graphs"}, {"hub", "precision", "templates"}],
    "export": [{"nets", "pickles", "quantised"}, {"graphs"}],
    "serve": [{"jobs", "pictures"}, {"door"}, {"a1111", "openai"}],
    "hosts": [{"ray", "triton"}],
    "benchmarks": [{"sides", "load"}, {"models"}, {"verbs"}, {"gpu", "report"}],
}
# To go: imports that run back between rooms or close a circle.
BACK_TO_GO = set[tuple[str, str]]()

PRINTING = ("sys.stderr", "sys.stdout", "warnings.warn")
OF_EXPORT = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir"}
OF_SERVER = {"fastapi", "starlette", "uvicorn", "multipart", "prometheus_client"}
HEAVY = OF_EXPORT | OF_SERVER
MAY_IMPORT = {  # folder or room -> heavy libraries it may import
    "serve": OF_SERVER,
    "checkpoints/graphs": {"onnx", "onnx_ir"},  # onnx-ir brings onnx along
    "checkpoints/templates": {"onnx", "onnx_ir"},
    "checkpoints/precision": {"onnx_ir"},
    "checkpoints": {"onnx_ir"},
    "export": OF_EXPORT,
    "hosts": {"torch", "diffusers"},  # of diffusers' own kinds of arguments and answers
    "demo": {"torch", "diffusers", "transformers"},
    "benchmarks": OF_EXPORT,
    "cli": {"torch"},
    # Lowering a graph for one provider takes a graph library, imported on first use.
    "engines/onnxruntime/lowering": {"onnx", "onnx_ir"},
    "engines/graphs": {"onnx", "onnx_ir"},
}
ENGINE_LIBRARIES = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"}
# What checks and measures graphs at export time runs them.
MAY_RUN = ("engines/", "benchmarks/", "export/verify", "checkpoints/precision")

# What a picture on the CPU does not load.
NOT_FOR_CPU = tuple(
    f"latentrt.{name}"
    for name in ("engines.cuda", "engines.tensorrt", "engines.onnxruntime.cuda_backend", "benchmarks")
)
# To go: how many docstrings of a folder begin with "Of".
OF_TO_GO = dict[str, int]()


def _name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


@cache
def _trees() -> dict[str, ast.Module]:
    """The product's files and the tests', parsed, by their path without `.py`."""
    paths = [*sources(ROOT), *sources(ROOT, ["tests"])]
    return {_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@cache
def _imports() -> list[Import]:
    return read_imports(ROOT)


def _product() -> dict[str, ast.Module]:
    return {name: tree for name, tree in _trees().items() if not name.startswith("tests/")}


def _libraries(tree: ast.Module) -> Iterator[str]:
    """The top names of the libraries a file imports, lazily or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def test_folders_import_one_way() -> None:
    folders = ((one, one.source.split("/")[0], one.target.split("/")[0]) for one in _imports())
    offenders = [str(one) for one, a, b in folders if a != b and b not in ARROWS[a]]
    assert offenders == []


def test_rooms_import_one_way() -> None:
    floors = {
        f"{folder}/{room}": floor
        for folder, order in ROOMS.items()
        for floor, rooms in enumerate(order)
        for room in rooms
    }
    rooms = {name.rpartition("/")[0] for name in _product()} - set(FOLDERS)
    assert rooms - floors.keys() == set(), "rooms that stand on no floor"
    offenders: list[str] = []
    for folder in ROOMS:
        for one in _imports():
            a, b = entry_of(one.source, folder), entry_of(one.target, folder)
            between_rooms = a != b and {f"{folder}/{a}", f"{folder}/{b}"} <= floors.keys()
            if between_rooms and floors[f"{folder}/{b}"] >= floors[f"{folder}/{a}"]:
                offenders += [str(one)] if (one.source, one.target) not in BACK_TO_GO else []
    assert offenders == []


def test_nothing_imports_in_a_circle() -> None:
    """No file, also through lazy imports and those for types, and no entry of a folder."""
    imports = [one for one in _imports() if (one.source, one.target) not in BACK_TO_GO]
    folders = {"", *(name.rpartition("/")[0] for name in _product())}
    drawings = [draw_files(imports, _product())]
    drawings += [draw_folder(folder, imports, _product()) for folder in sorted(folders)]
    assert [circle for drawing in drawings for circle in drawing.circles] == []


def test_heavy_libraries_stay_where_they_belong() -> None:
    offenders: list[str] = []
    for name, tree in _product().items():
        allowed = {
            lib for place, libs in MAY_IMPORT.items() if f"{name}/".startswith(f"{place}/") for lib in libs
        }
        found = set(_libraries(tree))
        offenders += [f"{name}: {library}" for library in found & HEAVY - allowed]
        if not name.startswith(MAY_RUN):
            offenders += [f"{name}: {library}" for library in found & ENGINE_LIBRARIES]
    assert offenders == []


def test_functions_are_short_and_files_are_called_by_what_they_do() -> None:
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert [name for name in _trees() if name.rpartition("/")[2] in vague] == []
    offenders: list[str] = []
    for name, tree in _product().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                offenders += [f"{name}:{node.lineno} {node.name}: {length} lines"] if length >= 50 else []
    assert offenders == []


def test_docstrings_are_sentences() -> None:
    """None says only whose it is: "Of the next run."."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    offenders = [
        f"{name}: {text.splitlines()[0]}"
        for name, tree in _trees().items()
        for node in ast.walk(tree)
        if isinstance(node, documented) and (text := ast.get_docstring(node) or "").startswith("Of ")
    ]
    counts = Counter(one.split("/")[0] for one in offenders)
    assert not {folder for folder in counts if counts[folder] > OF_TO_GO.get(folder, 0)}, offenders


def test_the_library_logs_and_does_not_print() -> None:
    """Applications send what `latentrt` logs where they like; the command line prints it."""
    offenders = [
        f"{name}:{node.lineno}"
        for name, tree in _product().items()
        if name.split("/")[0] in ("engines", "checkpoints", "adapters", "runtime", "serve", "export")
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in PRINTING)
        or (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "print"
            and "file" not in {keyword.arg for keyword in node.keywords}
        )
    ]
    assert offenders == []


PICTURE = f"""
import json, sys
for name in {sorted(HEAVY)}:
    sys.modules[name] = None  # an import of it raises ImportError
from latentrt.runtime import Pipeline
with Pipeline.open("demo") as pipe:
    result = pipe("a red circle on a blue background", num_inference_steps=2, seed=1, output_type="np")
assert result.images.shape == (1, 128, 128, 3)
print(json.dumps(sorted(sys.modules)))
"""


def test_a_picture_on_the_cpu_needs_neither_torch_nor_the_gpus_modules() -> None:
    command = [sys.executable, "-W", "error", "-c", PICTURE]
    run = subprocess.run(command, check=True, timeout=60, stdout=subprocess.PIPE, text=True)
    loaded: list[str] = json.loads(run.stdout)
    to_go = {"latentrt.engines.onnxruntime.cuda_backend"}
    assert {name for name in loaded if name.startswith(NOT_FOR_CPU)} <= to_go


def test_the_tables_name_every_folder() -> None:
    assert set(ARROWS) == set(FOLDERS)


def test_circles_and_arrows_that_run_back_are_found(tmp_path: Path) -> None:
    files = {
        "engines/low.py": "",
        "engines/room/__init__.py": "",
        "engines/room/a.py": "from ..low import x",
        "engines/room/b.py": "def late():\n    from ..top import x",
        "engines/top.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .room.b import x, y",
        "runtime/loose.py": "import latentrt.engines.top\nfrom latentrt.engines import low",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = [name.removesuffix(".py") for name in files]
    imports = read_imports(tmp_path)
    assert {str(one) for one in imports} == {
        "engines/room/a -> engines/low: x",
        "engines/room/b -> engines/top: x (lazy)",
        "engines/top -> engines/room/b: x (types)",
        "engines/top -> engines/room/b: y (types)",
        "runtime/loose -> engines/low: low",
        "runtime/loose -> engines/top: ",
    }
    drawing = draw_folder("engines", imports, names)
    assert (drawing.entries, len(drawing.arrows)) == (["low", "room", "top"], 3)
    assert (drawing.circles, drawing.back, drawing.floors) == ([{"room", "top"}], [("room", "top")], 3)
    assert draw_files(imports, names).circles == [{"engines/room/b", "engines/top"}]
    assert draw_folder("", imports, names).circles == []
