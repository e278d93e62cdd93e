"""The environment with onnxruntime-gpu beside the tests' own, and questions to it.

Both wheels of ONNX Runtime write into one folder, so the CUDA build cannot be installed where the tests run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.cuda import libraries

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-cuda" / "bin" / "python"
_COMMAND = re.compile(r"^ *(python3 -m venv \.venv-cuda .*)$", re.MULTILINE)


def install_command() -> str:
    """The command of CONTRIBUTING.md that makes the environment."""
    found = _COMMAND.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert found, "CONTRIBUTING.md has no command for .venv-cuda"
    return found[1]


def missing() -> str:
    """Why the provider cannot be tested here, with what mends it; "" if it can."""
    if not PYTHON.exists():
        return f"there is no {PYTHON.relative_to(ROOT)}: {install_command()}"
    return libraries.missing()


def build(folder: Path) -> Path:
    """The stand-in's libraries for the provider that is installed there."""
    run([str(PYTHON), "-m", "tests.cuda.libraries", str(folder)], {})
    return folder


def ask(built: Path, *arguments: str) -> Any:
    """What the worker answers, run on the libraries in `built`."""
    output = run([str(PYTHON), "-m", "tests.cuda.worker", *arguments], {"LD_LIBRARY_PATH": str(built)})
    return json.loads(output.splitlines()[-1])


def run(command: list[str], variables: dict[str, str]) -> str:
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return done.stdout
