"""A full disk, a failing one, and files that others could have written."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import EngineError, StorageError
from latentrt.engines.store.engine_store import EngineStore, Entry, Miss
from tests.engines.engine_keys import KEY, OTHER, builder, numbered

POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    """A store that has the engine of KEY."""
    store = EngineStore(tmp_path / "store")
    store.get_or_build(KEY, builder(b"old"))
    return store


def check_intact(store: EngineStore) -> None:
    found = store.find(KEY)
    assert isinstance(found, Entry)
    assert found.read() == b"old"
    assert store.verify().good == (found,)
    assert list(store.building.iterdir()) == []
    assert list(store.quarantine.iterdir()) == []


# ── a disk that is really full ───────────────────────────────────────────────────────────────────────────

CHILD = """
import resource, sys
from latentrt.engines.errors import StorageError
from latentrt.engines.store.engine_store import EngineStore
from tests.engines.engine_keys import KEY, builder, numbered

store = EngineStore(sys.argv[1])
store.get_or_build(KEY, builder(b"old" * 100_000))
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
for key in (KEY, numbered(1)):
    try:
        store.get_or_build(key, builder(b"new" * 500_000), rebuild=True)
    except StorageError as error:
        print(error)
    assert store.find(KEY).read() == b"old" * 100_000
    assert [entry.key for entry in store.verify().good] == [KEY]
    assert not list(store.building.iterdir())
