"""Why tests of the provider are skipped, and with which command they are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cuda import environment, libraries


def test_without_the_environment_the_command_that_makes_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PYTHON", environment.ROOT / ".venv-nowhere" / "bin" / "python")
    command = environment.install_command()
    assert command.startswith("python3 -m venv .venv-cuda && ")
    assert environment.missing() == f"there is no .venv-nowhere/bin/python: {command}"


def test_without_a_compiler_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(tool: str) -> str | None:
        return None if tool == "cc" else f"/usr/bin/{tool}"

    monkeypatch.setattr(shutil, "which", without)
    assert libraries.missing() == "there is no cc: apt install gcc"
    monkeypatch.setattr(environment, "PYTHON", Path(__file__))
    monkeypatch.setattr(environment, "ROOT", Path(__file__).parents[2])
    assert environment.missing() == libraries.missing()


def test_a_child_that_fails_shows_its_errors() -> None:
    with pytest.raises(AssertionError, match="ended with 3:\nlost"):
        environment.run(["bash", "-c", "echo lost >&2; exit 3"], {})


def test_ci_makes_the_environment() -> None:
    script = (environment.ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ".venv-cuda" in script
    assert "CONTRIBUTING.md" in script
