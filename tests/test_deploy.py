"""The container and the service: no test can run one, so their texts are read, and what they call is run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.cli.serve import PORT
from latentrt.serve import run
from latentrt.serve.door.guard import Guard
from tests.serve.live import live, open_demo
from tests.test_advice import parses

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
UID = 10001
TARGETS = {"cpu": "cpu", "cuda": "cuda"}  # stage -> extra


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each with its words; lines that go on are joined."""
    text = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, words) for name, _, words in (line.partition(" ") for line in joined.splitlines())]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Those that a stage has, with those of the stages below it."""
    found: dict[str, list[tuple[str, str]]] = {}
    own: list[tuple[str, str]] = []
    for name, words in instructions():
        if name == "FROM":
            below, _, stage = words.partition(" AS ")
            own = found[stage] = list(found.get(below, []))
        else:
            own.append((name, words))
    return found


def of(stage: str, name: str) -> list[str]:
    return [words for found, words in stages()[stage] if found == name]


# ── the container ──────────────────────────────────────────────────────────────────────────────────


def test_the_cpus_stage_is_the_one_that_is_built_by_default() -> None:
    assert list(stages())[-1] == "cpu"
    assert set(TARGETS) < set(stages())


@pytest.mark.parametrize("stage", TARGETS)
def test_a_stage_runs_as_nobody_and_ends_by_sigterm(stage: str) -> None:
    assert stages()[stage][-1] == ("USER", f"{UID}:{UID}"), "nothing is done as root behind it"
    assert f"--uid {UID}" in " ".join(of(stage, "RUN"))
    assert of(stage, "STOPSIGNAL") == ["SIGTERM"]
    assert of(stage, "EXPOSE") == [str(PORT)]


@pytest.mark.parametrize("stage", TARGETS)
def test_its_command_is_one_that_the_program_takes(stage: str) -> None:
    (entry,), (rest,) = of(stage, "ENTRYPOINT"), of(stage, "CMD")
    words = [*json.loads(entry), *json.loads(rest)]  # exec form: a shell would keep the signal to itself
    parses(words)
    parses([*json.loads(entry), "other=/models/other", "--key-file", "/run/secrets/keys"])
    assert words[words.index("--port") + 1] == str(PORT)


@pytest.mark.parametrize(("stage", "extra"), TARGETS.items())
def test_it_installs_one_backend_and_the_server(stage: str, extra: str) -> None:
    extras = re.findall(r"\[([a-z,]+)\]", " ".join(of(stage, "RUN")))
    assert extras == [f"{extra},serve"]
    assert set(extras[0].split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_nothing_else_is_fetched_and_no_key_is_baked_in() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    names = {name for name, _ in instructions()}
    assert names <= {
        *("ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"),
        *("ENTRYPOINT", "CMD", "USER"),
    }
    for word in ("curl", "wget", "apt-get", ":latest", "sudo", "chmod 777"):
        assert word not in text
    assert not [words for name, words in instructions() if name in ("ENV", "ARG") and "KEY" in words]
    assert [words for name, words in instructions() if name == "FROM"][:2] == [
        "${BASE} AS wheel",
        "${BASE} AS base",
    ]


def test_every_package_is_copied() -> None:
    copied = {word for words in of("wheel", "COPY") for word in words.split()[:-1]}
    folders = {path.split("/")[0] for path in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert copied == {*folders, "pyproject.toml", *PROJECT["project"]["license-files"]}
    assert all((ROOT / name).exists() for name in copied)


def _wheel(source: Path, target: Path) -> set[str]:
    target.mkdir()
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_what_is_copied_makes_the_same_wheel(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "*.log")
    shutil.copytree(ROOT, whole, ignore=ignored)
    part.mkdir()
    for words in of("wheel", "COPY"):
        *names, target = words.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, part / target, ignore=ignored)
            else:
                shutil.copy(ROOT / name, part / target)
    assert _wheel(part, tmp_path / "a") == _wheel(whole, tmp_path / "b")


@pytest.mark.parametrize("alive", [True, False])
def test_the_health_check_tells_a_server_that_draws(alive: bool) -> None:
    (words,) = of("cpu", "HEALTHCHECK")
    program, *rest = json.loads(words[words.index("[") :])
    assert program == "python"
    with open_demo() as pipe, live(pipe) as at:
        if not alive:
            at.server.restarts["demo"] = 3
            at.server.workers["demo"].end()
        rest = [word.replace(f"127.0.0.1:{PORT}", at.url.removeprefix("http://")) for word in rest]
        assert at.url in rest[-1]
        assert (subprocess.run([sys.executable, *rest], capture_output=True).returncode == 0) == alive


# ── the service ────────────────────────────────────────────────────────────────────────────────────


def service() -> Iterator[tuple[str, str]]:
    for line in (ROOT / "deploy/latentrt.service").read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            name, equals, value = line.partition("=")
            assert equals, line
            yield name, value


def test_the_service_starts_what_the_program_takes() -> None:
    unit = dict(service())
    words = shlex.split(unit["ExecStart"])
    assert words[0].startswith("/")
    assert words[0].endswith("/bin/latentrt")
    parses(["latentrt", *words[1:]])
    name, _, path = unit["LoadCredential"].partition(":")
    assert words[words.index("--key-file") + 1] == f"${{CREDENTIALS_DIRECTORY}}/{name}"
    assert path.startswith("/etc/")


def test_the_service_waits_longer_than_the_server_takes_to_end() -> None:
    unit = dict(service())
    words = shlex.split(unit["ExecStart"])
    grace, closing = float(words[words.index("--grace") + 1]), run.settings(Guard.__new__(Guard))
    assert closing.timeout_graceful_shutdown is not None
    assert float(unit["TimeoutStopSec"]) > grace + closing.timeout_graceful_shutdown
    assert (unit["KillSignal"], unit["KillMode"]) == ("SIGTERM", "mixed")
    dockerfile = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    (stop,) = re.findall(r"--stop-timeout (\d+)", dockerfile)
    assert float(stop) > run.GRACE_S + closing.timeout_graceful_shutdown


def test_the_service_may_little() -> None:
    unit = dict(service())
    assert (
        unit.items()
        >= {
            "DynamicUser": "yes",
            "NoNewPrivileges": "yes",
            "CapabilityBoundingSet": "",
            "ProtectSystem": "strict",
            "ProtectHome": "yes",
            "PrivateDevices": "yes",
            "PrivateTmp": "yes",
            "RestrictNamespaces": "yes",
            "SystemCallFilter": "~@privileged",
            "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
            "RestartPreventExitStatus": "2 3",
        }.items()
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_it(tmp_path: Path) -> None:
    text = (ROOT / "deploy/latentrt.service").read_text(encoding="utf-8")
    program = dict(service())["ExecStart"].split()[0]
    unit = tmp_path / "latentrt.service"
    unit.write_text(text.replace(program, sys.executable), encoding="utf-8")  # one that is there
    command = ["systemd-analyze", "verify", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "latentrt.service" in line] == []
