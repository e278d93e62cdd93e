"""The examples do what their first lines say, with few steps and small pictures."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import latentrt

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RED, GREEN = "a red circle on a blue background", "a green square on a white background"


@pytest.fixture(scope="module")
def pipe() -> Iterator[latentrt.Pipeline]:
    with latentrt.Pipeline.open("demo") as pipe:
        yield pipe


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _load(name: str) -> ModuleType:
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_example_is_tested() -> None:
    files = [Path(__file__), Path(__file__).parent / "hosts" / "test_triton.py"]
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    tested = set(re.findall(r"_(?:load|run)\(\"(\w+)\"", sources))
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested - {"name"}


# ── threads ────────────────────────────────────────────────────────────────────────────────────────


def test_threads_draw_what_calls_in_turn_draw(pipe: latentrt.Pipeline, folder: Path) -> None:
    assert _run("threads", RED, GREEN).stdout.split() == ["threads-0.webp", "threads-1.webp"]
    for seed, prompt in enumerate((RED, GREEN)):
        assert (folder / f"threads-{seed}.webp").read_bytes() == pipe(prompt, seed=seed).to_bytes("WEBP")


def test_a_job_of_threads_shows_itself_and_stops(pipe: latentrt.Pipeline) -> None:
    module = _load("threads")
    with module.ThreadPoolExecutor(1) as pool:
        stopped, other = (module.Job(pool, pipe, prompt, seed=1) for prompt in (RED, GREEN))
        while not stopped.progress:
            time.sleep(0.001)
        stopped.cancel()
        with pytest.raises(latentrt.CancelledError):
            stopped.result.result(timeout=60)
        assert other.result.result(timeout=60)[8:12] == b"WEBP"
    assert 0 < stopped.progress < 1
    assert stopped.preview.size == (16, 16)
    assert other.progress == 1


# ── asyncio ────────────────────────────────────────────────────────────────────────────────────────


def test_asyncio_draws_what_calls_in_turn_draw(pipe: latentrt.Pipeline, folder: Path) -> None:
    done = _run("asyncio_stream", RED, GREEN)
    assert f"{RED}: 20 of 20" in done.stdout, done.stderr
    for seed, prompt in enumerate((RED, GREEN)):
        drawn = Image.open(folder / f"asyncio-{seed}.png")
        assert drawn.tobytes() == pipe(prompt, seed=seed, num_inference_steps=20).images[0].tobytes()


def test_a_task_of_asyncio_that_is_cancelled_stops(pipe: latentrt.Pipeline, capsys: Any) -> None:
    draw = _load("asyncio_stream").draw

    async def leave() -> None:
        task = asyncio.create_task(draw(pipe, RED, seed=1, steps=500))
        while "2 of 500" not in capsys.readouterr().out:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = threading.active_count()
    asyncio.run(leave())
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # the step that was being drawn
    assert threading.active_count() <= before
    assert "499 of 500" not in capsys.readouterr().out


# ── a service ──────────────────────────────────────────────────────────────────────────────────────


def test_a_service_answers_with_bytes(pipe: latentrt.Pipeline) -> None:
    pytest.importorskip("fastapi", reason="the example of a service needs fastapi and httpx")
    from fastapi.testclient import TestClient

    with TestClient(_load("service_fastapi").create_app()) as client:
        done = client.post("/pictures", json={"prompt": RED, "seed": 1, "steps": 4})
        assert done.headers["content-type"] == "image/png"
        assert done.content == pipe(RED, negative_prompt="", seed=1, num_inference_steps=4).to_bytes("PNG")
        assert client.post("/pictures", json={"prompt": RED, "steps": 51}).status_code == 422
        refused = client.post("/pictures", json={"prompt": "<lora:x:1>"})
        assert refused.status_code == 422
        assert "no adapter is called 'x'" in refused.json()["detail"]


class _Client:
    """As much of a request as the service asks for."""

    gone = False

    async def is_disconnected(self) -> bool:
        return self.gone


def test_a_service_stops_for_a_client_that_hangs_up(pipe: latentrt.Pipeline) -> None:
    pytest.importorskip("fastapi", reason="the example of a service needs fastapi and httpx")
    module = _load("service_fastapi")

    async def serve() -> None:
        studio = module.Studio(pipe, at_once=1, waiting=1)
        leaving, patient = _Client(), _Client()
        long = asyncio.create_task(
            studio.draw(
                module.Wanted.model_construct(prompt=RED, negative_prompt="", seed=1, steps=400), leaving
            )
        )
        await asyncio.sleep(0.2)
        short = asyncio.create_task(studio.draw(module.Wanted(prompt=GREEN, seed=1, steps=2), patient))
        await asyncio.sleep(0)
        with pytest.raises(module.HTTPException) as full:
            await studio.draw(module.Wanted(prompt=GREEN), patient)
        assert full.value.status_code == 503
        assert not short.done()
        leaving.gone = True
        with pytest.raises(latentrt.CancelledError) as stopped:
            await long
        assert module.status_of(stopped.value) == 504
        assert (await short)[:4] == b"\x89PNG"  # its turn came

    asyncio.run(serve())


# ── a batch job ────────────────────────────────────────────────────────────────────────────────────

LINES = [
    {"prompt": prompt, "num_inference_steps": 20, "width": 64, "height": 64, "seed": seed}
    for seed, prompt in enumerate((RED, GREEN, "a large purple heart on a white background") * 2)
]


def _manifest(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "manifest.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9 on Windows")
def test_a_batch_job_that_is_killed_goes_on(pipe: latentrt.Pipeline, folder: Path, capsys: Any) -> None:
    """Killed while it draws, again and again, it draws every line once."""
    jobs, pictures = folder / "jobs.jsonl", folder / "pictures"
    jobs.write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    drawn: list[str] = []
    for wanted in (2, 1):  # pictures, and then it is killed
        with subprocess.Popen(
            [sys.executable, EXAMPLES / "batch_job.py", jobs, pictures], stdout=subprocess.PIPE, text=True
        ) as job:
            assert job.stdout is not None
            drawn += [job.stdout.readline() for _ in range(wanted)]
            job.kill()
            drawn += job.stdout.readlines()
        assert job.returncode == -signal.SIGKILL
    assert len(drawn) < len(LINES)
    before = {path: path.stat() for path in pictures.glob("*.png")}
    (pictures / ".latentrt-0.tmp").write_bytes(b"half a picture")
    run = _load("batch_job").run
    assert run(jobs, pictures) == 0
    for path, status in before.items():  # nothing twice
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert len(capsys.readouterr().out.splitlines()) == len(LINES) - len(before)
    entries = _manifest(pictures)
    assert [entry["line"] for entry in entries] == list(range(1, len(LINES) + 1))  # no line lost
    for entry, line in zip(entries, LINES, strict=True):
        assert (pictures / entry["picture"]).read_bytes() == pipe(**line).to_bytes()
    assert not list(pictures.glob("*.tmp"))
    assert run(jobs, pictures) == 0
    assert capsys.readouterr().out == ""  # there was nothing left to do


def test_a_batch_job_reads_csv_and_names_lines_that_fail(folder: Path) -> None:
    jobs = folder / "jobs.csv"
    rows = [f'"{RED}, small",2,7', f"{GREEN},0,8", "3,2,9"]
    jobs.write_text("\n".join(["prompt,num_inference_steps,seed", *rows]), encoding="utf-8-sig")
    assert _load("batch_job").run(jobs, folder / "pictures") == 1
    first, second, third = _manifest(folder / "pictures")
    assert (first["prompt"], first["seed"], third["prompt"]) == (f"{RED}, small", 7, "3")
    assert second["error"].startswith("num_inference_steps is 0")
