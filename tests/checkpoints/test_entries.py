"""What the cache has of opened checkpoints: noted, listed, checked, removed, and never half of it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentrt.checkpoints import contents, find
from latentrt.checkpoints.contents import forget_gone, read_contents
from latentrt.checkpoints.entries import (
    OPENED,
    SeenFile,
    entries,
    load_entry,
    models,
    prune,
    state_by_content,
    verify,
)
from latentrt.checkpoints.find import locate, recall
from latentrt.checkpoints.hub.ids import HubModel
from latentrt.checkpoints.opened import Options, open_checkpoint
from latentrt.engines.backends import BACKENDS
from latentrt.engines.errors import CheckpointError, PackageError, StorageError, UsageError
from latentrt.engines.package import MANIFEST, Package
from latentrt.engines.store.engine_store import EngineStore
from latentrt.runtime.model import CheckpointOptions, open_model
from tests.checkpoints.cache_entries import put_entry
from tests.checkpoints.conftest import small_modules, write_small
from tests.engines.engine_keys import builder, numbered

ROOT = Path(__file__).resolve().parents[2]
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals, mounts and links of POSIX")
DAY = 86400
READS = BACKENDS["onnxruntime"].reads


def tokenize(folder: Path, texts: Any, length: int) -> Any:
    raise AssertionError("fp32 measures nothing")


@pytest.fixture
def model(small_file: Path, tmp_path: Path) -> Path:
    """A checkpoint to move and to damage."""
    (tmp_path / "models").mkdir()
    return Path(shutil.copy(small_file, tmp_path / "models" / "small.safetensors"))


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "cache")


@pytest.fixture
def opener(small_archive: Path, store: EngineStore) -> Callable[..., Package]:
    """Opens a checkpoint in fp32 into the store."""

    def call(path: Path, **more: Any) -> Package:
        names = ("hub", "note", "progress", "store")
        asked = {name: more.pop(name) for name in names if name in more}
        options = replace(Options(dtype="fp32", reads=READS, templates=small_archive), **more)
        return open_checkpoint(path, options, tokenize=tokenize, **{"store": store.root, **asked})

    return call


# ── what is noted ────────────────────────────────────────────────────────────────────────────────────────


def test_an_opening_is_noted(model: Path, store: EngineStore, opener: Callable[..., Package]) -> None:
    package = opener(model, prediction_type="epsilon")
    (entry,) = entries(store)
    note, status = entry.note, model.stat()
    assert (note.name, note.family, note.dtype, note.path) == ("small", "sd1", "fp32", str(model))
    assert (note.hub, note.vae, note.tiny_vae, note.prediction_type) == ("", "", "", "epsilon")
    assert set(note.files.values()) == {
        SeenFile(path=str(model), size=status.st_size, mtime_ns=status.st_mtime_ns)
    }
    assert entry.path == package.root
    assert entry.state == "there"
    assert note.weights_bytes == status.st_size
    assert entry.size == sum(path.stat().st_size for path in package.root.rglob("*") if path.is_file())
    assert entry.size < 10_000_000
    assert OPENED not in package.manifest.files
    assert verify(store).good == (entry,)


def test_opening_again_changes_the_time_alone(
    model: Path, store: EngineStore, opener: Callable[..., Package]
) -> None:
    note = opener(model).root / OPENED
    before = note.read_bytes(), note.stat().st_ino
    os.utime(note, (1e9, 1e9))
    opener(model)
    assert (note.read_bytes(), note.stat().st_ino) == before
    assert entries(store)[0].last_used > time.time() - 60


def test_a_file_that_was_moved_is_noted_where_it_is(
    model: Path, store: EngineStore, opener: Callable[..., Package]
) -> None:
    note = opener(model).root / OPENED
    note.write_text(note.read_text().replace('"created": "20', '"created": "19'))
    moved = model.rename(model.with_name("elsewhere").with_suffix(".safetensors"))
    moved = moved.rename(store.root / model.name)
    opener(moved, hub="org/small")
    (entry,) = entries(store)
    assert (entry.note.path, entry.note.hub, entry.state) == (str(moved), "org/small", "there")
    assert entry.note.created.startswith("19")
    assert {file.path for file in entry.note.files.values()} == {str(moved)}


def test_other_autoencoders_are_noted_as_absolute_paths(
    model: Path, store: EngineStore, opener: Callable[..., Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_modules()["vae"].save_pretrained(model.parent / "vae")
    monkeypatch.chdir(model.parent)
    opener(Path(model.name), vae=Path("vae"))
    (entry,) = entries(store)
    assert (entry.note.path, entry.note.vae) == (str(model), str(model.parent / "vae"))
    assert len({file.path for file in entry.note.files.values()}) == 2


def test_a_note_that_cannot_be_written_hinders_nothing(
    model: Path, store: EngineStore, opener: Callable[..., Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    opener(model)
    moved = model.rename(store.root / model.name)

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("replace", "utime"):
        monkeypatch.setattr(os, name, failing)
    opener(moved)
    assert entries(store)[0].note.path == str(model)


def test_an_entry_is_no_package(model: Path, opener: Callable[..., Package]) -> None:
    entry = opener(model).root
    with pytest.raises(UsageError, match="is what the cache keeps of a checkpoint") as caught:
        open_model(entry, backend=lambda: "onnxruntime")
    assert caught.value.fix.endswith(str(model))
    change(entry, schema=0)
    with pytest.raises(UsageError, match="is what the cache keeps of a checkpoint"):
        open_model(entry, backend=lambda: "onnxruntime")


# ── torn, foreign, half made ─────────────────────────────────────────────────────────────────────────────

DAMAGE: dict[str, Callable[[Path], object]] = {
    "no note": lambda entry: (entry / OPENED).unlink(),
    "an empty note": lambda entry: (entry / OPENED).write_bytes(b""),
    "half a note": lambda entry: os.truncate(entry / OPENED, 40),
    "bytes": lambda entry: (entry / OPENED).write_bytes(b"\xff\xfe\x00"),
    "a list": lambda entry: (entry / OPENED).write_text("[]"),
    "another object": lambda entry: (entry / OPENED).write_text('{"schema": 1}'),
    "depth": lambda entry: (entry / OPENED).write_text("[" * 200_000),
    "a long note": lambda entry: (entry / OPENED).write_bytes(b" " * 2**21),
    "a folder as note": lambda entry: ((entry / OPENED).unlink(), (entry / OPENED).mkdir()),
    "a number as name": lambda entry: change(entry, name=5),
    "more fields": lambda entry: change(entry, more=""),
    "fewer fields": lambda entry: change(entry, path=None),
    "odd files": lambda entry: change(entry, files={"a": {"path": 1, "size": 1, "mtime_ns": 1}}),
    "no files": lambda entry: change(entry, files=[]),
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "a link": lambda entry: (entry.rename(entry.parent / "other"), entry.symlink_to(entry.parent / "other")),
    "a linked note": lambda entry: (
        (entry / OPENED).rename(entry / "other"),
        (entry / OPENED).symlink_to(entry / "other"),
    ),
    "a note that others can write": lambda entry: (entry / OPENED).chmod(0o666),
    "a file": lambda entry: (shutil.rmtree(entry), entry.write_bytes(b"x")),
}


def change(entry: Path, **values: Any) -> None:
    """Change fields of a note; None removes one."""
    data = {**json.loads((entry / OPENED).read_text()), **values}
    kept = {name: value for name, value in data.items() if value is not None}
    (entry / OPENED).write_text(json.dumps(kept))


@POSIX
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_not_listed_and_goes(store: EngineStore, damage: str) -> None:
    good, bad = put_entry(store, 1), put_entry(store, 2)
    DAMAGE[damage](bad)
    assert [entry.path for entry in entries(store)] == [good]
    assert [model.note.name for model in models(store)] == ["model1"]
    assert recall("model2", store=store.root) is None
    with pytest.raises((PackageError, StorageError)):
        load_entry(bad)
    pruned = prune(store)
    assert [(item.name, item.kind, item.label, item.why) for item in pruned.removed] == [
        (bad.name, "checkpoint", "", "damaged")
    ]
    assert (pruned.kept, good.is_dir(), os.path.lexists(bad)) == (1, True, False)


@POSIX
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_found_and_set_aside(store: EngineStore, damage: str) -> None:
    good, bad = put_entry(store, 1), put_entry(store, 2)
    DAMAGE[damage](bad)
    verdict = verify(store)
    assert [entry.path for entry in verdict.good] == [good]
    assert [name for name, _ in verdict.damaged] == [bad.name]
    assert not os.path.lexists(bad)
    assert store.why_aside(bad.name)
    assert verify(store).damaged == ()


def test_what_is_no_entry_is_left_alone(store: EngineStore) -> None:
    put_entry(store, 1)
    foreign = store.checkpoints / "notes of mine"
    foreign.mkdir()
    (store.checkpoints / ("f" * 63)).write_text("x")
    other = put_entry(store, 2)
    change(other, schema=99)  # of a later release
    assert load_entry(other) is None
    assert load_entry(store.checkpoints / ("0" * 64)) is None
    assert [entry.note.name for entry in entries(store)] == ["model1"]
    assert len(verify(store).good) == 1
    pruned = prune(store)
    assert (pruned.removed, pruned.kept) == ((), 2)
    assert foreign.is_dir()


@POSIX
def test_a_linked_folder_of_checkpoints_is_refused(store: EngineStore, tmp_path: Path) -> None:
    put_entry(store, 1)
    store.checkpoints.rename(tmp_path / "moved")
    store.checkpoints.symlink_to(tmp_path / "moved")
    for refused in (entries, models, verify, prune):
        with pytest.raises(StorageError, match="is a link"):
            refused(store)
    assert recall("model1", store=store.root) is None


@POSIX
def test_an_entry_that_others_can_write_is_not_opened(model: Path, opener: Callable[..., Package]) -> None:
    root = opener(model).root
    root.chmod(0o777)
    with pytest.raises(StorageError, match="is open to others"):
        opener(model)


@pytest.mark.parametrize(
    ("file", "words"),
    [("unet/loop.onnx", "has sha256"), (MANIFEST, "has changed"), ("unet/loop.onnx!", "is missing")],
)
def test_verify_hashes_what_is_kept(store: EngineStore, file: str, words: str) -> None:
    entry, other = put_entry(store, 1), put_entry(store, 2)
    path = entry / file.removesuffix("!")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.unlink() if file.endswith("!") else path.write_bytes(content)
    loaded = load_entry(entry)
    assert loaded is not None
    with pytest.raises(PackageError, match=words) as caught:
        loaded.check()
    assert "made ready anew" in caught.value.fix
    verdict = verify(store)
    assert ([item.path for item in verdict.good], [name for name, _ in verdict.damaged]) == (
        [other],
        [entry.name],
    )
    assert words in verdict.damaged[0][1]
    assert words in store.why_aside(entry.name)


def test_a_damaged_entry_that_was_set_aside_is_made_anew(
    model: Path, store: EngineStore, opener: Callable[..., Package]
) -> None:
    root = opener(model).root
    graph = root / "vae_decoder" / "model.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    assert [name for name, _ in verify(store).damaged] == [root.name]
    stages: list[str] = []
    assert opener(model, progress=lambda now: stages.append(now.stage)).root == root
    assert stages
    assert verify(store).damaged == ()
    assert prune(store).freed_bytes > 0  # the quarantine
    assert [entry.path for entry in entries(store)] == [root]


# ── what became of the user's files ──────────────────────────────────────────────────────────────────────


def test_the_state_of_a_file(model: Path, store: EngineStore, opener: Callable[..., Package]) -> None:
    opener(model)
    (entry,) = entries(store)
    os.utime(model, (1e9, 1e9))
    assert entry.state == "changed"
    kept = model.rename(model.with_name("kept"))
    assert entry.state == "gone"
    model.write_bytes(b"another")
    assert entry.state == "changed"
    model.unlink()
    shutil.rmtree(model.parent)  # as a disk that is not there
    assert not kept.exists()
    assert entry.state == "gone"
    assert verify(store).good == (entry,)  # nothing of ours is damaged
    assert prune(store).removed == ()  # and the disk may come back


def test_a_file_that_was_put_back_has_not_changed(
    model: Path, store: EngineStore, opener: Callable[..., Package]
) -> None:
    opener(model).close()
    (entry,) = entries(store)
    content = model.read_bytes()
    os.utime(model, ns=(0, 10**18))
    assert (entry.state, state_by_content(store, entry)) == ("changed", "there")
    model.write_bytes(content[:-2] + b"\0\1")
    assert state_by_content(store, entry) == "changed"
    model.write_bytes(b"half")  # whose header cannot be read
    assert state_by_content(store, entry) == "changed"
    (entry.path / MANIFEST).write_text("{}")
    with pytest.raises(PackageError, match=r"manifest\.json is damaged"):
        state_by_content(store, entry)
    model.unlink()
    assert state_by_content(store, entry) == "gone"


def test_one_entry_is_removed_by_its_name(store: EngineStore) -> None:
    first, second, third = (put_entry(store, number) for number in (1, 2, 3))
    (loaded,) = (entry for entry in entries(store) if entry.path == first)
    assert [item.why for item in prune(store, names=[loaded.note.name]).removed] == ["named"]
    assert [item.name for item in prune(store, names=[second.name]).removed] == [second.name]
    for name in ("nobody", "", third.name[:7]):
        with pytest.raises(UsageError, match=r"is no entry of the cache; .* latentrt cache ls"):
            prune(store, names=[name])
    assert [entry.path for entry in entries(store)] == [third]


def test_a_file_that_was_replaced_is_one_model_of_two_entries(
    model: Path, store: EngineStore, opener: Callable[..., Package]
) -> None:
    old = opener(model).root
    write_small(model, dtype=torch.float32)
    new = opener(model).root
    (found,) = models(store)
    assert [entry.path for entry in found.entries] == [new, old]
    assert [entry.state for entry in found.entries] == ["there", "changed"]
    assert found.size == sum(entry.size for entry in found.entries)


def test_models_are_listed_by_their_last_use(store: EngineStore, tmp_path: Path) -> None:
    place = str(tmp_path / "a.safetensors")
    put_entry(store, 1, days=5, path=place, dtype="fp16")
    put_entry(store, 2, days=3)
    put_entry(store, 3, days=1, path=place, hub="org/a", vae="/vae")
    found = models(store)
    assert [model.note.name for model in found] == ["a", "model2"]
    assert found[0].dtypes == ("fp16", "fp32")
    plain = found[0].to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["path"], plain["hub"], plain["vae"], plain["state"]) == (place, "org/a", "/vae", "gone")
    assert plain["entries"] == [f"{3:064x}", f"{1:064x}"]
    assert (plain["created"], plain["cache_bytes"]) == ("2026-11-29T08:00:00+00:00", found[0].size)


# ── what prune removes ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def both(store: EngineStore) -> EngineStore:
    """Two engines used 1 and 3 days ago, two opened checkpoints used 2 and 4 days ago; 40 kB each or so."""
    for number in (1, 3):
        entry = store.get_or_build(numbered(number), builder(b"x" * 38000))
        used = time.time() - number * DAY
        os.utime(entry.path / MANIFEST, (used, used))
    for number in (2, 4):
        put_entry(store, number, days=number, size=20000)
    return store


def left(store: EngineStore) -> list[int]:
    engines = [entry.key.workspace_limit for entry in store.entries()]
    return sorted([*engines, *(int(entry.path.name, 16) for entry in entries(store))])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 2, 3, 4]),
        ({"older_than_days": 2.5}, [1, 2]),
        ({"older_than_days": 3.5}, [1, 2, 3]),
        ({"everything": True}, []),
        ({"keep_bytes": 0}, []),
        ({"keep_bytes": 45000}, [1]),
        ({"everything": True, "dry_run": True}, [1, 2, 3, 4]),
    ],
)
def test_prune_counts_both_kinds(both: EngineStore, options: dict[str, Any], kept: list[int]) -> None:
    before = prune(both).kept_bytes
    pruned = prune(both, **options)
    assert left(both) == kept
    ages = [(item.kind, item.label) for item in pruned.removed]
    oldest_first = [
        ("checkpoint", "model4"),
        ("engine", "unet"),
        ("checkpoint", "model2"),
        ("engine", "unet"),
    ]
    assert ages == oldest_first[: len(ages)]
    if not options.get("dry_run"):
        assert len(ages) == 4 - len(kept)
    assert pruned.kept == 4 - len(ages)
    assert pruned.kept_bytes + sum(item.size for item in pruned.removed) == before
    assert list(both.building.iterdir()) == []


def test_an_entry_that_is_being_made_stays(both: EngineStore) -> None:
    busy = entries(both)[0]
    with both.try_lock(busy.path.name) as held:
        assert held
        assert len(prune(both, everything=True).removed) == 3
    assert [entry.path for entry in entries(both)] == [busy.path]


def test_an_entry_that_is_open_stays(
    model: Path, store: EngineStore, opener: Callable[..., Package], small_archive: Path
) -> None:
    """In any process; what a killed one held is free, and swept."""
    package, again = opener(model), opener(model)
    assert prune(store, everything=True).removed == ()
    package.close()
    package.close()
    assert prune(store, everything=True).removed == ()
    again.close()
    child = start(model, store.root, small_archive, end="wait")
    assert child.stdout.readline() == "found True\n"
    assert prune(store, everything=True).removed == ()
    child.kill()
    child.communicate()
    assert len(list(store.locks.glob("*.used-*"))) == 1
    prune(store)
    assert list(store.locks.glob("*.used-*")) == []
    assert len(prune(store, everything=True).removed) == 1


def test_prune_touches_no_file_of_the_user(
    model: Path, store: EngineStore, opener: Callable[..., Package]
) -> None:
    before = model.read_bytes(), model.stat().st_mtime_ns
    opener(model)
    assert len(prune(store, everything=True).removed) == 1
    assert (model.read_bytes(), model.stat().st_mtime_ns) == before
    assert list(model.parent.iterdir()) == [model]
    assert entries(store) == ()


def test_contents_of_files_that_are_gone_are_forgotten(
    small_file: Path, store: EngineStore, tmp_path: Path
) -> None:
    files = [Path(shutil.copy(small_file, tmp_path / f"{name}.safetensors")) for name in "ab"]
    read_contents(files, store)
    folder = store.caches / "contents"
    (folder / "odd").write_bytes(b"damaged")
    assert len(list(folder.iterdir())) == 3
    assert forget_gone(store, dry_run=True) == 7
    files[0].unlink()
    would = prune(store, dry_run=True).freed_bytes
    assert len(list(folder.iterdir())) == 3
    assert prune(store).freed_bytes == would > 7
    (known,) = folder.iterdir()
    assert json.loads(store.read_side_file(known))["path"] == str(files[1])
    assert forget_gone(store) == 0


def test_a_disk_that_does_not_answer_is_no_proof(
    small_file: Path, store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_contents([small_file], store)
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        if path == small_file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(contents.Path, "lstat", lstat)
    assert forget_gone(store) == 0


# ── several processes, and those that die ────────────────────────────────────────────────────────────────

CHILD = """
import os, signal, sys, time
from pathlib import Path
from latentrt.checkpoints.opened import Options, open_checkpoint
from latentrt.engines.backends import BACKENDS

