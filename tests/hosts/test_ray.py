"""Ray on this machine: replicas that come, go and are killed; files of prompts whose workers are killed."""

from __future__ import annotations

import base64
import errno
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

from latentrt import BackendError, Pipeline, UsageError
from latentrt.benchmarks.verbs.hosts import measure_hosts
from latentrt.engines.errors import LatentrtError, StorageError
from latentrt.hosts.ray.bulk import Draw, draw_all, failure, main, name_of
from latentrt.hosts.ray.rows import odd, read_rows
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
    ("given", "words"),
    [
        ({"models": ""}, "models is ''"),
        ({"models": "a, ,b"}, "models is 'a, ,b'"),
        ({"models": "a="}, "models is 'a='"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cuda:x"}, "device is 'cuda:x'"),
        ({"backend": "nonsense"}, "unknown backend 'nonsense'"),
        ({"backend": "onnxruntime", "device": "cuda"}, "the backend onnxruntime with the device cuda"),
        ({"loras": "/no/such"}, "/no/such is no folder"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3"),
    ],
)
def test_settings_that_no_replica_could_start_with(given: dict[str, Any], words: str) -> None:
    with pytest.raises((UsageError, BackendError), match=words):
        Settings.read(given)


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
    environment = _without_pythonpath()
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
@pytest.mark.slow
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
@pytest.mark.slow
def test_what_a_replica_costs_is_measured() -> None:
    with served() as client:
        servers = {"Ray Serve": str(client.base_url)}
        found = measure_hosts(PACKAGE, TASK, FEW_STEPS, servers=servers, rules=ONE_ROUND)
    assert [(row.side, row.status) for row in found.rows] == [("latentrt", "ok"), ("Ray Serve", "ok")] * 2


# ── Ray Data ───────────────────────────────────────────────────────────────────────────────────────


BIG = 2**53 + 1  # the first whole number that no float is


def rows_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def in_its_environment(code: str, *words: str | Path) -> Any:
    """What a program prints as JSON, where there are pandas and pyarrow."""
    told = subprocess.run(
        [PYTHON, "-c", code, *words], capture_output=True, text=True, cwd="/", env=_without_pythonpath()
    )
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout)


def _without_pythonpath() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@needs_ray
def test_columns_have_their_declared_types(tmp_path: Path) -> None:
    """Beside pandas with those types declared: whole numbers stay what they are beside empty cells."""
    source = rows_file(
        tmp_path / "a.csv",
        "\ufeffprompt,seed,guidance_scale,width,negative_prompt\n"
        f'"a, b",{BIG},7,64,\n7,,7.5,,"x\ny"\n\n c ,18446744073709551615,,,',
    )
    wanted = in_its_environment(
        "import json, pandas, sys\n"
        "types = {'prompt': 'string', 'negative_prompt': 'string', 'seed': 'UInt64', 'width': 'Int64',"
        " 'guidance_scale': 'Float64'}\n"
        "rows = pandas.read_csv(sys.argv[1], dtype=types, encoding='utf-8-sig').to_dict('records')\n"
        "print(json.dumps([{k: v for k, v in row.items() if not pandas.isna(v)} for row in rows]))",
        source,
    )
    found = read_rows(source)
    assert (found.asked, found.refused, found.repeated) == (wanted, [], 0)
    assert [type(row["seed"]) for row in found.asked if "seed" in row] == [int, int]


def test_cells_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    source = rows_file(
        tmp_path / "a.csv", 'prompt,seed,loras,timesteps,image\na,1.0,striped:0.5,"900,1",7.npy\n'
    )
    (row,) = read_rows(source).asked
    assert row == {
        "prompt": "a", "seed": 1, "loras": [["striped", 0.5]], "timesteps": [900, 1], "image": "7.npy"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "array"])
def test_json_has_types_of_its_own(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "seed": BIG}, {"prompt": "b", "seed": None}]
    source = tmp_path / f"a.{'json' if kind == 'array' else kind}"
    source.write_text(json.dumps(rows) if kind == "array" else "\n".join(map(json.dumps, rows)))
    assert read_rows(source).asked == [{"prompt": "a", "seed": BIG}, {"prompt": "b"}]


def test_a_line_ends_where_json_lines_say(tmp_path: Path) -> None:
    """Not at the other ends of lines that Unicode has, which a text may have inside."""
    source = rows_file(tmp_path / "a.jsonl", '{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c\x85d"}')
    assert [row["prompt"] for row in read_rows(source).asked] == ["a\u2028b", "c\x85d"]


