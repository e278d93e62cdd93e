"""The store by itself, in one process: hits, misses and their reasons, damage, upkeep, side files."""

import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import EngineError, LatentrtError, UsageError
from latentrt.engines.store.engine_store import EngineStore, Entry, Miss, seal
from latentrt.engines.store.folder import default_root
from latentrt.engines.store.key import SCHEMA, EngineKey, canonical_sha256
from tests.engines.engine_keys import KEY, OTHER, builder, numbered

CONTENT = random.Random(1).randbytes(2000)


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


def reason(store: EngineStore, key: EngineKey = KEY) -> str:
    found = store.find(key)
    assert isinstance(found, Miss)
    assert found.key == key
    assert "\n" not in found.reason
    return found.reason


def rewrite(entry: Entry, **changes: Any) -> None:
    """Change the manifest as someone would who knows about its check sum."""
    (entry.path / "manifest.json").write_bytes(seal({**entry.to_json(), **changes}))


# ── hits and misses ──────────────────────────────────────────────────────────────────────────────────────


def test_an_engine_is_built_once_and_its_manifest_says_how(store: EngineStore) -> None:
    assert not store.root.exists()
    assert reason(store) == "no engine of unet for tensorrt-rtx has been built yet"
    assert not store.root.exists()
    built = store.get_or_build(KEY, builder(CONTENT, activations=[1, 2], peak=3.5))
    again = store.get_or_build(KEY, builder(b"never"))
    assert store.find(KEY) == again == built
    assert again.read() == CONTENT
    assert again.size == len(CONTENT)
    assert again.facts == {"activations": [1, 2], "peak": 3.5}
    assert again.producer.startswith("latentrt ")
    assert again.created.endswith("+00:00")
    assert again.build_seconds >= 0
    manifest = json.loads((store.engines / KEY.digest / "manifest.json").read_bytes())
    assert manifest.pop("check")
    assert manifest == again.to_json()
    assert sorted(path.name for path in store.root.iterdir()) == [
        "building", "caches", "checkpoints", "engines", "locks", "quarantine",
    ]  # fmt: skip
    assert list(store.building.iterdir()) == []


@pytest.mark.parametrize("name", [item.name for item in fields(EngineKey)])
def test_each_field_changed_alone_is_a_miss_that_names_it(store: EngineStore, name: str) -> None:
    store.get_or_build(KEY, builder(CONTENT))
    why = reason(store, replace(KEY, **{name: OTHER[name]}))
    assert why.startswith(f"the nearest engine, of unet, differs in {name} (")
    assert " there, " in why
    assert all(f" {item.name} (" not in why for item in fields(EngineKey) if item.name != name)


def test_rebuild_replaces_the_engine_and_an_entry_found_before_reads_the_new_one(store: EngineStore) -> None:
    old = store.get_or_build(KEY, builder(CONTENT))
    assert store.get_or_build(KEY, builder(b"new"), rebuild=True).read() == b"new"
    assert old.read() == b"new"
    assert store.verify().damaged == ()
    assert list(store.quarantine.iterdir()) == []


def test_entries_are_listed_by_their_last_use(store: EngineStore) -> None:
    assert store.entries() == ()
    for number in range(3):
        entry = store.get_or_build(numbered(number), builder(b"x"))
        os.utime(entry.path / "manifest.json", (number + 1, number + 1))
    assert [entry.key.workspace_limit for entry in store.entries()] == [2, 1, 0]
    store.entries()[-1].read()
    assert [entry.key.workspace_limit for entry in store.entries()] == [0, 2, 1]
    assert time.time() - store.entries()[0].last_used < 60


def test_an_entry_of_another_release_is_neither_used_nor_called_damaged(store: EngineStore) -> None:
    entry = store.get_or_build(KEY, builder(CONTENT))
    other = replace(KEY, schema=SCHEMA + 1)
    rewrite(entry, schema=SCHEMA + 1, key=other.to_json())
    entry.path.rename(store.engines / other.digest)
    assert store.entries() == ()
    assert isinstance(store.find(other), Miss)
    assert store.verify().damaged == ()
    assert store.prune().kept == 1


