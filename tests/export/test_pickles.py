"""Pickled checkpoints: honest ones arrive whole, hostile ones leave no trace."""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.errors import CheckpointError, StorageError, UsageError
from latentrt.export.pickles import convert
from latentrt.export.pickles import machine as pickles
from latentrt.export.pickles.convert import convert_pickle
from tests.export.hostile_pickles import archive, dumps, hostile, tensor

BASE = torch.arange(24.0).reshape(4, 6)
STATE: dict[str, Any] = OrderedDict(
    whole=BASE,
    transposed=BASE.T,
    part=BASE[1:3, ::2],
    repeated=torch.tensor([[1.0], [2.0]]).expand(2, 1),
    scalar=torch.tensor(3.0),
    empty=torch.empty(0, 3),
    parameter=torch.nn.Parameter(torch.randn(2, 2)),
    truth=torch.tensor([True, False]),
    **{
        str(dtype): torch.tensor([1, 2, 3]).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    },
    **{str(dtype): torch.tensor([1, 2, 3]).to(dtype) for dtype in (torch.int8, torch.uint8)},
)
STATE._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]  # as Module.state_dict() has


def trainers_checkpoint(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Like the original 1.x files: the trainer's state beside the weights, by a class that is not here."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("callbacks"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    momentum = torch.optim.SGD([STATE["parameter"]], lr=0.1, momentum=0.9).state_dict()
    return {
        "epoch": 3,
        "global_step": 470000,
        "callbacks": {
            kind: {"best": np.float64(3.0), "score": torch.tensor(0.5), "path": pathlib.Path("a/b")}
        },
        "optimizer_states": [momentum],
        "lr_schedulers": [{"base": kind(), "seen": {1, 2}, "names": frozenset("ab")}],
        "hyper_parameters": argparse.Namespace(rate=0.1, widths=(1, 2), array=np.arange(3)),
        "state_dict": STATE,
    }


def check(path: Path) -> None:
    found = load_file(path)
    assert set(found) == set(STATE)
    for name, wanted in STATE.items():
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted.detach()), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_trainers_checkpoint(
    zipped: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        torch.save(
            trainers_checkpoint(patch),
            tmp_path / "x.ckpt",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
    done = convert_pickle(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert (done.tensors, done.left_out) == (len(STATE), 0)
    assert done.size == (tmp_path / "x.safetensors").stat().st_size
    check(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "wrapped",
    [STATE, {"model": STATE}, {"state_dict": {"model": STATE, "step": 1}}, dict(STATE), {"adapter": STATE}],
    ids=["bare", "model", "both", "dict", "adapter"],
)
def test_wrappers(wrapped: Any, tmp_path: Path) -> None:
    torch.save(wrapped, tmp_path / "x.bin")
    convert_pickle(tmp_path / "x.bin", tmp_path / "x.safetensors")
    check(tmp_path / "x.safetensors")


def test_the_two_dicts_of_an_ip_adapter(tmp_path: Path) -> None:
    """They get the names that its safetensors files have; what is no dict, or has no name, is as ever."""
    inner = {"1.to_k_ip.weight": BASE, "deeper": {"w": BASE}, 3: BASE}
    torch.save({"image_proj": {"proj.weight": BASE}, "ip_adapter": inner, "w": BASE}, tmp_path / "x.bin")
    done = convert_pickle(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert set(load_file(tmp_path / "x.safetensors")) == {
        "image_proj.proj.weight",
        "ip_adapter.1.to_k_ip.weight",
        "w",
    }
    assert (done.tensors, done.left_out) == (3, 1)
    torch.save({"image_proj": BASE, "ip_adapter": BASE}, tmp_path / "y.bin")
    convert_pickle(tmp_path / "y.bin", tmp_path / "y.safetensors")
    assert set(load_file(tmp_path / "y.safetensors")) == {"image_proj", "ip_adapter"}


def test_entries_that_are_no_tensors_are_counted(tmp_path: Path) -> None:
    torch.save({"w": BASE, "step": 3, "name": "x", "list": [BASE]}, tmp_path / "x.pt")
    done = convert_pickle(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert (done.tensors, done.left_out) == (1, 3)


def test_torch_agrees_with_the_hand_made_archive(tmp_path: Path) -> None:
    """The hostile files are variations of this one, so it has to be a true one."""
    (tmp_path / "x.ckpt").write_bytes(archive(dumps({"w": tensor()})))
    assert torch.equal(torch.load(tmp_path / "x.ckpt", weights_only=True)["w"], torch.zeros(2))
    convert_pickle(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], torch.zeros(2))


def test_hostile_files_leave_no_trace(tmp_path: Path) -> None:
    """In a child, under an audit hook: no code, import, process, socket or file comes out of any of them."""
    folder, canary = tmp_path / "work", tmp_path / "canary"
    folder.mkdir()
    canary.mkdir()
    script = Path(__file__).with_name("hostile_pickles.py")
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(folder), str(canary)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = json.loads(ran.stdout)
    assert set(result["cases"]) == set(hostile(canary))
    assert len(result["cases"]) >= 40
    for name, found in result["cases"].items():
        assert found["traces"] == [], name
        assert found["left"] == ["x.ckpt"], name
        assert found["verdict"].startswith(f"{folder / 'x.ckpt'}: "), (name, found["verdict"])
    assert result["canary"] == []
    assert sys.platform != "linux" or result["grown"] < 64 * 1024, "KiB"


def refused(content: bytes, tmp_path: Path, message: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_pickle(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits on operations, a pickle's size and an archive's directory; they are small here, so files are."""
    content = archive(dumps({"w": tensor()}))
    for module, limit, message in (
        (pickles, "_OPCODE_LIMIT", "more than 9 operations"),
        (convert, "PICKLE_LIMIT", r"a pickle of \d+ bytes"),
        (convert, "_DIRECTORY_LIMIT", r"a directory of \d+ bytes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, 9)
            if limit == "_DIRECTORY_LIMIT":  # the end of the archive, 22 bytes, is read by the same function
                patch.setattr(module, limit, 100)
            refused(content, tmp_path, message)


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    choose = np.random.default_rng(5)
    torch.save({"state_dict": {"w": BASE}}, tmp_path / "good.ckpt")
    good = (tmp_path / "good.ckpt").read_bytes()
    torch.save({"state_dict": {"w": BASE}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.ckpt").read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for i in range(300):
        damaged = bytearray(old if i % 2 else good)
        damaged[choose.integers(len(damaged))] ^= 1 << int(choose.integers(8))
        (tmp_path / "x.ckpt").write_bytes(
            damaged[: len(damaged) - int(choose.integers(2) * choose.integers(99))]
        )
        try:
            convert_pickle(tmp_path / "x.ckpt", tmp_path / "x.safetensors", overwrite=True)
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 25


def test_the_output(tmp_path: Path) -> None:
    torch.save({"w": BASE}, tmp_path / "x.ckpt")
    with pytest.raises(UsageError, match=r"a \.safetensors file"):
        convert_pickle(tmp_path / "x.ckpt", tmp_path / "y.bin")
    (tmp_path / "y.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="exists; expected a new file"):
        convert_pickle(tmp_path / "x.ckpt", tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_text() == "mine"
    convert_pickle(tmp_path / "x.ckpt", tmp_path / "y.safetensors", overwrite=True)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["w"], BASE)
    with pytest.raises(StorageError, match="cannot be written"):
        convert_pickle(tmp_path / "x.ckpt", tmp_path / "none" / "y.safetensors")


def test_a_renamed_safetensors_file_is_named_back(tmp_path: Path) -> None:
    """The safetensors library reads it, so there is nothing to convert (ComfyUI's issue 5729)."""
    folder = tmp_path / "my models, 2"
    folder.mkdir()
    save_file({"w": BASE}, folder / "x.ckpt")
    with pytest.raises(CheckpointError, match="it is a safetensors file, whatever its name") as error:
        convert_pickle(folder / "x.ckpt", folder / "x.safetensors")
    advice, _, printed = error.value.fix.partition(": ")
    assert advice == "Rename it"
    subprocess.run(shlex.split(printed), check=True)
    assert torch.equal(load_file(folder / "x.safetensors")["w"], BASE)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": BASE}, tmp_path / "x.ckpt")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        convert_pickle(tmp_path / "x.ckpt", tmp_path / "y.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
        convert_pickle(tmp_path / "x.ckpt", tmp_path / "y.safetensors")
