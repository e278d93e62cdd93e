"""`latentrt serve` as a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

WAIT_S = 60.0
WORDS = ("--backend", "onnxruntime", "--device", "cpu", "--rows", "2")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers, and a client of it."""

    url: str
    process: subprocess.Popen[str]
    client: httpx.Client
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "latentrt.cli", "serve", *WORDS, *words]


def environment(**changes: str) -> dict[str, str]:
    """This process's, without keys of its own."""
    return {**{name: value for name, value in os.environ.items() if name != "LATENTRT_API_KEYS"}, **changes}


@contextmanager
def served(folder: Path, *words: str, port: int = 0) -> Generator[Served]:
    """Start it and wait until it answers. What it writes on standard error is in `folder`."""
    log = folder / "server.log"
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command("--json", "--port", str(port), *words),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(LATENTRT_CACHE=str(folder / "cache")),
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text(encoding="utf-8")
        url = json.loads(line)["url"]
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            yield Served(url=url, process=process, client=client, log=log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(WAIT_S)
        assert process.stdout is not None
        process.stdout.close()