@pytest.mark.parametrize(
    ("variables", "root"),
    [
        ({"LATENTRT_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/latentrt"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/latentrt"),
        ({}, "/home/me/.cache/latentrt"),
        ({"platform": "darwin"}, "/home/me/Library/Caches/latentrt"),
        ({"platform": "win32", "LOCALAPPDATA": "/local"}, "/local/latentrt/cache"),
        ({"platform": "win32"}, "/home/me/AppData/Local/latentrt/cache"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="the paths are spelled for POSIX")
def test_default_root(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], root: str) -> None:
    for name in ("LATENTRT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("sys.platform", variables.pop("platform", "linux"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_root() == EngineStore().root == Path(root)


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────


def flips(size: int, count: int) -> list[tuple[int, int]]:
    generator = random.Random(2)
    return [(generator.randrange(size), generator.randrange(1, 256)) for _ in range(count)]


class MissError(Exception):
    """There is no engine to deserialise."""


def deserialise(store: EngineStore, calls: list[bytes]) -> None:
    """What a backend does: the engine of KEY goes to the library, once it is known to be whole."""
    found = store.find(KEY)
    if isinstance(found, Miss):
        raise MissError(found.reason)
    calls.append(found.read())


def check_refused(store: EngineStore, contents: list[bytes], refused: type[Exception]) -> None:
    """Each damaged engine is refused before deserialising, quarantined, and built again by the next call."""
    file = "engine.bin"
    calls: list[bytes] = []
    for number, content in enumerate(contents):
        entry = store.get_or_build(KEY, builder(CONTENT))
        assert content != (entry.path / file).read_bytes()
        (entry.path / file).write_bytes(content)
        with pytest.raises(refused):
            deserialise(store, calls)
        assert not entry.path.exists()
        assert (store.quarantine / KEY.digest / file).read_bytes() == content
        assert "was damaged and is in quarantine: " in reason(store)
        if number % 10:  # nine of ten are mended by hand, which is quicker than a build
            (store.quarantine / KEY.digest).rename(entry.path)
            (entry.path / file).write_bytes(CONTENT)
    assert calls == []
    store.get_or_build(KEY, builder(CONTENT))
    deserialise(store, calls)
    assert calls == [CONTENT]


def test_200_flipped_bytes_of_an_engine_are_refused_before_deserialising(store: EngineStore) -> None:
    positions = flips(len(CONTENT), 200)
    contents = [CONTENT[:at] + bytes([CONTENT[at] ^ mask]) + CONTENT[at + 1 :] for at, mask in positions]
    check_refused(store, contents, EngineError)


def test_50_truncations_of_an_engine_are_refused_before_deserialising(store: EngineStore) -> None:
    lengths = [0, 1, len(CONTENT) - 1, *random.Random(3).sample(range(2, len(CONTENT) - 1), 47)]
    # `find` sees the size already
    check_refused(store, [CONTENT[:length] for length in lengths], MissError)


@pytest.mark.parametrize("size", [0, 1999, 2001])
def test_an_engine_whose_size_changes_after_it_was_found_is_refused(store: EngineStore, size: int) -> None:
    entry = store.get_or_build(KEY, builder(CONTENT))
    (entry.path / "engine.bin").write_bytes((CONTENT + b"x")[:size])
    with pytest.raises(EngineError, match=f"has {size} bytes; expected 2000 bytes"):
        entry.read()
    assert (store.quarantine / KEY.digest).is_dir()


def test_flips_and_truncations_of_a_manifest_are_a_miss(store: EngineStore) -> None:
    calls: list[bytes] = []
    entry = store.get_or_build(KEY, builder(CONTENT, text='a "quoted" line', number=0.1))
    good = (entry.path / "manifest.json").read_bytes()
    wrong = [good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :] for at, mask in flips(len(good), 200)]
    wrong += [good[:length] for length in random.Random(3).sample(range(len(good)), 50)]
    wrong += [good + b" ", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b" " * (2**20 + 1)]
    for content in wrong:
        (entry.path / "manifest.json").write_bytes(content)
        with pytest.raises(MissError, match="the engine of unet was damaged: "):
            deserialise(store, calls)
        (store.quarantine / KEY.digest).rename(entry.path)
    (entry.path / "manifest.json").write_bytes(good)
    deserialise(store, calls)
    assert calls == [CONTENT]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"key": OTHER}, "it describes another engine"),
        ({"key": 1}, "it describes another engine"),
        ({"size": "2000"}, "2000 bytes"),
        ({"size": 1}, "has 2000 bytes"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_a_sealed_manifest_that_does_not_fit_is_a_miss(
    store: EngineStore, changes: dict[str, Any], why: str
) -> None:
    rewrite(store.get_or_build(KEY, builder(CONTENT)), **changes)
    assert why in reason(store)


def test_a_sealed_manifest_with_an_impossible_key_is_a_miss(store: EngineStore) -> None:
    entry = store.get_or_build(KEY, builder(CONTENT))
    impossible = {**KEY.to_json(), "dtype": "int8"}
    rewrite(entry, key=impossible)
    moved = entry.path.rename(store.engines / canonical_sha256(impossible))
    assert store.verify().damaged[0][0] == moved.name


@pytest.mark.parametrize("file", ["engine.bin", "manifest.json"])
def test_a_missing_file_is_a_miss(store: EngineStore, file: str) -> None:
    (store.get_or_build(KEY, builder(CONTENT)).path / file).unlink()
    assert "was damaged" in reason(store)


def test_a_removed_entry_says_so_when_read(store: EngineStore) -> None:
    entry = store.get_or_build(KEY, builder(CONTENT))
    store.prune(everything=True)
    with pytest.raises(
        EngineError, match=r"engine\.bin is missing; expected a file\..*latentrt build PACKAGE"
    ):
        entry.read()


def test_a_damaged_entry_stays_where_it_is_while_someone_holds_its_lock(store: EngineStore) -> None:
    entry = store.get_or_build(KEY, builder(CONTENT))
    (entry.path / "engine.bin").write_bytes(CONTENT[::-1])
    refused: list[EngineError] = []

    def read_damaged() -> None:
        with pytest.raises(EngineError) as caught:
            entry.read()
        refused.append(caught.value)

    with store.try_lock(KEY.digest) as held:
        assert held
        in_thread(read_damaged)
        assert entry.path.exists()
        in_thread(store.verify)
        assert entry.path.exists()
    assert len(refused) == 1
    with pytest.raises(EngineError, match=r"has sha256 .*; expected .* as its manifest says"):
        entry.read()
    assert not entry.path.exists()


def test_find_uses_what_was_repaired_while_it_took_the_lock(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = store.get_or_build(KEY, builder(CONTENT))
    (entry.path / "engine.bin").write_bytes(b"")
    take = EngineStore._acquire

    def repaired(*arguments: Any) -> bool:
        (entry.path / "engine.bin").write_bytes(CONTENT)
        return take(*arguments)

    monkeypatch.setattr(EngineStore, "_acquire", repaired)
    assert store.find(KEY) == entry


def in_thread(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_verify_hashes_every_engine_and_moves_the_damaged_aside(store: EngineStore) -> None:
    good, bad = (store.get_or_build(numbered(number), builder(CONTENT)) for number in (1, 2))
    (bad.path / "engine.bin").write_bytes(CONTENT[::-1])
    assert len(store.entries()) == 2  # a listing does not read engines
    verdict = store.verify()
    assert verdict.good == (good,)
    [(name, why)] = verdict.damaged
    assert name == bad.path.name
    assert "has sha256" in why
    assert store.verify().damaged == ()


# ── side files ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_side_file_reads_as_written_or_as_nothing(store: EngineStore) -> None:
    path = store.side_file("timing", "tensorrt-11.1_sm_89.bin")
    assert path == store.root / "caches" / "timing" / "tensorrt-11.1_sm_89.bin"
    assert store.read_side_file(path) == b""
    for data in (CONTENT, b"", b"new"):
        store.write_side_file(path, data)
        assert store.read_side_file(path) == data
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert list(store.building.iterdir()) == []
    good = path.read_bytes()
    for at, mask in flips(len(good), 40):
        path.write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
        assert store.read_side_file(path) == b""
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert store.read_side_file(path) == b""


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", ".x", "a b", "a\0", "ä"])
def test_a_side_file_has_a_plain_name(store: EngineStore, name: str) -> None:
    for kind, file in ((name, "x"), ("x", name)):
        with pytest.raises(UsageError, match="a side file called"):
            store.side_file(kind, file)


def test_a_side_file_that_cannot_be_written_keeps_the_old_one(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.side_file("runtime", "x")
    store.write_side_file(path, b"old")

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(LatentrtError, match="could not be written: Permission denied"):
        store.write_side_file(path, b"new")
    assert store.read_side_file(path) == b"old"
    assert list(store.building.iterdir()) == []
