"""What `prune` removes: the least recently used first, and never what somebody builds."""

import os
import threading
import time
from pathlib import Path

import pytest

from latentrt.engines.errors import StorageError
from latentrt.engines.store.engine_store import EngineStore, Entry, Pruned
from tests.engines.engine_keys import KEY, builder, numbered

DAY = 86400


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    """Four engines of about 10 kB, last used 1, 2, 3 and 4 days ago."""
    store = EngineStore(tmp_path / "store")
    for number in range(1, 5):
        entry = store.get_or_build(numbered(number), builder(b"x" * 9000))
        used = time.time() - number * DAY
        os.utime(entry.path / "manifest.json", (used, used))
    return store


def left(store: EngineStore) -> list[int]:
    return sorted(entry.key.workspace_limit for entry in store.entries())


def days(pruned: Pruned) -> list[int]:
    names = {numbered(number).digest: number for number in range(1, 5)}
    return [names[item.name] for item in pruned.removed]


def test_nothing_is_asked_nothing_goes(store: EngineStore) -> None:
    pruned = store.prune()
    assert (pruned.removed, pruned.freed_bytes, pruned.kept) == ((), 0, 4)
    assert 36000 < pruned.kept_bytes < 48000
    assert left(store) == [1, 2, 3, 4]


def test_keep_bytes_removes_the_least_recently_used_first(store: EngineStore) -> None:
    before = store.prune().kept_bytes
    pruned = store.prune(keep_bytes=25000)
    assert days(pruned) == [4, 3]
    assert {(item.label, item.why) for item in pruned.removed} == {("unet", "least recently used")}
    assert left(store) == [1, 2]
    assert pruned.kept == 2
    assert pruned.kept_bytes <= 25000
    assert pruned.kept_bytes + pruned.freed_bytes == before
    assert list(store.building.iterdir()) == []


def test_older_than_days(store: EngineStore) -> None:
    pruned = store.prune(older_than_days=2.5)
    assert days(pruned) == [4, 3]
    assert pruned.removed[0].why == "not used for 2.5 days"
    store.entries()[-1].read()
    assert days(store.prune(older_than_days=1.5)) == []


def test_a_dry_run_says_the_same_and_removes_nothing(store: EngineStore) -> None:
    orphan = store.building / f"{KEY.digest}-x"
    orphan.mkdir()
    (orphan / "engine.bin").write_bytes(b"x" * 500)
    dry = store.prune(keep_bytes=25000, dry_run=True)
    assert left(store) == [1, 2, 3, 4]
    assert orphan.exists()
    assert store.prune(keep_bytes=25000) == dry
    assert not orphan.exists()


def test_everything(store: EngineStore) -> None:
    side = store.side_file("timing", "x")
    store.write_side_file(side, b"x")
    store.prune()
    assert side.exists()
    pruned = store.prune(everything=True)
    assert (len(pruned.removed), pruned.kept, pruned.kept_bytes) == (4, 0, 0)
    assert list(store.engines.iterdir()) == []
    assert not side.exists()
    store.get_or_build(KEY, builder(b"x"))


def test_an_entry_whose_lock_is_held_stays(store: EngineStore) -> None:
    results: list[Pruned] = []

    def prune() -> None:
        results.append(store.prune(everything=True))

    with store.try_lock(numbered(3).digest) as held:
        assert held
        thread = threading.Thread(target=prune)
        thread.start()
        thread.join(timeout=30)
    assert days(results[0]) == [4, 2, 1]
    assert results[0].kept == 1
    assert left(store) == [3]


def test_damaged_entries_and_quarantine_always_go(store: EngineStore) -> None:
    first, second, third, _ = store.entries()
    (first.path / "manifest.json").write_bytes(b"{}")
    (second.path / "engine.bin").write_bytes(b"y" * 9000)
    assert store.verify().damaged != ()
    (third.path / "engine.bin").unlink()
    pruned = store.prune()
    assert [(item.name, item.label, item.why) for item in pruned.removed] == [
        (third.path.name, "", "damaged")
    ]
    assert pruned.freed_bytes > 18000
    assert list(store.quarantine.iterdir()) == []
    assert len(left(store)) == 1


def test_strangers_in_the_folder_are_left_alone(store: EngineStore) -> None:
    strangers = [store.engines / "notes.txt", store.building / "notes", store.building / "x-y"]
    for path in strangers:
        path.write_bytes(b"x")
    store.prune(everything=True)
    assert all(path.exists() for path in strangers)


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_a_linked_entry_goes_without_what_it_points_to(store: EngineStore, tmp_path: Path) -> None:
    entry = store.entries()[0]
    elsewhere = entry.path.rename(tmp_path / "elsewhere")
    entry.path.symlink_to(elsewhere)
    stray = store.engines / ("0" * 64)
    stray.write_bytes(b"a file, not a folder")
    assert len(store.prune().removed) == 2
    assert not entry.path.is_symlink()
    assert not stray.exists()
    assert (elsewhere / "engine.bin").exists()


def test_an_entry_that_cannot_be_removed(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(StorageError, match="could not be removed: Permission denied"):
        store.prune(everything=True)
    assert left(store) == [1, 2, 3, 4]


def test_pruning_nothing(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "none")
    assert store.prune(everything=True) == Pruned(removed=(), freed_bytes=0, kept=0, kept_bytes=0)
    assert store.verify().good == ()
    assert not store.root.exists()


def test_an_entry_that_went_has_no_last_use(store: EngineStore) -> None:
    entry: Entry = store.entries()[0]
    store.prune(everything=True)
    assert entry.last_used == 0.0
