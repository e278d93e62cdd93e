"""A real Triton server of an environment of its own, and its client's program there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts.environment import PYTHON, ROOT

READY_S = 120.0


def _packages() -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return Path(
        subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass(frozen=True)
class Triton:
    """A running server."""

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    metrics: int
    log: Path

    def client(self, *words: str, stdin: Any = None, timeout: float = 300) -> Any:
        """What the client's program prints, as JSON."""
        program = [
            PYTHON,
            ROOT / "tests" / "hosts" / "triton_client.py",
            str(self.grpc),
            str(self.http),
            *words,
        ]
        done = subprocess.run(
            program, input=json.dumps(stdin), capture_output=True, text=True, timeout=timeout, cwd="/"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    def metric(self, name: str, **labels: str) -> float:
        """A sum of one of its metrics."""
        url = f"http://127.0.0.1:{self.metrics}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [
            line for line in lines if line.startswith(f"{name}{{") and all(one in line for one in wanted)
        ]
        return sum(float(line.rpartition(" ")[2]) for line in found)


@contextmanager
def triton(repository: Path, folder: Path, more: Sequence[str] = ()) -> Iterator[Triton]:
    """A server of a repository, until the block ends; its log is in the folder."""
    server = _packages() / "pytriton" / "tritonserver"
    version = ".".join(
        subprocess.run([PYTHON, "-V"], capture_output=True, text=True).stdout.split()[1].split(".")[:2]
    )
    backend = folder / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    stub = backend / "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", stub)
    stub.chmod(0o755)
    code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    python = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    libraries = [server.parent.parent / "nvidia_pytriton.libs", server / "external_libs", python]
    http, grpc, metrics = (_free_port() for _ in range(3))
    log = folder / "triton.log"
    words = [
        str(server / "bin" / "tritonserver"),
        *("--model-repository", str(repository), "--backend-directory", str(backend.parent)),
        "--disable-auto-complete-config",
        *("--http-address", "127.0.0.1", "--http-port", str(http)),
        *("--grpc-address", "127.0.0.1", "--grpc-port", str(grpc)),
        *("--metrics-address", "127.0.0.1", "--metrics-port", str(metrics)),
        *more,
    ]
    variables = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "LATENTRT_CACHE": str(folder / "cache"),
    }
    variables.pop("PYTHONPATH", None)
    variables["PATH"] = f"{PYTHON.parent}:{variables['PATH']}"  # where the stub looks for its Python
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=folder)
    try:
        _wait(process, http, log)
        yield Triton(process, http, grpc, metrics, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], http: int, log: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-4000:])