store.get_or_build(numbered(1), builder(b"small")).read()
"""
MOUNT = 'mount -t tmpfs -o size=1M none "$1" && shift && exec "$@"'


def run_child(prefix: list[str], folder: Path, kind: str) -> str:
    command = [*prefix, sys.executable, "-c", CHILD, str(folder / "store"), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@POSIX
def test_a_full_file_system_leaves_the_old_entry_intact(tmp_path: Path) -> None:
    prefix = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot mount a small file system")
    lines = run_child(prefix, tmp_path, "disk").splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "the engine of unet could not be written: No space left on device, with " in line
        assert "bytes of it written and 0 bytes free in " in line
        assert "latentrt cache prune" in line


@POSIX
def test_a_file_size_limit_leaves_the_old_entry_intact(tmp_path: Path) -> None:
    lines = run_child([], tmp_path, "limit").splitlines()
    assert len(lines) == 2
    assert all(
        "could not be written: File too large, with 500000 bytes of it written" in line for line in lines
    )


# ── a disk that fails at one step ────────────────────────────────────────────────────────────────────────


def failing(real: Callable[..., Any], number: int, code: int) -> Callable[..., Any]:
    """`real`, whose call of this number raises OSError."""
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    return call


STEPS = [  # engine, manifest, temporary folder, the old entry away, the new one in place
    ("fsync", 1),
    ("fsync", 2),
    ("fsync", 3),
    ("rename", 1),
    ("rename", 2),
]


@pytest.mark.parametrize(
    ("code", "numbers"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)]
)
@pytest.mark.parametrize(("step", "number"), STEPS)
def test_an_error_at_any_step_leaves_the_old_entry_intact(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch, step: str, number: int, code: int, numbers: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing(getattr(os, step), number, code))
        with pytest.raises(StorageError, match="could not be written: ") as caught:
            store.get_or_build(KEY, builder(b"new"), rebuild=True)
    assert (" bytes free in " in caught.value.found) is numbers
    assert "LATENTRT_CACHE" in caught.value.fix
    check_intact(store)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_builder_that_fills_the_disk(store: EngineStore, code: int) -> None:
    def build(path: Path) -> dict[str, Any]:
        path.write_bytes(b"x" * 1000)
        raise OSError(code, os.strerror(code))

    for key in (KEY, numbered(1)):
        with pytest.raises(StorageError, match=r"with 1000 bytes of it written and [1-9]\d* bytes free"):
            store.get_or_build(key, build, rebuild=True)
        check_intact(store)


@pytest.mark.parametrize(
    "error", [ValueError("x"), FileNotFoundError(2, "x"), KeyboardInterrupt(), EOFError()]
)
def test_other_errors_of_a_builder_pass_unchanged(store: EngineStore, error: BaseException) -> None:
    def build(path: Path) -> dict[str, Any]:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        store.get_or_build(KEY, build, rebuild=True)
    assert caught.value is error
    check_intact(store)


@pytest.mark.parametrize("facts", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}])
def test_facts_that_are_no_json(store: EngineStore, facts: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        store.get_or_build(KEY, builder(b"new", **facts), rebuild=True)
    check_intact(store)


def empty(path: Path) -> dict[str, Any]:
    path.touch()
    return {}


def folder(path: Path) -> dict[str, Any]:
    path.mkdir()
    return {}


@pytest.mark.parametrize("build", [lambda _: {}, empty, folder])
def test_a_builder_that_writes_no_engine(store: EngineStore, build: Callable[[Path], dict[str, Any]]) -> None:
    with pytest.raises(EngineError, match="the builder wrote no engine of unet"):
        store.get_or_build(KEY, build, rebuild=True)
    check_intact(store)


def test_an_engine_that_cannot_be_read_now_is_not_called_damaged(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = store.entries()[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", failing(os.fstat, 1, errno.EMFILE))
        with pytest.raises(StorageError, match="cannot be read"):
            entry.read()
    check_intact(store)


@pytest.mark.parametrize("place", ["root", "building", "parent"])
def test_a_store_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    store = EngineStore(tmp_path / "parent" / "store")
    blocked = {"root": store.root, "building": store.building, "parent": store.root.parent}[place]
    blocked.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    blocked.write_bytes(b"a file")
    with pytest.raises(StorageError, match=r"is not a folder|the engine store cannot be (made|opened)"):
        store.get_or_build(KEY, builder(b"x"))
    assert blocked.read_bytes() == b"a file"


@pytest.mark.parametrize(
    ("name", "message"),
    [("tempfile.mkdtemp", "cannot be written"), ("filelock.FileLock.acquire", "cannot be locked")],
)
def test_a_store_that_cannot_be_written(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(name, fail)
        with pytest.raises(StorageError, match=f"the engine store {message}"):
            store.get_or_build(KEY, builder(b"new"), rebuild=True)
        assert isinstance(store.find(KEY), Entry)
    check_intact(store)


# ── what others could have written ───────────────────────────────────────────────────────────────────────


@POSIX
def test_everything_is_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = EngineStore(tmp_path / "store")
        store.get_or_build(KEY, builder(b"x"))
        store.write_side_file(store.side_file("timing", "x"), b"x")
    finally:
        os.umask(before)
    folders = [store.root, *(path for path in store.root.rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    assert (store.engines / KEY.digest / "engine.bin").stat().st_mode & 0o777 == 0o600


def read(store: EngineStore) -> None:
    found = store.find(KEY)
    assert isinstance(found, Entry)
    found.read()


@POSIX
@pytest.mark.parametrize("place", ["", "engines", "entry", "entry/engine.bin", "entry/manifest.json"])
def test_what_others_can_write_is_refused(store: EngineStore, place: str) -> None:
    path = store.root / place.replace("entry", f"engines/{KEY.digest}")
    mode = path.stat().st_mode
    path.chmod(mode | 0o002)
    with pytest.raises(StorageError, match=r"is open to others \(mode 0\d\d\d\); expected .* chmod o-w"):
        read(store)
    path.chmod(mode)
    check_intact(store)


@POSIX
@pytest.mark.parametrize("place", ["engines", "entry", "entry/engine.bin", "entry/manifest.json"])
def test_a_link_is_refused(store: EngineStore, tmp_path: Path, place: str) -> None:
    path = store.root / place.replace("entry", f"engines/{KEY.digest}")
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    with pytest.raises(StorageError, match=r"is a link; expected a f.* of the engine store"):
        read(store)
    with pytest.raises(StorageError, match="is a link"):
        store.get_or_build(KEY, builder(b"new"), rebuild=True)


@POSIX
def test_a_pipe_is_refused_without_waiting_for_a_writer(store: EngineStore) -> None:
    path = store.engines / KEY.digest / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="is not a file"):
        read(store)


@POSIX
def test_an_open_or_linked_entry_is_reported_and_moved_aside_by_verify(
    store: EngineStore, tmp_path: Path
) -> None:
    path = store.engines / KEY.digest
    path.chmod(0o777)
    assert "open to others" in store.verify().damaged[0][1]
    assert "in quarantine: " in getattr(store.find(KEY), "reason", "")
    entry = store.get_or_build(KEY, builder(b"new"))
    entry.path.rename(tmp_path / "elsewhere")
    entry.path.symlink_to(tmp_path / "elsewhere")
    assert store.entries() == ()
    assert "is a link" in store.verify().damaged[0][1]
    assert (tmp_path / "elsewhere" / "engine.bin").read_bytes() == b"new"


@POSIX
def test_the_store_itself_may_be_a_link_to_another_disk(store: EngineStore, tmp_path: Path) -> None:
    store.root.rename(tmp_path / "disk")
    store.root.symlink_to(tmp_path / "disk")
    check_intact(store)


@POSIX
def test_a_side_file_that_is_open_or_linked_reads_as_nothing(store: EngineStore, tmp_path: Path) -> None:
    path = store.side_file("timing", "x")
    store.write_side_file(path, b"x")
    path.chmod(0o666)
    assert store.read_side_file(path) == b""
    path.chmod(0o600)
    assert store.read_side_file(path) == b"x"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert store.read_side_file(path) == b""


def test_other_misses_are_not_hidden_by_what_is_refused(store: EngineStore) -> None:
    (store.engines / KEY.digest / "manifest.json").write_bytes(b"")
    found = store.find(numbered(1))
    assert isinstance(found, Miss)
    assert found.reason.endswith("has been built yet")
    assert OTHER["net"] not in found.reason
