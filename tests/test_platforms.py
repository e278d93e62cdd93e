"""What other systems do differently, as far as it can be had here: see docs/platforms.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentrt.engines.errors import StorageError
from latentrt.export.target import complete


@pytest.fixture
def windows_renames(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """`os.replace` as Windows has it: no folder goes onto another, nor moves while a file in it is open.

    Folders with open files are put into the list.
    """
    replace, refused = os.replace, list[Path]()

    def rename(source: Path, target: Path) -> None:
        if Path(target).is_dir() or Path(source) in refused:
            raise PermissionError(13, "Access is denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", rename)
    return refused


def _write(package: Path, text: str) -> None:
    with complete(package, overwrite=True) as folder:
        (folder / "manifest.json").write_text(text, encoding="utf-8")


@pytest.mark.usefixtures("windows_renames")
@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a package"])
def test_an_export_replaces_what_was_there(before: str, tmp_path: Path) -> None:
    package = tmp_path / "package"
    if before != "nothing":
        package.mkdir()
    if before == "a package":
        (package / "manifest.json").write_text("old", encoding="utf-8")
    _write(package, "new")
    assert (package / "manifest.json").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_an_export_that_cannot_be_put_in_place_leaves_what_was_there(
    windows_renames: list[Path], tmp_path: Path
) -> None:
    """A program holds a file of the old package open."""
    package = tmp_path / "package"
    _write(package, "old")
    windows_renames.append(package)
    with pytest.raises(StorageError, match="Access is denied"):
        _write(package, "new")
    assert (package / "manifest.json").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_console_without_the_prompts_letters(tmp_path: Path) -> None:
    """Windows' redirected output is cp1252: the picture is there, and so is its line."""
    done = subprocess.run(
        [sys.executable, "-m", "latentrt", "generate", "红色 circle", "--steps", "2", "--seed", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(rb"\u7ea2\u8272-circle-1.png  (")
    assert [path.name for path in tmp_path.iterdir()] == ["红色-circle-1.png"]
