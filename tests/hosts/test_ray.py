"""Ray on this machine: replicas that come, go and are killed; files of prompts whose workers are killed."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
from PIL import Image

from latentrt import Pipeline, UsageError
from latentrt.benchmarks.verbs.hosts import measure_hosts
from latentrt.engines.errors import StorageError
from latentrt.hosts.ray.bulk import draw_all, failure, main, name_of, odd, rows_of
from latentrt.hosts.ray.serving import ByPixelSteps, Replica, Settings
from tests.benchmarks.stand_in_side import PACKAGE, TASK
from tests.benchmarks.test_hosts import CASE as FEW_STEPS
from tests.benchmarks.test_hosts import ONE_ROUND
from tests.hosts.environment import PYTHON, ROOT, missing
from tests.serve.live import open_demo

REASON = missing()
needs_ray = pytest.mark.skipif(bool(REASON), reason=REASON)
PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 4}
WAIT_S = 300.0


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


def until(true: Callable[[], Any], seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.1)


def processes(words: str) -> list[int]:
    """Those of Ray whose title has the words."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if title.startswith("ray::") and words in title:
                found.append(int(folder.name))
    return found


# ── settings ───────────────────────────────────────────────────────────────────────────────────────


def test_settings_are_texts_or_values() -> None:
    given = {"models": "a,b=c", "num_gpus": "1", "rows": "8", "pixel_steps": 5}
    assert Settings.read(given) == Settings(models="a,b=c", num_gpus=1.0, rows=8, pixel_steps=5.0)
    with pytest.raises(UsageError, match="there is no setting 'gpus'"):
        Settings.read({"gpus": 1})
    with pytest.raises(UsageError, match="rows is 'many'"):
        Settings.read({"rows": "many"})
    for name, value in (
        ("pixel_steps", 0),
        ("pixel_steps", "nan"),
        ("rows", -4),
        ("at_once", 0),
        ("queue", 0),
    ):
        with pytest.raises(UsageError, match=f"{name} is "):
            Settings.read({name: value})
    with pytest.raises(UsageError, match="key_file is 'none', which is no file"):
        Settings.read({"key_file": "none"})
    with pytest.raises(UsageError, match="two models are called a"):
        Settings.read({"models": "a,a"})


@pytest.mark.parametrize(
    ("there", "wanted"), [({}, 1), ({"a": 0.0}, 1), ({"a": 90.0, "b": 20.0}, 2), ({"a": 1000.0}, 10)]
)
def test_a_replica_for_so_many_pixel_steps(there: dict[str, float], wanted: int) -> None:
    class Context:
        aggregated_metrics = {"pixel_steps": there} if there else None

    assert ByPixelSteps(100)(Context()) == (wanted, {})


# ── Ray Serve ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def served(**settings: Any) -> Iterator[httpx.Client]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    program = [
        str(PYTHON),
        str(ROOT / "tests" / "hosts" / "ray_serve_program.py"),
        str(port),
        json.dumps(settings),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert any(line == b"ready\n" for line in process.stdout), "it has ended"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
            yield client
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def ask(client: httpx.Client, seed: int, **fields: Any) -> Any:
    answer = client.post("/v1/images/generations", json={**SMALL, "seed": seed, **fields})
    ours = answer.headers.get("content-type", "").startswith("application/json")
    return answer.status_code, answer.json() if ours else answer.text  # of Ray's proxy


