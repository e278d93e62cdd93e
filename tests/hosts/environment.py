"""The environment of the programs that latentrt runs inside of: they want other packages than the tests."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv-hosts" / "bin" / "python"


def missing() -> str:
    """Why it cannot be used; "" where it can."""
    if sys.platform != "linux":
        return "Triton is Linux' alone"
    if not PYTHON.exists():
        return "there is no .venv-hosts: CONTRIBUTING.md has the command that makes it"
    return ""
