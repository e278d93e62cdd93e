"""The store among several processes: builders that are killed, and builders that want the same engine."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import CancelledError
from latentrt.engines.store.engine_store import EngineStore, Entry
from tests.engines.engine_keys import builder, numbered
from tests.sizes import a_tenth_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the children are forked")
ROOT = Path(__file__).resolve().parents[2]
SLICES = 20  # of 4096 bytes


class Worker:
    """The process of `store_worker.py`, and the children that it forks."""

    def __init__(self, folder: Path) -> None:
        self.store = EngineStore(folder / "store")
        self.count = folder / "count"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.store_worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, task: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, key: int, *, seconds: float = 0.03, **more: Any) -> int:
        task = {"root": str(self.store.root), "count": str(self.count), "slices": SLICES, **more}
        return self._ask({"do": "start", "key": key, "seconds": seconds, **task})

    def wait(self, pid: int) -> int:
        return self._ask({"do": "wait", "pid": pid})

    def builds(self) -> int:
        return self.count.stat().st_size if self.count.exists() else 0

    def until(self, path: str) -> None:
        """Wait until something matches the pattern within the store."""
        deadline = time.monotonic() + 30
        while not list(self.store.root.glob(path)):
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path)
    yield worker
    worker.process.communicate(timeout=60)


def check_valid(store: EngineStore) -> None:
    """Every entry there is can be used, and nothing is left of killed builders."""
    verdict = store.verify()
    assert verdict.damaged == ()
    assert len(verdict.good) == len(list(store.engines.iterdir()) if store.engines.exists() else [])
    store.sweep()
    assert not store.building.exists() or list(store.building.iterdir()) == []


@a_tenth_of(50)
def test_kills_at_random_moments_leave_a_valid_store(worker: Worker, count: int) -> None:
    generator = random.Random(4)
    pid = worker.start(0)
    began = time.monotonic()
    assert worker.wait(pid) == 0
    whole = time.monotonic() - began
    unfinished = halfway = 0
    for number in range(1, count + 1):
        pid = worker.start(number)
        time.sleep(generator.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        status = worker.wait(pid)
        assert status in (-signal.SIGKILL, 0)
        whole *= 1.1 if status else 0.7  # the machine may be busier, or less busy, than at first
        unfinished += numbered(number).digest not in {
            path.name for path in worker.store.folders(worker.store.engines)
        }
        halfway += bool(list(worker.store.building.iterdir()))
        check_valid(worker.store)
        if number % 5 == 0:
            assert worker.store.get_or_build(numbered(number), builder(b"again")).read()
    if count == 50:  # a few may all come too early or too late
        assert unfinished > 10, "the kills came too late to show anything"
        assert halfway > 5, "no kill came while an engine was being written"


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_kill_at_every_step_leaves_a_valid_store(worker: Worker, rebuild: bool) -> None:
    before = worker.store.get_or_build(numbered(0), builder(bytes(4096 * SLICES))) if rebuild else None
    status, step = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        step += 1
        key = 0 if rebuild else step
        pid = worker.start(key, seconds=0, step=step, rebuild=rebuild)
        status = worker.wait(pid)
        check_valid(worker.store)
        if before is not None:
            assert isinstance(worker.store.find(before.key), Entry), "the old engine is gone"
    assert status == 0
    assert step > 10
    for number in range(0 if rebuild else 1, 1 if rebuild else step):
        assert worker.store.get_or_build(numbered(number), builder(b"x")).read()


def test_a_sweep_leaves_a_running_build_alone_and_takes_a_killed_one(worker: Worker) -> None:
    killed = worker.start(1, seconds=30)
    worker.until(f"building/{numbered(1).digest}-*/engine.bin")
    os.kill(killed, signal.SIGKILL)
    worker.wait(killed)
    running = worker.start(2, seconds=0.5)
    worker.until(f"building/{numbered(2).digest}-*/engine.bin")
    assert list(worker.store.building.glob(f"{numbered(1).digest}-*")) == []  # the next builder's sweep
    worker.store.sweep()
    assert worker.store.prune(everything=True).removed == ()
    assert len(list(worker.store.building.iterdir())) == 1
    assert worker.wait(running) == 0
    assert worker.builds() == 2
    check_valid(worker.store)


def test_8_processes_that_want_one_engine_make_one_build(worker: Worker) -> None:
    pids = [worker.start(1, seconds=0.4) for _ in range(8)]
    assert [worker.wait(pid) for pid in pids] == [0] * 8
    assert worker.builds() == 1
    entry = worker.store.find(numbered(1))
    assert isinstance(entry, Entry)
    assert entry.facts["pid"] in pids
    check_valid(worker.store)


def test_when_a_builder_is_killed_one_of_those_who_wait_builds(worker: Worker) -> None:
    first = worker.start(1, seconds=30)
    worker.until(f"building/{numbered(1).digest}-*/engine.bin")
    others = [worker.start(1, seconds=0.05) for _ in range(3)]
    time.sleep(0.1)
    os.kill(first, signal.SIGKILL)
    assert worker.wait(first) == -signal.SIGKILL
    assert [worker.wait(pid) for pid in others] == [0] * 3
    assert worker.builds() == 2
    messages = Path(f"{worker.count}.waiting").read_text(encoding="utf-8")
    assert f"waiting for process {first} to build the engine of unet (0 s)" in messages
    check_valid(worker.store)


def test_whoever_waits_is_told_and_may_give_up(worker: Worker) -> None:
    pid = worker.start(1, seconds=30)
    worker.until(f"building/{numbered(1).digest}-*/engine.bin")
    messages: list[str] = []

    def waiting(message: str) -> None:
        messages.append(message)
        if len(messages) == 2:
            (worker.store.locks / f"{numbered(1).digest}.owner").unlink()
        if len(messages) == 3:
            raise CancelledError("cancelled", expected="patience", fix="Wait.")

    with pytest.raises(CancelledError):
        worker.store.get_or_build(numbered(1), builder(b"x"), waiting=waiting)
    assert messages[0] == f"waiting for process {pid} to build the engine of unet (0 s)"
    assert messages[2] == "waiting for another process to build the engine of unet (2 s)"
    assert worker.store.get_or_build(numbered(2), builder(b"x")).read() == b"x"  # another key is free
    os.kill(pid, signal.SIGKILL)
    worker.wait(pid)


def test_the_store_imports_nothing_heavy() -> None:
    code = (
        "import sys, latentrt.engines.store.engine_store\n"
        "heavy = {'numpy', 'torch', 'onnxruntime', 'asyncio', 'typer'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
