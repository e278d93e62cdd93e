"""The README's code runs, and its commands are the ones CI runs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentrt import cli

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
PICTURES = re.findall(r"<!-- pictures:begin -->\s*```sh\n(.*?)```", TEXT, re.DOTALL)[0]
# What stands for a file of the reader's own.
READERS = re.compile(r"\b(CHECKPOINT|PACKAGE|BASE|UNCLIP|old\.\w+)\b")


def test_python_examples_run(tmp_path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "star.png").stat().st_size > 1000


def test_set_up_is_two_commands_of_one_line() -> None:
    install, test = COMMANDS[0].strip(), COMMANDS[1].strip()
    assert "\n" not in install + test
    assert install.endswith('latentrt generate "a red circle on a blue background"')
    assert 'pip install ".[cpu]"' in install
    assert test.endswith("python tests/check.py")


def test_commands_of_the_shipped_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `latentrt` line of the README that needs no checkpoint of the reader's own."""
    blocks = [block for block in COMMANDS[2:] if block != PICTURES]
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    ours = [line for line in lines if line.startswith("latentrt") and not READERS.search(line)]
    assert len(ours) >= 3
    for line in ours:
        # measuring takes minutes, which the tests of each verb do not
        line = re.sub(r"^(latentrt bench \S+).*", r"\1 --help", line)
        command = line.replace("latentrt", f"{sys.executable} -W error -m latentrt.cli", 1)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_the_pictures_are_made_by_the_commands_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ROOT / "docs" / "pictures"
    monkeypatch.chdir(tmp_path)
    shutil.copy(shown / "mask.png", tmp_path)
    for line in PICTURES.splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, line
    for picture in shown.glob("*.png"):
        wanted, found = (
            np.asarray(Image.open(folder / picture.name)).astype(int) for folder in (shown, tmp_path)
        )
        # processors differ in their last bits, and a shade may flip
        assert np.abs(wanted - found).mean() < 1, picture.name
    linked = set(re.findall(r"docs/pictures/(\w+\.png)", TEXT))
    assert linked == {picture.name for picture in shown.glob("*.png")} - {"mask.png"}


def test_every_file_it_links_to_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
