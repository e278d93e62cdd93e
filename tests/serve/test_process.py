"""The server as a process: how it starts, how it ends, and what a hard end leaves (reports 42 and 45)."""

from __future__ import annotations

import importlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from latentrt import UsageError
from latentrt.serve import run
from tests.serve.process import WAIT_S, Served, command, environment, served

cli_serve: Any = importlib.import_module("latentrt.cli.serve")  # the package has the verb under that name
PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
LONG: dict[str, Any] = {**SMALL, "num_inference_steps": 150, "num_images_per_prompt": 10}


def until(true: Callable[[], Any], seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def post(at: Served, **fields: Any) -> str:
    answer = at.client.post("/v1/jobs", json={**SMALL, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


class Stream(threading.Thread):
    """Reads a job's events until they end."""

    def __init__(self, at: Served, job: str) -> None:
        super().__init__(daemon=True)
        self.kinds: list[str] = []
        self.last: dict[str, Any] = {}
        self.error: Exception | None = None
        self._address = f"{at.url}/v1/jobs/{job}/events"
        self.start()
        until(lambda: self.kinds)

    def run(self) -> None:
        try:
            with httpx.stream("GET", self._address, timeout=WAIT_S) as answer:
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        self.kinds.append(value)
                    elif name == "data":
                        self.last = json.loads(value)
        except httpx.HTTPError as error:
            self.error = error


# ── the end that is asked for ──────────────────────────────────────────────────────────────────────


def test_at_sigterm_jobs_end_and_streams_are_told(tmp_path: Path) -> None:
    """Report 45: three streams and two jobs, which are done within the grace."""
    with served(tmp_path, "--grace", "60") as at:
        jobs = [post(at, num_inference_steps=60, num_images_per_prompt=count) for count in (1, 2)]
        streams = [Stream(at, job) for job in (*jobs, jobs[0])]
        at.process.send_signal(signal.SIGTERM)
        until(lambda: at.client.get("/health/ready").status_code == 503)
        assert at.client.get("/health/live").status_code == 200
        refused = at.client.post("/v1/jobs", json=SMALL)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "draining"
        for stream in streams:
            stream.join(WAIT_S)
            assert stream.error is None
            assert stream.kinds[-1] == "completed"
        assert at.process.wait(WAIT_S) == 0


def test_after_the_grace_jobs_are_cancelled_and_streams_are_told(tmp_path: Path) -> None:
    with served(tmp_path, "--grace", "0.3", "--at-once", "1") as at:
        jobs = [post(at, **LONG), post(at, **LONG)]
        streams = [Stream(at, job) for job in (*jobs, jobs[0])]
        at.process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.join(WAIT_S)
            assert stream.error is None
            assert stream.kinds[-1] == "cancelled"
            assert stream.last["reason"] == "shutdown"
        assert at.process.wait(WAIT_S) == 0


def test_a_second_signal_cancels_and_tells_who_waits(tmp_path: Path) -> None:
    with served(tmp_path, "--grace", "600") as at:
        stream = Stream(at, post(at, **LONG))
        answers: list[httpx.Response] = []

        def wait() -> None:
            headers = {"prefer": "wait=60"}
            answers.append(httpx.post(f"{at.url}/v1/jobs", json=LONG, headers=headers, timeout=WAIT_S))

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: len(at.client.get("/v1/jobs").json()["jobs"]) == 2)
        at.process.send_signal(signal.SIGINT)
        until(lambda: at.client.get("/health/ready").status_code == 503)
        assert at.process.poll() is None
        at.process.send_signal(signal.SIGINT)
        assert at.process.wait(20) == 0
        for one in (stream, thread):
            one.join(WAIT_S)
        assert stream.kinds[-1] == "cancelled"
        assert (answers[0].status_code, answers[0].json()["status"]) == (200, "cancelled")


# ── the end that is not ────────────────────────────────────────────────────────────────────────────


def test_a_killed_server_leaves_errors_no_files_and_starts_again(tmp_path: Path) -> None:
    with served(tmp_path) as at:
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        job = post(at, **LONG)
        stream = Stream(at, job)
        waiting: list[Exception] = []

        def wait() -> None:
            try:
                httpx.post(f"{at.url}/v1/jobs", json=LONG, headers={"prefer": "wait=60"}, timeout=WAIT_S)
            except httpx.TransportError as error:
                waiting.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: len(at.client.get("/v1/jobs").json()["jobs"]) == 2)
        port = at.port
        at.process.kill()
        thread.join(WAIT_S)
        stream.join(WAIT_S)
        assert isinstance(stream.error, httpx.TransportError)
        assert len(waiting) == 1
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    with served(tmp_path, port=port) as again:
        answer = again.client.post("/v1/jobs", json=SMALL, headers={"prefer": "wait=60"})
        assert answer.json()["status"] == "completed"
        assert again.client.get(f"/v1/jobs/{job}").status_code == 404


# ── what is said ───────────────────────────────────────────────────────────────────────────────────


def test_it_says_where_it_is_and_what_it_does() -> None:
    process = subprocess.Popen(
        command("--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("demo at http://127.0.0.1:")
        url = said.split()[-1]
        httpx.post(f"{url}/v1/jobs", json=SMALL, headers={"prefer": "wait=60"}, timeout=WAIT_S)
        httpx.get(f"{url}/health/live")
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    lines = [line.removeprefix("latentrt: ").split(" ") for line in errors.splitlines()]
    assert [words[0] for words in lines if words[0] in ("job", "request")] == ["job", "request"]
    assert PROMPT not in errors


def test_the_bar_is_gone_when_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a log would have a line about the warm-up every half minute, for ever."""
    told: list[str] = []

    @contextmanager
    def bar(*, enabled: bool) -> Generator[Any]:
        yield lambda what, done, total: None
        told.append("gone")

    monkeypatch.setattr(cli_serve, "progress_bar", bar)
    monkeypatch.setattr(run, "serve", lambda *_, **__: told.append("answers"))
    cli_serve.serve([], backend="onnxruntime", device="cpu", rows=2, port=0)
    assert told == ["gone", "answers"]


def test_every_call_may_have_a_fixed_number_of_rows() -> None:
    options = cli_serve._options(None, 4, at_once=1)
    assert (options.rows, options.sizes) == (4, (4,))
    assert cli_serve._options(4, 4).sizes == (4,)
    assert cli_serve._options(4, None).sizes is None
    with pytest.raises(UsageError, match="one number of rows"):
        cli_serve._options(2, 4)


# ── what does not start ────────────────────────────────────────────────────────────────────────────


def start(*words: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        command("--json", *words),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=environment(),
        check=False,
    )
    return done.returncode, json.loads(done.stdout)["error"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_key(host: str) -> None:
    """Report 42."""
    code, error = start("--host", host, "--port", "0")
    assert code == error["exit_code"] == 2
    assert "without a key" in error["found"]
    assert "--key-file" in error["fix"]


def test_with_a_key_it_listens_on_every_address(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef-secret\n", encoding="utf-8")
    keys.chmod(0o600)
    with served(tmp_path, "--host", "0.0.0.0", "--key-file", str(keys)) as at:
        url = f"http://127.0.0.1:{at.port}"
        assert httpx.get(f"{url}/v1/jobs").status_code == 401
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/v1/jobs", headers={"x-api-key": "0123456789abcdef-secret"}).is_success
        at.process.send_signal(signal.SIGTERM)
        assert at.process.wait(WAIT_S) == 0
        assert "secret" not in at.log.read_text(encoding="utf-8")


def test_metrics_may_be_open(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef-secret\n", encoding="utf-8")
    keys.chmod(0o600)
    with served(tmp_path, "--key-file", str(keys), "--open-metrics") as at:
        assert "latentrt_ready 1.0" in at.client.get("/metrics").text
        assert at.client.get("/v1/jobs").status_code == 401


def test_a_taken_port_names_the_next_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = start("--port", str(port))
    assert code == 2
    assert error["found"] == f"port {port} is taken"
    other = int(error["fix"].rpartition(" ")[2])
    assert port < other <= port + 100
    socket.create_server(("127.0.0.1", other)).close()
