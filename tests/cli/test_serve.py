"""What `latentrt serve` says before it serves."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from latentrt import UsageError
from latentrt.cli.serve import _check_installed, _say_ready  # pyright: ignore[reportPrivateUsage]
from latentrt.serve.run import listen
from latentrt.serve.server import named


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def test_names_of_models() -> None:
    found = named(["demo", "folder/model.v2.safetensors", "short=folder/x=y", "folder/x=y", "=z"])
    assert found == {
        "demo": "demo",
        "model.v2": "folder/model.v2.safetensors",
        "short": "folder/x=y",
        "x=y": "folder/x=y",
        "=z": "=z",
    }
    with pytest.raises(UsageError, match="two models are called a; expected a name for each"):
        named(["x/a.safetensors", "a=y"])


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_installed()
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in ("uvicorn", "multipart") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UsageError, match="the server needs uvicorn, multipart") as error:
        _check_installed()
    assert error.value.fix.startswith("pip install")
    assert "serve]" in error.value.fix


def test_a_taken_port_names_a_free_one(taken: int) -> None:
    with pytest.raises(UsageError, match=f"port {taken} is taken") as error:
        listen("127.0.0.1", taken)
    free = int(error.value.fix.rpartition(" ")[2])
    listen("127.0.0.1", free).close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_none_of_this_machines(host: str) -> None:
    with pytest.raises(UsageError, match=f"{host}:0 cannot be listened on"):
        listen(host, 0)


def test_what_is_said_when_it_answers(capsys: pytest.CaptureFixture[str]) -> None:
    _say_ready("http://127.0.0.1:1", ["demo", "b"], as_json=True)
    assert capsys.readouterr().out == '{"url": "http://127.0.0.1:1", "models": ["demo", "b"]}\n'
    _say_ready("http://127.0.0.1:1", ["demo", "b"], as_json=False)
    assert capsys.readouterr().out == "demo, b at http://127.0.0.1:1\n"
