"""What a killed run leaves is removed by the next; what a live one has is not touched."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from latentrt.checkpoints import beside as module
from latentrt.checkpoints.beside import beside, put
from latentrt.export.pickles.convert import convert_pickle

WAITS = """
import sys, time
from pathlib import Path
from latentrt.checkpoints.beside import beside, put
target = Path(sys.argv[1])
with beside(target) as work:
    (work / "weights").write_text("half of them")
    if sys.argv[2] == "between renames":
        import os
        rename = os.replace
        def replace(source, goal):
            rename(source, goal)
            print("ready", flush=True)
            time.sleep(60)
        os.replace = replace
        put(work, target, work)
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def running(target: Path, stage: str = "writing") -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to write `target`."""
    command = [sys.executable, "-c", WAITS, str(target), stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_run_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "package"
    with running(target) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [name[:18] for name in os.listdir(tmp_path)] == [".package.latentrt-"]
    with beside(target) as work:
        assert len(os.listdir(tmp_path)) == 1
        assert not os.listdir(work)
    assert not os.listdir(tmp_path)


def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "package"
    with running(target):
        before = sorted(tmp_path.rglob("*"))
        with beside(target):
            assert len(os.listdir(tmp_path)) == 2
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_killed_between_two_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "package"
    target.mkdir()
    (target / "old").write_text("mine")
    with running(target, "between renames") as process:
        assert not target.exists()
        process.kill()
        process.wait()
    with beside(target):
        assert (target / "old").read_text() == "mine"
    assert os.listdir(tmp_path) == ["package"]


def test_only_runs_for_the_same_target_are_looked_at(tmp_path: Path) -> None:
    others = [".package.latentrt", ".package-settings", ".package2.latentrt-abcdefgh", "package.latentrt-x"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".package.latentrt-file").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis").write_text("years of work")
    (tmp_path / ".package.latentrt-link").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with beside(tmp_path / "package"):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_swept_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a folder's making and its lock, another run takes it for a leftover."""
    make, made = module.tempfile.mkdtemp, list[str]()

    def swept(**options: Any) -> str:
        made.append(make(**options))
        if len(made) == 1:
            lock = module.FileLock(Path(made[0]) / "lock")
            lock.acquire()
            held.append(lock)
        return made[-1]

    held: list[Any] = []
    monkeypatch.setattr(module.tempfile, "mkdtemp", swept)
    with beside(tmp_path / "package") as work:
        assert len(made) == 2
        assert work.parent == Path(made[1])
    held[0].release()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError("no flock")])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Nothing is swept there, because nobody can tell what is in use."""

    def acquire(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(module.FileLock, "acquire", acquire)
    (tmp_path / ".package.latentrt-abcdefgh").mkdir()
    with beside(tmp_path / "package") as work:
        assert work.is_dir()
    assert os.listdir(tmp_path) == [".package.latentrt-abcdefgh"]


def test_a_lock_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(module.FileLock, "acquire", acquire)
    with pytest.raises(OSError, match="broken disk"), beside(tmp_path / "package"):
        pass


def test_what_was_there_stays_if_it_cannot_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "package"
    target.mkdir()
    (target / "mine").write_text("")
    with pytest.raises(FileNotFoundError), beside(target) as work:
        put(work / "nothing", target, work)
    assert os.listdir(target) == ["mine"]


def test_a_killed_conversion_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2_000_000)}, tmp_path / "x.ckpt")
    code = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from latentrt.export.pickles import convert\n"
        "convert.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert.convert_pickle(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    paths = (tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    killed = subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    convert_pickle(*paths)
    assert sorted(os.listdir(tmp_path)) == ["x.ckpt", "x.safetensors"]
