"""The house rules that a machine can check: import arrows, budgets, names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("engines", "runtime", "export", "cli", "benchmarks", "demo")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# folder -> folders it may import from, besides itself
ARROWS = {
    "engines": set[str](),
    "runtime": {"engines"},
    "export": {"engines"},
    "demo": {"engines", "runtime", "export"},
    "benchmarks": {"engines", "runtime", "export", "demo"},
    "cli": {"engines", "runtime", "export", "benchmarks", "demo"},
}
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir"}
MAY_IMPORT = {  # folder -> heavy libraries it may import
    "export": HEAVY,
    "demo": {"torch", "diffusers", "transformers"},
    "benchmarks": HEAVY,
    "cli": {"torch"},
}
# Lowering a graph for one provider takes a graph library: `[cuda]` brings it, imported on first use.
LOWERING = "engines/onnxruntime/lowering/"
# What checks and measures graphs at export time runs them.
RUN_GRAPHS = {"export/verify.py", "export/precision/ranges.py"}
ENGINE_LIBRARIES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}


def _imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, lazily or not."""
    package = path.relative_to(ROOT).parts[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(ROOT).parts) - 1
            if node.level == 0:
                names.add(node.module or "")
            elif node.level <= depth:
                names.add(f"latentrt.{package}")
            else:
                names |= {f"latentrt.{node.module or alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_arrows(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT.get(folder, set()) | (
        {"onnx_ir"} if path.relative_to(ROOT).as_posix().startswith(LOWERING) else set()
    )
    for name in _imports(path):
        top, *rest = name.split(".")
        if top == "latentrt":
            assert rest[0] == folder or rest[0] in ARROWS[folder], f"{path}: {name}"
        assert top not in HEAVY or top in allowed, f"{path}: {name}"
        if top in ENGINE_LIBRARIES:
            runs_graphs = path.relative_to(ROOT).as_posix() in RUN_GRAPHS
            assert folder in ("engines", "benchmarks") or runs_graphs, path


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_budgets(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
    if "tests" in path.parts:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length < 50, f"{path}:{node.lineno} {node.name} has {length} lines of code"


BLOCKED = """
import sys
for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir"):
    sys.modules[name] = None  # an import of it raises ImportError
from latentrt.runtime import Pipeline
with Pipeline.open("demo") as pipe:
    result = pipe("a red circle on a blue background", num_inference_steps=2, seed=1, output_type="np")
assert result.images.shape == (1, 128, 128, 3)
"""


def test_runtime_works_with_torch_blocked() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", BLOCKED], check=True, timeout=60)