@needs_ray
def test_a_table_of_pandas(tmp_path: Path) -> None:
    """Seeds beside nothing are floats there; where a float is no longer one number it stays a float."""
    told = in_its_environment(
        "import json, pandas, sys\n"
        "from pathlib import Path\n"
        "from latentrt import UsageError\n"
        "from latentrt.hosts.ray.rows import read_rows\n"
        "path, seeds = Path(sys.argv[1], 'a.parquet'), [1, None, int(sys.argv[2])]\n"
        "table = pandas.DataFrame({'prompt': ['a', 'b', 'c'], 'seed': seeds})\n"
        "table.to_parquet(path)\n"
        "floats = read_rows(path).asked\n"
        "table.assign(seed=pandas.array(seeds, 'Int64')).to_parquet(path)\n"
        "whole = read_rows(path).asked\n"
        "refused = []\n"
        "for column in ('text', 'prompt'):\n"
        "    pandas.DataFrame({column: ['a'], 'odd': 1}).to_parquet(path)\n"
        "    try: read_rows(path)\n"
        "    except UsageError as error: refused.append(str(error))\n"
        "print(json.dumps([floats, whole, refused]))",
        tmp_path,
        str(BIG),
    )
    floats, whole, refused = told
    assert floats == [{"prompt": "a", "seed": 1}, {"prompt": "b"}, {"prompt": "c", "seed": float(BIG)}]
    assert [type(row.get("seed")) for row in floats] == [int, type(None), float]
    assert whole == [{"prompt": "a", "seed": 1}, {"prompt": "b"}, {"prompt": "c", "seed": BIG}]
    assert ["no column prompt" in refused[0], "the column 'odd'" in refused[1]] == [True, True]


def test_rows_that_ask_for_the_same_are_one(tmp_path: Path) -> None:
    source = rows_file(
        tmp_path / "a.jsonl",
        '{"prompt": "a", "seed": 1}\n{"seed": 1.0, "prompt": "a"}\n{"prompt": "a", "seed": 2}\n',
    )
    found = read_rows(source)
    assert (len(found.asked), found.repeated, found.refused) == (2, 1, [])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "prompt,stepz\na,4\n", "the column 'stepz'"),
        ("a.csv", "prompt,steps\na,4\n", "the column 'steps'; expected 'num_inference_steps'"),
        ("a.csv", "prompt, seed\na,4\n", "the column ' seed'; expected 'seed'"),
        ("a.csv", "prompt,seed,seed\na,4,5\n", "a second column 'seed'"),
        ("a.csv", "prompt,latents\na,x.npy\n", "the column 'latents'"),
        ("a.csv", "text\na\n", "names no column prompt"),
        ("a.csv", "", "names no column prompt"),
        ("a.csv", 'prompt\n"a\n', "cannot be read"),
        ("a.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 2}\n', "the column 'id'"),
        ("a.json", "[1", "cannot be read"),
        ("a.json", "[" * 5000, "cannot be read"),
    ],
)
def test_a_file_that_would_make_every_row_fail(name: str, text: str, words: str, tmp_path: Path) -> None:
    source = rows_file(tmp_path / name, text)
    with pytest.raises(UsageError, match=words):
        draw_all(source, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is drawn"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"prompt": 7}', "the prompt is 7"),
        ("a.jsonl", '{"prompt": ["a"]}', "the prompt is ['a']"),
        ("a.jsonl", "{nope", "the row '{nope'"),
        ("a.jsonl", "[" * 5000, "the row '[["),
        ("a.json", '[{"prompt": "b"}, 7]', "the row 7"),
        ("a.csv", "prompt,seed\na, b,7", "3 cells in 2 columns: 'a'"),
        ("a.csv", "prompt,seed\na,many", "seed is 'many'"),
        ("a.csv", "prompt,width\na,64px", "width is '64px'"),
        ("a.csv", "prompt,seed\n,7", "a row without a prompt"),
    ],
)
def test_what_is_wrong_with_a_row_is_its_own(name: str, text: str, words: str, tmp_path: Path) -> None:
    good = "" if text.startswith("[{") else '{"prompt": "b"}\n' if name == "a.jsonl" else ""
    source = rows_file(tmp_path / name, f"{good}{text}\n" + ("b,1\n" if name == "a.csv" else ""))
    found = read_rows(source)
    assert [row["prompt"] for row in found.asked] == ["b"]
    ((told, why),) = found.refused
    assert words in str(why)
    assert told["row"] == (1 if name == "a.csv" else 2)


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


