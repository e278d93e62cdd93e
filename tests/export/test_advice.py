"""Advice with a command can be pasted as it is printed."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.cli import app
from latentrt.engines.errors import LatentrtError, command
from latentrt.export.export import export_package
from latentrt.export.pickles.convert import convert_pickle
from tests.test_advice import PROGRAMS, parses


def commands(fix: str) -> list[list[str]]:
    """What stands behind a colon to the end, as a shell takes it apart."""
    found = re.search(rf": ((?:{'|'.join(PROGRAMS)}) .*)$", fix)
    return [shlex.split(found[1])] if found else []


def test_a_command_is_quoted() -> None:
    words = ["latentrt", "convert", Path("my models/it's.ckpt"), "-o", "x.safetensors"]
    assert shlex.split(command(*words)) == list(map(str, words))


def pickled_file(folder: Path) -> None:
    torch.save({"w": torch.ones(1)}, folder / "a model.ckpt")
    Checkpoint.open(folder / "a model.ckpt")


def misnamed_pickle(folder: Path) -> None:
    torch.save({"w": torch.ones(1)}, folder / "a model.safetensors")
    Checkpoint.open(folder / "a model.safetensors")


def pickled_vae(folder: Path) -> None:
    torch.save({"w": torch.ones(1)}, folder / "vae" / "x.pt")
    Checkpoint.open(folder, vae=folder / "vae" / "x.pt")


def pickled_shards(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.unlink()
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.bin"
        torch.save({f"w{number}": torch.ones(1)}, folder / "unet" / name)
    Checkpoint.open(folder)


@pytest.mark.parametrize("mistake", [pickled_file, misnamed_pickle, pickled_vae, pickled_shards])
def test_conversions_run_as_printed(mistake: Callable[[Path], None], copy: Path, tmp_path: Path) -> None:
    folder = copy.rename(tmp_path / "my models, 2")
    with pytest.raises(LatentrtError) as error:
        mistake(folder)
    printed = str(error.value)
    ((_, *words),) = commands(printed)
    assert CliRunner().invoke(app, words).exit_code == 0
    assert Path(words[-1]).is_file()


def missing_config(folder: Path, _: Path) -> None:
    (folder / "unet" / "config.json").unlink()
    Checkpoint.open(folder)


def no_weights(folder: Path, _: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    Checkpoint.open(folder)


def pointer(folder: Path, _: Path) -> None:
    (folder / "model_index.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    Checkpoint.open(folder)


def not_empty(folder: Path, target: Path) -> None:
    target.mkdir()
    (target / "thesis").write_text("")
    export_package(folder, target)


def other_ending(folder: Path, target: Path) -> None:
    convert_pickle(folder / "x.ckpt", target / "x.bin")


@pytest.mark.parametrize("mistake", [missing_config, no_weights, pointer, not_empty, other_ending])
def test_nothing_sticks_to_other_advice(
    mistake: Callable[[Path, Path], None], copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(LatentrtError) as error:
        mistake(copy, tmp_path / "target")
    for words in commands(str(error.value)):
        assert not words[-1].endswith((".", ",", ";"))
        if words[0] == "latentrt":
            parses(words)
