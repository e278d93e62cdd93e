"""What a terminal is sent: nothing that a file's author could command it with."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from latentrt.cli import progress
from latentrt.cli.shown import printable

RED = "\x1b[31m"


def latentrt(*words: object) -> Any:
    run = [sys.executable, "-m", "latentrt", *map(str, words)]
    return subprocess.run(run, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a fox\x1b[2J\r\nb", "a fox\\x1b[2J\\r\\nb"),
        ("плюш 狐 é", "плюш 狐 é"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("می‌خواهم 👩‍🎨", "می‌خواهم 👩‍🎨"),
        ("a\udcff", "a\\udcff"),
        ("a\\x1b", "a\\x1b"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.skipif(os.name == "nt", reason="such names are none on Windows")
def test_names_in_files_and_of_files(tmp_path: Path) -> None:
    path = tmp_path / f"{RED}a\nb.safetensors"
    save_file({f"{RED}red": torch.zeros(2), "x\ny": torch.zeros(2)}, path)
    for words in (["inspect", path], ["generate", "a", "-m", path]):
        run = latentrt(*words)
        assert "\\x1b[31m" in run.stdout + run.stderr
        assert "\x1b" not in run.stdout + run.stderr
        assert "a\\nb.safetensors" in run.stdout + run.stderr
    assert json.loads(latentrt("inspect", path, "--json").stdout)["path"] == str(path)


def test_configs_of_folders(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": f"{RED}Pipeline"}))
    run = latentrt("inspect", copy)
    assert "\\x1b[31mPipeline" in run.stdout
    assert "\x1b" not in run.stdout


def test_what_a_picture_says(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", f"a {RED}fox\nSteps: 4, Seed: 1, Size: 64x64")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    assert latentrt("metadata", tmp_path / "a.png").stdout.splitlines() == [
        "a \\x1b[31mfox",
        "Steps: 4, Seed: 1, Size: 64x64",
    ]
    assert json.loads(latentrt("metadata", tmp_path / "a.png", "--json").stdout)["parameters"]


def test_a_wait_is_told_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.02)
    with progress.progress_bar() as advance:
        advance(f"measure {RED}unet", 3, 9)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert lines[0] == "measure \\x1b[31munet, 3 of 9 (0 s so far)"
    with progress.progress_bar(enabled=False) as advance:
        advance("measure unet", 3, 9)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