model, store, archive, end = sys.argv[1:]
stages, notes = [], []

def progress(now):
    stages.append(now.stage)
    if now.stage == end:
        os.kill(os.getpid(), signal.SIGKILL)

options = Options(dtype="fp32", reads=BACKENDS["onnxruntime"].reads, templates=Path(archive))
package = open_checkpoint(
    Path(model), options, tokenize=None, store=Path(store), progress=progress, note=notes.append
)
assert (package.root / "manifest.json").is_file()
print("made" if "make unet" in stages else "found", package.root.parent.parent == Path(store))
print(*notes, sep="\\n", flush=True)
if end == "wait":
    time.sleep(600)
"""


def start(model: Path, store: Path, archive: Path, *, end: str = "", prefix: Any = ()) -> Any:
    command = [*prefix, sys.executable, "-c", CHILD, *map(str, (model, store, archive)), end]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(child: Any) -> list[str]:
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return str(out).splitlines()


def test_two_processes_make_one_entry(model: Path, store: EngineStore, small_archive: Path) -> None:
    children = [start(model, store.root, small_archive) for _ in range(2)]
    assert sorted(line for child in children for line in answer(child)[:1]) == ["found True", "made True"]
    assert len(entries(store)) == 1
    assert verify(store).damaged == ()
    assert [path.name for path in store.checkpoints.iterdir()] == [entries(store)[0].path.name]


@POSIX
def test_a_process_that_is_killed_leaves_nothing_that_counts(
    model: Path, store: EngineStore, small_archive: Path, opener: Callable[..., Package]
) -> None:
    child = start(model, store.root, small_archive, end="make vae_decoder")
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    (rest,) = store.checkpoints.iterdir()
    assert rest.name.startswith(".")  # what it had written
    assert (entries(store), models(store), recall("small", store=store.root)) == ((), (), None)
    assert verify(store).damaged == ()
    assert prune(store, dry_run=True).freed_bytes > 1000
    assert rest.exists()
    assert prune(store).freed_bytes > 1000
    assert list(store.checkpoints.iterdir()) == []
    assert opener(model).root.is_dir()


@POSIX
def test_the_next_opening_sweeps_too(
    model: Path, store: EngineStore, small_archive: Path, opener: Callable[..., Package]
) -> None:
    start(model, store.root, small_archive, end="make vae_decoder").communicate(timeout=120)
    root = opener(model).root
    assert list(store.checkpoints.iterdir()) == [root]


def test_whoever_waits_is_told_so(model: Path, store: EngineStore, opener: Callable[..., Package]) -> None:
    root = opener(model).root
    stages: list[str] = []
    with store.lock(root.name, "be busy", None):

        class StopError(Exception):
            pass

        def progress(now: Any) -> None:
            stages.append(now.stage)
            raise StopError

        with pytest.raises(StopError):
            opener(model, progress=progress)
    assert stages == [f"waiting for process {os.getpid()} to make the checkpoint ready (0 s)"]


# ── disks that are full, or cannot be written ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("converts", "room"),
    [(False, "room for 10 MB: the graphs"), (True, "room for 2[0-9] MB: the graphs and")],
)
def test_a_full_disk_loses_nothing_and_says_how_much_it_takes(
    model: Path,
    store: EngineStore,
    opener: Callable[..., Package],
    monkeypatch: pytest.MonkeyPatch,
    converts: bool,
    room: str,
) -> None:
    other = put_entry(store, 1)
    reads = ("F32",) if converts else READS
    real = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "vae_decoder":  # after text encoder, and more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(
            StorageError, match=r"No space left on device, with [1-9]\d+ bytes of it"
        ) as caught:
            opener(model, reads=reads)
    assert str(model) in caught.value.found
    assert caught.match(room)
    assert "latentrt cache prune" in caught.value.fix
    assert list(store.checkpoints.iterdir()) == [other]
    assert verify(store).damaged == ()
    assert opener(model, reads=reads).root.is_dir()


MOUNT_FULL = 'mount -t tmpfs -o size=100k none "$1" && shift && exec "$@"'
MOUNT_READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'


def mounted(script: str, folder: Path) -> list[str]:
    prefix = ["unshare", "-rm", "sh", "-c", script, "sh", str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    return prefix


@POSIX
def test_a_disk_that_is_really_full(model: Path, tmp_path: Path, small_archive: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    child = start(model, disk / "cache", small_archive, prefix=mounted(MOUNT_FULL, disk))
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "StorageError: " in err
    assert "No space left on device" in err
    assert "room for 10 MB" in err


@POSIX
def test_a_cache_that_cannot_be_written(
    model: Path, store: EngineStore, small_archive: Path, opener: Callable[..., Package]
) -> None:
    """A temporary one takes its place, and says so; what was made before is used where it is."""
    store.make()
    prefix = mounted(MOUNT_READ_ONLY, store.root)
    first, *notes = answer(start(model, store.root, small_archive, prefix=prefix))
    assert first == "made False"
    (note,) = [line for line in notes if "made ready anew each time" in line]
    assert "Read-only file system" in note
    assert entries(store) == ()
    opener(model)
    first, *notes = answer(start(model, store.root, small_archive, prefix=prefix))
    assert first == "found True"
    assert not [line for line in notes if "anew" in line]


@POSIX
def test_a_model_folder_that_cannot_be_written(model: Path, store: EngineStore, small_archive: Path) -> None:
    prefix = mounted(MOUNT_READ_ONLY, model.parent)
    assert answer(start(model, store.root, small_archive, prefix=prefix))[0] == "made True"
    assert [entry.state for entry in entries(store)] == ["there"]


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_cache_folder_that_is_none(
    model: Path, tmp_path: Path, opener: Callable[..., Package], place: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    if place == "link":
        (tmp_path / "link").symlink_to(tmp_path / "link")
    notes: list[str] = []
    package = opener(model, store=tmp_path / place, note=notes.append)
    assert package.root.is_dir()
    assert not package.root.is_relative_to(tmp_path)
    assert "the checkpoint is made ready anew each time: " in notes[-1]
    assert str(tmp_path / place.partition("/")[0]) in notes[-1]
    assert recall("small", store=tmp_path / place) is None


# ── short names ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def named(store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStore:
    """A model called `one` and three called `two`, of which one is gone; the current folder is empty."""
    for number, (place, name) in enumerate([("a", "one"), ("a", "two"), ("b", "two"), ("c", "two")], 1):
        path = tmp_path / place / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        put_entry(store, number, path=str(path))
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return store


def test_a_short_name_is_a_path(named: EngineStore, tmp_path: Path) -> None:
    assert locate("one", store=named.root) == tmp_path / "a" / "one.safetensors"


@pytest.mark.parametrize("name", ["One", "one.safetensors", "on", "a/one", "./one", "..\\one", "", "none"])
def test_other_names_are_not_short(named: EngineStore, name: str) -> None:
    assert recall(name, store=named.root) is None


def test_a_path_that_exists_goes_first(named: EngineStore) -> None:
    Path("one").mkdir()
    assert recall("one", store=named.root) is None
    assert locate("one", store=named.root) == Path("one")


def test_a_name_of_several_models(named: EngineStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two is the name of 2 models") as caught:
        locate("two", store=named.root)
    for place in "ab":  # the one in c is gone, and cannot be meant
        assert str(tmp_path / place / "two.safetensors") in caught.value.found
    assert str(tmp_path / "c") not in caught.value.found
    (tmp_path / "b" / "two.safetensors").unlink()
    assert locate("two", store=named.root) == tmp_path / "a" / "two.safetensors"


def test_a_model_whose_file_is_gone(named: EngineStore, tmp_path: Path) -> None:
    path = tmp_path / "a" / "one.safetensors"
    path.unlink()
    with pytest.raises(CheckpointError, match="which is gone") as caught:
        locate("one", store=named.root)
    assert str(path) in caught.value.found
    assert "pass the path where it is now" in caught.value.fix


def test_a_model_of_a_hub_whose_copy_is_gone_is_fetched_again(
    named: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[HubModel] = []
    monkeypatch.setattr(find, "download", lambda wanted, progress=None: fetched.append(wanted) or tmp_path)
    put_entry(named, 9, path=str(tmp_path / "gone" / "turbo"), hub="org/turbo@v2")
    assert locate("turbo", store=named.root) == tmp_path
    assert fetched == [HubModel(repository="org/turbo", revision="v2")]
    (tmp_path / "gone" / "turbo").mkdir(parents=True)
    assert locate("turbo", store=named.root) == tmp_path / "gone" / "turbo"
    assert len(fetched) == 1


def test_a_name_that_nobody_has(named: EngineStore) -> None:
    with pytest.raises(CheckpointError, match="none does not exist") as caught:
        locate("none", store=named.root)
    assert "latentrt models" in caught.value.expected


def test_a_short_name_is_opened_as_it_was_the_last_time(
    model: Path,
    store: EngineStore,
    small_archive: Path,
    opener: Callable[..., Package],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(store.root))
    monkeypatch.setattr(
        "latentrt.checkpoints.opened.Options", lambda **options: Options(**options, templates=small_archive)
    )
    small_modules()["vae"].save_pretrained(model.parent / "vae")
    opener(model)
    wanted = opener(model, vae=model.parent / "vae").root
    notes: list[str] = []

    def opened(name: str, **options: Any) -> Package:
        notes.clear()
        how = CheckpointOptions(dtype="fp32", **options)
        return open_model(name, backend=lambda: "onnxruntime", options=how, note=notes.append)

    assert opened("small").root == wanted
    opened_as = f"small is {model}, with vae {model.parent / 'vae'}"
    assert notes[0] == f"{opened_as}, as it was the last time; without that: -m {model}"
    assert opened("small", prediction_type="v_prediction").root != wanted  # which it has from now on
    again = opened("small")
    assert again.manifest.scheduler["prediction_type"] == "v_prediction"
    os.utime(model, (1e9, 1e9))
    opened("small")
    assert ", which has changed since it was opened" in notes[0]
    plain = opened(str(model))
    assert plain.root != wanted
    assert not [line for line in notes if line.startswith("small is ")]
    assert opened("small").root == plain.root


def test_a_hub_models_name_is_kept(
    model: Path, store: EngineStore, small_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(store.root))
    monkeypatch.setattr(
        "latentrt.checkpoints.opened.Options", lambda **options: Options(**options, templates=small_archive)
    )
    monkeypatch.setattr(find, "download", lambda wanted, progress=None: model)
    for name in ("org/small@main", "small"):
        open_model(name, backend=lambda: "onnxruntime")
        (entry,) = entries(store)
        assert (entry.note.hub, entry.note.path) == ("org/small@main", str(model))
