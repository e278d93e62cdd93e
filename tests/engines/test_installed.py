"""The command that adds an extra, for every way in which pip notes an installation (PEP 610)."""

import json
import shlex
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from latentrt.engines import installed
from latentrt.engines.backends import BACKENDS
from latentrt.engines.installed import install_command, latentrt_version, upgrade_command
from latentrt.runtime.pipeline import Pipeline


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Have pip's note say something else; None: there is none."""

    def note(content: Any) -> None:
        class Distribution:
            def read_text(self, name: str) -> str | None:
                assert name == "direct_url.json"
                return content if content is None or isinstance(content, str) else json.dumps(content)

        monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution())
        installed._source.cache_clear()  # pyright: ignore[reportPrivateUsage]

    yield note
    installed._source.cache_clear()  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    "content", [None, "", "{}", "no JSON", {"url": "file:///no/such/folder", "dir_info": {}}]
)
def test_from_an_index(noted: Callable[[Any], None], content: Any) -> None:
    noted(content)
    assert install_command("cpu") == 'pip install "latentrt[cpu]"'
    *command, word = shlex.split(install_command("cpu,export", "--upgrade"))
    assert command == ["pip", "install", "--upgrade"]
    assert (Requirement(word).name, Requirement(word).extras) == ("latentrt", {"cpu", "export"})


@pytest.mark.parametrize(("editable", "words"), [(True, ["-e"]), (False, [])])
def test_from_a_checkout(
    noted: Callable[[Any], None], tmp_path: Path, editable: bool, words: list[str]
) -> None:
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").touch()
    noted({"url": checkout.as_uri(), "dir_info": {"editable": editable} if editable else {}})
    assert shlex.split(install_command("cuda")) == ["pip", "install", *words, f"{checkout}[cuda]"]


@pytest.mark.parametrize(
    ("note", "url"),
    [
        (
            {
                "url": "https://example.org/latentrt.git",
                "vcs_info": {"vcs": "git", "commit_id": "0123abc"},
            },
            "git+https://example.org/latentrt.git@0123abc",
        ),
        (
            {
                "url": "https://example.org/latentrt.git",
                "vcs_info": {"vcs": "git", "commit_id": "0123abc", "requested_revision": "main"},
            },
            "git+https://example.org/latentrt.git@main",
        ),
        (
            {"url": "file:///x/latentrt-0.1.0-py3-none-any.whl", "archive_info": {}},
            "file:///x/latentrt-0.1.0-py3-none-any.whl",
        ),
    ],
)
def test_from_elsewhere(noted: Callable[[Any], None], note: dict[str, Any], url: str) -> None:
    noted(note)
    *command, word = shlex.split(install_command("tensorrt"))
    assert command == ["pip", "install"]
    assert (Requirement(word).url, Requirement(word).extras) == (url, {"tensorrt"})


def test_a_newer_release(noted: Callable[[Any], None], tmp_path: Path) -> None:
    noted(None)
    assert upgrade_command() == 'pip install --upgrade "latentrt"'
    (tmp_path / "pyproject.toml").touch()
    noted({"url": tmp_path.as_uri(), "dir_info": {}})
    assert shlex.split(upgrade_command()) == ["git", "-C", str(tmp_path), "pull"]


def test_backends_say_the_same(noted: Callable[[Any], None]) -> None:
    noted(None)
    assert {row.install for row in BACKENDS.values()} == {
        f'pip install "latentrt[{row.extra}]"' for row in BACKENDS.values()
    }


def test_what_only_lies_on_the_path_draws_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a checkout that was copied to another machine: nothing there knows a version."""
    assert latentrt_version() == version("latentrt")

    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    with monkeypatch.context() as patched, Pipeline.open("demo", backend="onnxruntime") as pipe:
        patched.setattr("importlib.metadata.version", unknown)
        latentrt_version.cache_clear()
        result = pipe("a red circle", num_inference_steps=2, height=64, width=64)
        assert result.producer["latentrt"] == latentrt_version() == "unknown"
    latentrt_version.cache_clear()
