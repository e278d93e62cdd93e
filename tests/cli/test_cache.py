"""`latentrt cache`, as a person or a script calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt import cli
from latentrt.engines.store.engine_store import EngineStore
from tests.engines.engine_keys import builder, numbered


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStore:
    """Two engines of 9 kB in the user's own store, the second one used last."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "store"))
    store = EngineStore()
    for number in (1, 2):
        entry = store.get_or_build(numbered(number), builder(b"x" * 9000, peak=number))
        os.utime(entry.path / "manifest.json", (number * 1e6, number * 1e6))
    return store


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call `latentrt cache`: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", "cache", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_ls(cache: Any, store: EngineStore) -> None:
    code, out, err = cache("ls")
    assert (code, err) == (0, "")
    first, second, total = out.splitlines()
    assert first.startswith(f"{numbered(2).digest[:12]}  unet ")
    assert second.startswith(f"{numbered(1).digest[:12]}  unet ")
    assert "tensorrt-rtx 1.6.0, fp16, NVIDIA GeForce RTX 4090 (sm_89), 512x512:b1-4 768x768:b1" in first
    assert total == f"2 engines, 0.0 MB in {store.root}"


def test_ls_json(cache: Any, store: EngineStore) -> None:
    found = json.loads(cache("ls", "--json")[1])
    assert (found["store"], found["bytes"]) == (str(store.root), 18000)
    entry = found["entries"][0]
    assert entry["digest"] == numbered(2).digest
    assert entry["key"] == numbered(2).to_json()
    assert (entry["size"], entry["last_used"], entry["facts"]) == (9000, 2_000_000, {"peak": 2})


def test_another_store(cache: Any, store: EngineStore, tmp_path: Path) -> None:
    assert cache("ls", "--store", str(tmp_path / "x"))[1] == f"0 engines, 0.0 MB in {tmp_path / 'x'}\n"
    assert not (tmp_path / "x").exists()
    other = EngineStore(tmp_path / "y")
    other.get_or_build(numbered(1), builder(b"x"))
    assert cache("prune", "--all", "--store", str(other.root))[0] == 0
    assert other.entries() == ()
    assert len(store.entries()) == 2


def test_verify(cache: Any, store: EngineStore) -> None:
    assert cache("verify") == (0, f"2 engines undamaged in {store.root}\n", "")
    assert json.loads(cache("verify", "--json")[1])["good"] == sorted(numbered(n).digest for n in (1, 2))


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_exits_3_for_a_damaged_engine(cache: Any, store: EngineStore, as_json: bool) -> None:
    (store.entries()[0].path / "engine.bin").write_bytes(b"y" * 9000)
    code, out, err = cache("verify", *["--json"] * as_json)
    assert code == 3
    found = json.loads(out)["error"]["found"] if as_json else err
    assert f"1 of 2 engines damaged ({numbered(2).digest[:12]}: " in found
    assert as_json or "latentrt cache prune removes them" in err
    assert cache("verify")[0] == 0


def test_prune_without_options_keeps_every_good_engine(cache: Any, store: EngineStore) -> None:
    (store.entries()[0].path / "manifest.json").write_bytes(b"")
    code, out, _ = cache("prune")
    assert code == 0
    assert out.splitlines()[0].endswith("damaged")
    assert out.splitlines()[1].startswith("removed 1 engine, 0.0 MB with what killed builds left; 1 engine, ")


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep", "15kB"], [2]),
        (["--keep", "0"], []),
        (["--keep", "1.5 GB"], [1, 2]),
        (["--keep", "20000B"], [1, 2]),
        (["--older-than", "1"], []),
        (["--all"], []),
        (["--all", "--dry-run"], [1, 2]),
    ],
)
def test_prune(cache: Any, store: EngineStore, options: list[str], kept: list[int]) -> None:
    code, out, err = cache("prune", *options, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert sorted(entry.key.workspace_limit for entry in store.entries()) == kept
    assert found["dry_run"] is ("--dry-run" in options)
    if not found["dry_run"]:
        assert len(found["removed"]) == 2 - len(kept)
        assert (found["kept"], found["kept_bytes"] > 0) == (len(kept), bool(kept))
    assert all(set(item) == {"name", "kind", "label", "size", "why"} for item in found["removed"])


def test_a_dry_run_says_would(cache: Any, store: EngineStore) -> None:
    lines = cache("prune", "--all", "--dry-run")[1].splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == [
        f"would remove {numbered(number).digest[:12]}" for number in (1, 2)
    ]
    assert lines[2].startswith("would remove 2 engines, ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["prune", "--keep", "much"],
            2,
            "--keep is 'much'; expected a size. Write it like 500MB, 20GB or 0.",
        ),
        (["prune", "--keep", "-1"], 2, "--keep is '-1'"),
        (["prune", "--older-than", "-1"], 2, "--older-than"),
        (["ls", "--store", __file__], 7, "is not a folder"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_errors(cache: Any, store: EngineStore, arguments: list[str], code: int, message: str) -> None:
    found, out, err = cache(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert len(store.entries()) == 2


@pytest.mark.parametrize("verb", [[], ["ls"], ["verify"], ["prune"]])
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['latentrt', 'cache', *sys.argv[1:], '--help']\n"
        "from latentrt import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'filelock', 'rich', 'latentrt.engines.store.engine_store'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code, *verb], check=True, stdout=subprocess.DEVNULL, timeout=60)
