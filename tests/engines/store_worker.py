"""A process that forks others which ask the store for an engine: it imports once, so a child costs little.

One JSON object per line on stdin: `start` answers with the child's pid, `wait` with its exit status, negative
for a signal. A child stays a zombie until it is waited for, so its pid stays its own.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from latentrt.engines.store.engine_store import EngineStore
from tests.engines.engine_keys import numbered


def build(task: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write an engine in slices, about as slowly as asked; leave one byte in the counting file."""
    descriptor = os.open(task["count"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b".")
    os.close(descriptor)
    with path.open("wb", buffering=0) as stream:
        for _ in range(task["slices"]):
            stream.write(bytes(4096))
            time.sleep(task["seconds"] / task["slices"])
    return {"pid": os.getpid()}


def die_at(step: int) -> None:
    """Let this process kill itself in its call of that number that changes the file system."""
    calls = 0

    def dying(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("fsync", "rename", "mkdir", "rmdir", "unlink", "utime"):
        setattr(os, name, dying(getattr(os, name)))


def ask(task: dict[str, Any]) -> None:
    """What a child does: get the engine, and check that it can be read."""
    if "step" in task:
        die_at(task["step"])
    store = EngineStore(task["root"])

    def waiting(message: str) -> None:
        with open(f"{task['count']}.waiting", "a", encoding="utf-8") as stream:
            stream.write(f"{message}\n")

    entry = store.get_or_build(
        numbered(task["key"]),
        lambda path: build(task, path),
        waiting=waiting,
        rebuild=task.get("rebuild", False),
    )
    assert entry.read() == bytes(4096 * task["slices"])


def child(task: dict[str, Any]) -> None:
    """Run one task in a forked process, and end it without the parent's clean-up."""
    try:
        ask(task)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Serve until stdin ends."""
    for line in sys.stdin:
        task = json.loads(line)
        if task["do"] == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(task["pid"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                child(task)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