def pixels(told: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"]))))


def alone(pipe: Pipeline, seed: int, steps: int = 4) -> np.ndarray:
    return pipe(PROMPT, width=64, height=64, num_inference_steps=steps, seed=seed, output_type="np").images[0]


@needs_ray
def test_replicas_come_go_and_are_killed(pipe: Pipeline) -> None:
    """From one to two under load, one is killed with kill -9, and back to one: nothing is lost or wrong."""
    settings = {"max_replicas": 2, "pixel_steps": 64 * 64 * 200, "look_s": 0.5, "idle_s": 3, "rows": 4}
    with served(**settings) as client, ThreadPoolExecutor(24) as threads:
        assert client.get("/health/ready").json() == {"status": "ready"}
        np.testing.assert_array_equal(pixels(ask(client, 1)[1]), alone(pipe, 1))
        status, told = ask(client, 1, sampler="fast")
        assert (status, "fast" in told["error"]["message"]) == (400, True)
        with pytest.raises(httpx.ReadTimeout):
            client.post(
                "/v1/images/generations", json={**SMALL, "num_inference_steps": 150, "n": 10}, timeout=1.0
            )
        until(lambda: 'latentrt_cancelled_total{reason="disconnect"} 1.0' in client.get("/metrics").text, 30)
        assert len(processes("ServeReplica")) == 1

        stop, killed = threading.Event(), threading.Event()
        answers: list[tuple[int, int, Any]] = []

        def load(first: int) -> None:
            seed = first
            while not stop.is_set():
                answers.append((seed, *ask(client, seed, num_inference_steps=40)))
                seed += 100

        loads = [threads.submit(load, number) for number in range(16)]
        until(lambda: len(processes("ServeReplica")) == 2)
        until(lambda: len(answers) > 60)
        os.kill(processes("ServeReplica")[0], signal.SIGKILL)
        killed.set()
        count = len(answers)
        until(lambda: len(processes("ServeReplica")) == 2)
        until(lambda: len(answers) > count + 40)
        stop.set()
        for one in loads:
            one.result(WAIT_S)
        good = [(seed, told) for seed, status, told in answers if status == 200]
        bad = [(status, told) for _, status, told in answers if status != 200]
        assert len(good) > 80
        assert len({told["latentrt"]["job"] for _, told in good}) == len(good), "none is drawn for two"
        for seed, told in good[:: max(1, len(good) // 12)]:
            np.testing.assert_array_equal(pixels(told), alone(pipe, seed, 40))
        assert len(bad) <= 16, "those that the killed replica had"
        assert {status for status, _ in bad} <= {429, 500, 503}
        until(lambda: len(processes("ServeReplica")) == 1)
        np.testing.assert_array_equal(pixels(ask(client, 2)[1]), alone(pipe, 2))


@needs_ray
def test_models_are_opened_for_who_asks_and_make_way(pipe: Pipeline) -> None:
    """One at a time: a picture that is drawn when its model makes way is finished first."""
    with served(models="one=demo,two=demo", open_at_once=1) as client, ThreadPoolExecutor(4) as threads:

        def of(name: str, seed: int, **fields: Any) -> httpx.Response:
            headers = {"serve_multiplexed_model_id": name} if name else {}
            sent = {**SMALL, "seed": seed, **fields}
            return client.post("/v1/images/generations", json=sent, headers=headers)

        for name in ("", "one", "two", "one"):
            answer = of(name, 3)
            assert answer.status_code == 200
            assert answer.headers["x-request-id"]
            np.testing.assert_array_equal(pixels(answer.json()), alone(pipe, 3))
            models = client.get("/v1/models", headers={"serve_multiplexed_model_id": name or "one"}).json()
            assert [model["id"] for model in models["data"]] == [name or "one"]
        long = threads.submit(of, "one", 5, num_inference_steps=60)
        until(lambda: "latentrt_requests_running 1.0" in client.get("/metrics").text, 30)
        assert of("two", 4).status_code == 200
        assert long.result(WAIT_S).status_code == 200, "it had its time to end"
        np.testing.assert_array_equal(pixels(long.result().json()), alone(pipe, 5, 60))
        assert of("two", 1, model="one").status_code == 404, "its name may not draw with another"
        refused = of("three", 1)
        assert (refused.status_code, refused.text) == (
            404,
            "no model 'three' is served; expected one of one, two\n",
        )


@needs_ray
def test_what_a_replica_costs_is_measured() -> None:
    with served() as client:
        servers = {"Ray Serve": str(client.base_url)}
        found = measure_hosts(PACKAGE, TASK, FEW_STEPS, servers=servers, rules=ONE_ROUND)
    assert [(row.side, row.status) for row in found.rows] == [("latentrt", "ok"), ("Ray Serve", "ok")] * 2


# ── Ray Data ───────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_columns() -> None:
    batch = {"prompt": np.array(["a", "b"]), "seed": np.array([1.0, np.nan]), "width": np.array([64, 32])}
    assert rows_of(batch) == [{"prompt": "a", "seed": 1, "width": 64}, {"prompt": "b", "width": 32}]
    assert rows_of({}) == []
    assert rows_of({"prompt": np.array([7]), "seed": np.array([2.0])}) == [{"prompt": "7", "seed": 2}]


def test_rows_that_are_no_pictures() -> None:
    assert odd({"prompt": "a"}) is None
    assert "without a prompt" in str(odd({"seed": 1}))
    assert "num_images_per_prompt is 3" in str(odd({"prompt": "a", "num_images_per_prompt": 3}))


def test_names_are_of_what_is_asked_for() -> None:
    row = {"prompt": "a", "seed": 1}
    assert name_of("m", row) == name_of("m", dict(reversed(row.items())))
    assert len({name_of("m", row), name_of("n", row), name_of("m", {**row, "seed": 2})}) == 3


@pytest.mark.parametrize("name", ["prompts.txt", "none.jsonl"])
def test_files_that_are_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(UsageError, match="is no file of rows"):
        draw_all(tmp_path / name, tmp_path / "out")


def test_a_full_disk_ends_the_run_and_other_errors_are_a_rows() -> None:
    with pytest.raises(StorageError):
        failure(StorageError("full", expected="space", fix="Make some."))
    assert failure(UsageError("a", expected="b", fix="c"))["error"] == "a; expected b. c"
    assert failure(ZeroDivisionError("secret")) == {
        "status": "failed",
        "error": "ZeroDivisionError",
        "type": "ZeroDivisionError",
    }


@pytest.mark.parametrize("health", ["ready", "unhealthy"])
def test_a_replica_that_draws_no_more_says_so(health: str) -> None:
    replica = Replica.__new__(Replica)
    replica.open = cast(Any, [SimpleNamespace(server=SimpleNamespace(health=health), close=lambda _: None)])
    if health == "ready":
        replica.check_health()
        return
    with pytest.raises(RuntimeError, match="does not draw any more"):
        replica.check_health()


def test_errors_are_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n')
    out.write_text("a file")
    assert main([str(source), "-o", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: {out} is no folder; expected a folder for pictures. Choose another one.\n"
    )


def bulk(source: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    program = [str(PYTHON), "-m", "latentrt.hosts.ray.bulk", str(source), "-o", str(out), *words]
    environment = {**os.environ, "RAY_DEDUP_LOGS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environment
    )


@needs_ray
def test_three_hundred_prompts_whose_workers_and_driver_are_killed(tmp_path: Path, pipe: Pipeline) -> None:
    source, out = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    rows: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": number, "width": 64, "height": 64, "num_inference_steps": 4}
        for number in range(299)
    ]
    rows.append({"prompt": PROMPT, "seed": 1, "width": 60, "height": 64, "num_inference_steps": 4})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made() -> list[Path]:
        return sorted(out.rglob("*.png"))

    first = bulk(source, out, "--workers", "2")
    until(lambda: len(made()) > 30)
    first.kill()  # the driver
    first.communicate()
    until(lambda: not processes("Draw"))
    before = {path: path.stat().st_mtime_ns for path in made()}
    second = bulk(source, out, "--workers", "2")
    for more in (40, 80):
        until(lambda more=more: len(made()) > len(before) + more or second.poll() is not None)
        if found := processes("Draw"):
            os.kill(found[0], signal.SIGKILL)
    told, errors = second.communicate(timeout=WAIT_S * 2)
    assert second.returncode == 1, errors[-3000:]
    found = re.search(r"(\d+) drawn, (\d+) there before, 1 failed", told)
    assert found is not None, told
    drawn, kept = int(found[1]), int(found[2])  # what a killed worker had drawn of its batch is there, too
    assert (drawn + kept, kept >= len(before)) == (299, True)
    assert len(made()) == 299
    assert not list(out.rglob("*.part"))
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), "none is drawn twice"
    manifest = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    (failed,) = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert "width is 60" in failed["error"]
    assert len({row["path"] for row in manifest}) == 299
    for row in manifest[::30]:
        image = np.asarray(Image.open(out / row["path"]))
        wanted = pipe(PROMPT, width=64, height=64, num_inference_steps=4, seed=row["seed"]).to_bytes("png")
        assert hashlib.sha256((out / row["path"]).read_bytes()).digest() == hashlib.sha256(wanted).digest()
        assert image.shape == (64, 64, 3)
