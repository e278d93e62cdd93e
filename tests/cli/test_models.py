"""`latentrt models`, the names that other commands take, and `latentrt cache` with opened checkpoints."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentrt import cli
from latentrt.checkpoints.entries import entries
from latentrt.checkpoints.opened import Options
from latentrt.engines.package import MANIFEST
from latentrt.engines.store.engine_store import EngineStore
from tests.checkpoints.cache_entries import put_entry
from tests.checkpoints.conftest import write_lora
from tests.engines.engine_keys import builder, numbered


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStore:
    """The user's own store, empty; the current folder is empty too."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "store"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return EngineStore()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call `latentrt`: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def small(
    small_file: Path, small_archive: Path, store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A checkpoint outside the current folder, which the templates of the tests serve."""
    monkeypatch.setattr(
        "latentrt.checkpoints.opened.Options", lambda **options: Options(**options, templates=small_archive)
    )
    (tmp_path / "models").mkdir()
    return Path(shutil.copy(small_file, tmp_path / "models" / "small.safetensors"))


def draw(call: Any, model: object, name: str, *more: str) -> tuple[int, str, str]:
    size = ["--width", "64", "--height", "64", "--steps", "1", "--seed", "1"]
    return call("generate", "a fox", "-m", str(model), *size, "-o", name, "--backend", "onnxruntime", *more)


# ── the list ─────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_was_opened(call: Any, store: EngineStore) -> None:
    code, out, err = call("models")
    assert (code, err) == (0, "")
    assert out.startswith("no checkpoint was opened yet")
    assert json.loads(call("models", "--json")[1]) == {"store": str(store.root), "models": []}
    assert not store.root.exists()


def test_the_list(call: Any, store: EngineStore, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x" * 10)
    seen = {"path": str(file), "mtime_ns": file.stat().st_mtime_ns}
    files = {"unet/a.safetensors": {**seen, "size": 10}}
    put_entry(store, 1, days=3, path=str(file), dtype="fp16", size=70_000)
    put_entry(store, 2, days=2, hub="org/long-name@v2", size=2_000_000, family="sdxl-refiner")
    entry = put_entry(store, 3, days=1, path=str(file), vae="/vae", prediction_type="v_prediction")
    note = json.loads((entry / "opened.json").read_text())
    used = (entry / "opened.json").stat().st_mtime
    (entry / "opened.json").write_text(json.dumps({**note, "files": files}))
    os.utime(entry / "opened.json", (used, used))
    code, out, err = call("models")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
    assert first.split() == [
        *["a", "sd1", "fp16,fp32", "0.0", "MB", "0.1", "MB", "in", "the", "cache", "used"],
        *[*when.split(), f"{file},", "with", "vae", "/vae,", "with", "prediction_type", "v_prediction"],
    ]
    assert second.split()[:7] == ["model2", "sdxl-refiner", "fp32", "0.0", "MB", "2.0", "MB"]
    assert second.endswith(f"org/long-name@v2: {store.root / 'model2.safetensors'}  (gone)")
    assert first.index("used") == second.index("used")
    found = json.loads(call("models", "--json")[1])["models"]
    assert [(model["name"], model["state"]) for model in found] == [("a", "there"), ("model2", "gone")]
    assert (found[0]["weights_bytes"], found[0]["dtypes"]) == (10, ["fp16", "fp32"])
    file.write_bytes(b"y" * 11)
    first = call("models")[1].splitlines()[0]
    assert first.endswith("(changed since: it is made ready anew when it is opened)")


def test_controls_are_listed_with_their_kind(call: Any, store: EngineStore, tmp_path: Path) -> None:
    put_entry(store, 1, days=1, control="t2i-adapter", family="sdxl")
    picture = tmp_path / "white.png"
    Image.new("RGB", (128, 128), "white").save(picture)
    controls = ["--control-net", "edges", "--control-image", str(picture)]
    controls += ["--ip-adapter", "likeness", "--ip-adapter-image", str(picture)]
    drawn = ["generate", "a star", "--steps", "1", "--seed", "1", "-o", str(tmp_path / "a.png")]
    assert call(*drawn, *controls)[0] == 0
    found = json.loads(call("models", "--json")[1])["models"]
    kinds = {"edges": "controlnet", "likeness": "ip-adapter", "model1": "t2i-adapter"}
    assert {one["name"]: one["control"] for one in found} == kinds
    for listed in (call("models")[1], call("cache", "ls")[1]):
        assert "t2i-adapter for sdxl" in listed
        for kind in ("controlnet", "ip-adapter"):
            assert f"{kind} for sd1" in listed


def test_names_that_hold_control_characters_stay_in_one_line(call: Any, store: EngineStore) -> None:
    put_entry(store, 1, name="a\x1b[2J\nb", path="/models/a\nb")
    for command in ("models", "cache ls", "cache verify", "cache prune --all --dry-run"):
        out = call(*command.split())[1]
        assert "\x1b" not in out
        assert "a\nb" not in out


def test_another_store(call: Any, store: EngineStore, tmp_path: Path) -> None:
    put_entry(EngineStore(tmp_path / "other"), 1)
    assert "model1" in call("models", "--store", str(tmp_path / "other"))[1]
    assert "model1" not in call("models")[1]


def test_a_store_that_is_none(call: Any, store: EngineStore) -> None:
    store.root.write_text("no folder")
    code, out, err = call("models")
    assert (code, out) == (7, "")
    assert "is not a folder" in err


# ── names, where a command takes a model ─────────────────────────────────────────────────────────────────


def test_a_name_draws_what_its_path_draws(call: Any, small: Path, store: EngineStore) -> None:
    code, _, err = draw(call, "small", "none.png")
    assert code == 3
    assert "small does not exist" in err
    assert "latentrt models" in err
    assert draw(call, small, "path.npy")[0] == 0
    assert "small" in call("models")[1]
    code, _, err = draw(call, "small", "name.npy")
    assert code == 0
    assert f"small is {small}" in err
    assert Path("name.npy").read_bytes() == Path("path.npy").read_bytes()
    (entry,) = entries(store)
    assert entry.last_used > time.time() - 60


def test_a_picture_says_what_its_model_was_opened_with(call: Any, small: Path) -> None:
    """And a name brings that back, which its path does not."""
    assert draw(call, small, "v.png", "--prediction-type", "v_prediction", "--dtype", "fp32")[0] == 0
    record = json.loads(call("metadata", "v.png", "--json")[1])["record"]
    assert record["opened_with"] == {"dtype": "fp32", "prediction_type": "v_prediction"}
    code, _, err = call("generate", "--from", "v.png", "-o", "w.png")
    assert code == 2
    assert "Pass it: --model MODEL --dtype fp32 --prediction-type v_prediction" in err
    again = "generate", "--from", "v.png", "--backend", "onnxruntime", "-o", "again.png", "-m"
    code, _, err = call(*again, "small")
    assert (code, "differ" in err) == (0, False)
    assert f"with prediction_type v_prediction, as it was the last time; without that: -m {small}" in err
    code, _, err = call(*again, str(small))
    assert (code, "as it was the last time" in err) == (0, False)
    assert "It was opened with --dtype fp32 --prediction-type v_prediction; open it so:" in err


def test_a_name_brings_adapters_along(call: Any, small: Path, tmp_path: Path) -> None:
    """Those that are part of its weights, their strengths and the steps that were asked for with them."""
    lora = write_lora(tmp_path / "fast: 2.safetensors", small, {"unet": "attn", "text_encoder": "_proj"})
    fused = "--fuse-lora", f"{lora}:0.5:-0.25", "--few-steps", "lcm"
    assert draw(call, small, "fused.png", *fused)[0] == 0
    record = json.loads(call("metadata", "fused.png", "--json")[1])["record"]
    strength = {"unet": 0.5, "text_encoder": -0.25, "text_encoder_2": -0.25}
    sha256 = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert record["opened_with"] == {
        "fused": [{"name": lora.name, "sha256": sha256, "strength": strength}],
        "few_steps": "lcm",
    }
    code, _, err = draw(call, "small", "again.png")
    assert (code, f"with few_steps lcm, with fused {lora}:0.5:-0.25, as it was the last time" in err) == (
        0,
        True,
    )
    again = json.loads(call("metadata", "again.png", "--json")[1])["record"]
    assert again["opened_with"] == record["opened_with"]
    assert Path("again.png").read_bytes() == Path("fused.png").read_bytes()
    assert f"with few_steps lcm, with fused {lora}:0.5:-0.25" in call("models")[1]
    assert json.loads(call("models", "--json")[1])["models"][0]["fused"] == [[str(lora), strength]]
    code, _, err = call("generate", "--from", "fused.png", "-m", str(small), "-o", "plain.png")
    assert (code, f"--fuse-lora '{lora.name}:0.5:-0.25' --few-steps lcm (sha256 {sha256[:12]})" in err) == (
        0,
        True,
    )
    assert draw(call, "small", "bare.png")[0] == 0  # as it was opened last: without
    assert "opened_with" not in json.loads(call("metadata", "bare.png", "--json")[1])["record"]


def test_fused_adapters_may_have_unknown_keys(call: Any, small: Path, tmp_path: Path) -> None:
    """Where --lora-lenient says so; it is not a part of how a checkpoint is opened, so each time anew."""
    odd = {"lora_unet_nowhere.diff": torch.ones(3)}
    lora = write_lora(tmp_path / "odd.safetensors", small, {"unet": "attn1"}, **odd)
    code, _, err = draw(call, small, "x.png", "--fuse-lora", str(lora))
    assert (code, "go on without these keys: --lora-lenient" in err) == (3, True)
    assert draw(call, small, "x.png", "--fuse-lora", str(lora), "--lora-lenient")[0] == 0
    assert draw(call, "small", "x.png")[0] == 3
    assert draw(call, "small", "x.png", "--lora-lenient")[0] == 0
    build = "build", "small", "--backend", "onnxruntime", "--nets", "nothing"
    assert "--lora-lenient" in call(*build)[2]
    assert "--lora-lenient" not in call(*build, "--lora-lenient")[2]


def test_other_commands_take_the_name(call: Any, small: Path) -> None:
    draw(call, small, "path.npy")
    code, out, _ = call("inspect", "small")
    assert (code, out.startswith(f"{small}: ")) == (0, True)
    code, _, err = call("build", "small", "--backend", "onnxruntime", "--dry-run")
    assert code == 2
    assert "--dry-run was given with --backend onnxruntime" in err  # so it was opened


def test_inspecting_a_checkpoint_verifies_it_and_prints_tables(call: Any, small: Path) -> None:
    code, out, _ = call("inspect", str(small), "--sampler", "euler", "--steps", "3")
    assert (code, len(out.splitlines()) >= 4) == (0, True)
    assert call("inspect", str(small), "--verify")[:2] == call("inspect", str(small))[:2]
    content = small.read_bytes()
    small.write_bytes(content[:-2] + b"\x00\x7e")  # NaN
    code, _, err = call("inspect", str(small), "--verify")
    assert code == 3
    assert "has values that are NaN or infinite" in err


def test_what_a_user_sees_of_a_file_that_moved(call: Any, small: Path, tmp_path: Path) -> None:
    draw(call, small, "path.npy")
    moved = small.rename(tmp_path / small.name)
    code, _, err = draw(call, "small", "name.npy")
    assert code == 3
    assert f"small was opened from {small}, which is gone; expected the file" in err
    assert call("inspect", "small")[0] == 3
    assert call("models")[1].rstrip().endswith(f"{small}  (gone)")
    code, out, err = call("cache", "verify")
    assert (code, err) == (0, "")
    assert f"{small} is gone since it was opened" in out
    assert draw(call, moved, "moved.npy")[0] == 0  # which is found again by its content
    assert call("models")[1].rstrip().endswith(str(moved))
    assert draw(call, "small", "name.npy")[0] == 0


def test_a_name_of_two_models(call: Any, store: EngineStore, tmp_path: Path) -> None:
    for number, place in enumerate("ab", 1):
        (tmp_path / place).mkdir()
        (tmp_path / place / "two.safetensors").touch()
        put_entry(store, number, path=str(tmp_path / place / "two.safetensors"))
    code, _, err = draw(call, "two", "two.png")
    assert code == 2
    assert all(str(tmp_path / place / "two.safetensors") in err for place in "ab")


@pytest.mark.parametrize("cache", ["file", "file/below"])
def test_a_cache_folder_that_is_none_draws_all_the_same(
    call: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / cache))
    code, _, err = draw(call, small, "picture.npy")
    assert code == 0
    assert "the checkpoint is made ready anew each time: " in err
    assert str(tmp_path / "file") in err


# ── the cache's verbs ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def both(store: EngineStore) -> EngineStore:
    """An engine used 2 days ago, and an opened checkpoint used 1 day ago."""
    entry = store.get_or_build(numbered(1), builder(b"x" * 9000))
    used = time.time() - 2 * 86400
    os.utime(entry.path / MANIFEST, (used, used))
    put_entry(store, 2, days=1, dtype="fp16", hub="org/model2", size=80_000)
    return store


def test_ls(call: Any, both: EngineStore) -> None:
    code, out, err = call("cache", "ls")
    assert (code, err) == (0, "")
    engine, checkpoint, total = out.splitlines()
    assert engine.startswith(f"{numbered(1).digest[:12]}  unet ")
    assert checkpoint.startswith(f"{'0' * 12}  model2 ")
    assert checkpoint.endswith(f"sd1, fp16, {both.root / 'model2.safetensors'}")
    assert total == f"1 engine and 1 opened checkpoint, 0.1 MB in {both.root}"
    found = json.loads(call("cache", "ls", "--json")[1])
    assert [entry["digest"] for entry in found["entries"]] == [numbered(1).digest]
    (entry,) = found["checkpoints"]
    assert (entry["digest"], entry["name"], entry["hub"]) == (f"{2:064x}", "model2", "org/model2")
    assert (entry["state"], entry["dtype"], entry["size"]) == ("gone", "fp16", entries(both)[0].size)
    assert found["bytes"] == 9000 + entry["size"]


def test_verify(call: Any, both: EngineStore) -> None:
    code, out, err = call("cache", "verify")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"1 engine and 1 opened checkpoint undamaged in {both.root}"
    found = json.loads(call("cache", "verify", "--json")[1])
    assert (found["good"], found["checkpoints"]) == ([numbered(1).digest], {f"{2:064x}": "gone"})


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_exits_3_for_a_damaged_checkpoint(call: Any, both: EngineStore, as_json: bool) -> None:
    graph = entries(both)[0].path / "unet" / "loop.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    code, out, err = call("cache", "verify", *["--json"] * as_json)
    assert code == 3
    found = json.loads(out)["error"]["found"] if as_json else err
    assert f"1 of 1 engine and 1 opened checkpoint damaged ({'0' * 12}: " in found
    assert as_json or "made ready again when it is opened" in err
    assert call("cache", "verify")[:2] == (0, f"1 engine undamaged in {both.root}\n")


def test_prune(call: Any, both: EngineStore) -> None:
    shelves = both.engines, both.checkpoints
    size = sum(path.stat().st_size for shelf in shelves for path in shelf.rglob("*") if path.is_file())
    assert call("cache", "prune")[1] == (
        "removed 0 engines, 0.0 MB with what killed builds left; 1 engine and 1 opened checkpoint,"
        f" {size / 1e6:.1f} MB stay\n"
    )
    lines = call("cache", "prune", "--older-than", "1.5", "--dry-run")[1].splitlines()
    assert lines[-1].startswith("would remove 1 engine, ")
    lines = call("cache", "prune", "--all")[1].splitlines()
    assert [line.split()[2:3] for line in lines[:2]] == [["unet"], ["model2"]]
    assert lines[2].startswith("removed 1 engine and 1 opened checkpoint, ")
    assert lines[2].endswith("; 0 engines, 0.0 MB stay")
    put_entry(both, 3)
    found = json.loads(call("cache", "prune", "--keep", "0", "--json")[1])
    assert [(item["kind"], item["label"]) for item in found["removed"]] == [("checkpoint", "model3")]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['latentrt', 'models', '--help']\n"
        "from latentrt import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'filelock', 'latentrt.checkpoints.entries'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_the_list_imports_no_graph_library() -> None:
    code = (
        "import sys; sys.argv = ['latentrt', 'models']\n"
        "from latentrt import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
