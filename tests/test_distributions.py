"""The source distribution is the repository, and what an index shows of it leads somewhere."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_IGNORED = (
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    ".venv*",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of the sources, and the unpacked archive that was built of it."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*_IGNORED, ".git", "*.log"))
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, timeout=300, capture_output=True)
    (archive,) = folder.glob("latentrt-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return copy, unpacked


def _files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".egg-info" not in path.as_posix()
    }


def test_the_source_distribution_is_complete(unpacked: tuple[Path, Path]) -> None:
    copy, archive = map(_files, unpacked)
    assert archive - copy <= {"PKG-INFO", "setup.cfg"}
    assert copy - archive == set()


def test_the_long_description_has_no_links_into_the_repository(unpacked: tuple[Path, Path]) -> None:
    """An index shows relative links and pictures as dead ones."""
    text = (unpacked[1] / "PKG-INFO").read_text(encoding="utf-8")
    assert 'pip install "latentrt[cpu]"' in text
    assert not re.findall(r"\]\((?!https://)[^)]*\)", text)