def test_a_full_disk_is_said_by_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As data: what Ray raises has an error of ours in its text alone."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    worker = Draw("demo", str(tmp_path), {"device": "cpu"})
    row = json.dumps({"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 1})
    monkeypatch.setattr(os, "replace", full)
    (told,) = map(json.loads, worker({"row": [row]})["result"])
    assert (told["status"], told["type"]) == ("over", "StorageError")
    assert "No space left on device" in told["why"]["found"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_ends_the_run_and_other_errors_are_a_rows() -> None:
    with pytest.raises(StorageError):
        failure(StorageError("full", expected="space", fix="Make some."))
    assert failure(UsageError("a", expected="b", fix="c"))["error"] == "a; expected b. c"
    assert failure(ZeroDivisionError("secret")) == {
        "status": "failed",
        "error": "ZeroDivisionError",
        "type": "ZeroDivisionError",
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "/no/such/model"}, "/no/such/model does not exist"),
        ({"model": ""}, "the model's name is empty"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"backend": "nonsense"}, "unknown backend 'nonsense'"),
        ({"loras": Path("/no/such")}, "/no/such is no folder"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_what_every_worker_would_end_with_is_said_before_there_is_one(
    more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = rows_file(tmp_path / "a.jsonl", '{"prompt": "a"}\n')
    with pytest.raises(LatentrtError, match=words):
        draw_all(source, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


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
    environment = {**_without_pythonpath(), "RAY_DEDUP_LOGS": "1"}
    return subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environment
    )


@needs_ray
def test_a_model_that_no_worker_can_open_is_said_in_our_words(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "a.jsonl", '{"prompt": "a"}\n')
    model = rows_file(tmp_path / "model.safetensors", "nope")
    process = bulk(source, tmp_path / "out", "--model", str(model))
    _, errors = process.communicate(timeout=WAIT_S)
    last = errors.strip().splitlines()[-1]
    assert (process.returncode, last.startswith(f"error: {model}"), "; expected" in last) == (3, True, True)


@needs_ray
@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_prompts_whose_workers_and_driver_are_killed(count: int, tmp_path: Path, pipe: Pipeline) -> None:
    source, out = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    rows: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": number, "width": 64, "height": 64, "num_inference_steps": 4}
        for number in range(count)
    ]
    rows += [{**rows[0], "width": 60}, {**rows[0], "prompt": 7}, rows[0]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made() -> list[Path]:
        return sorted(out.rglob("*.png"))

    first = bulk(source, out, "--workers", "2")
    until(lambda: len(made()) > count // 10)
    first.kill()  # the driver
    first.communicate()
    until(lambda: not processes("Draw"))
    before = {path: path.stat().st_mtime_ns for path in made()}
    second = bulk(source, out, "--workers", "2")
    for more in (count // 8, count // 4):
        until(lambda more=more: len(made()) > len(before) + more or second.poll() is not None)
        if found := processes("Draw"):
            os.kill(found[0], signal.SIGKILL)
    told, errors = second.communicate(timeout=WAIT_S * 2)
    assert second.returncode == 1, errors[-3000:]
    found = re.search(r"(\d+) drawn, (\d+) there before, 2 failed, 1 repeated", told)
    assert found is not None, told
    drawn, kept = int(found[1]), int(found[2])  # what a killed worker had drawn of its batch is there, too
    assert (drawn + kept, kept >= len(before)) == (count, True)
    assert len(made()) == count
    assert not list(out.rglob("*.part")), "the lists are whole"
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), "none is drawn twice"
    manifest = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    failed = (out / "failures.jsonl").read_text()
    assert ["width is 60" in failed, "the prompt is 7" in failed, failed.count("\n")] == [True, True, 2]
    assert len({row["path"] for row in manifest}) == count
    for row in manifest[:: count // 10]:
        image = np.asarray(Image.open(out / row["path"]))
        wanted = pipe(PROMPT, width=64, height=64, num_inference_steps=4, seed=row["seed"]).to_bytes("png")
        assert hashlib.sha256((out / row["path"]).read_bytes()).digest() == hashlib.sha256(wanted).digest()
        assert image.shape == (64, 64, 3)
