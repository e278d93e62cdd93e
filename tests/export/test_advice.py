"""Advice with a command can be pasted as it is printed."""

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

from latentrt.cli import app
from latentrt.engines.errors import LatentrtError, command
from latentrt.export.checkpoint.open import Checkpoint
from latentrt.export.export import export_package
from latentrt.export.pickles.convert import convert_pickle
from tests.structure import sources

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("latentrt", "git", "mv", "hf", "pip")


def commands(fix: str) -> list[list[str]]:
    """What stands behind a colon to the end, as a shell takes it apart."""
    found = re.search(rf": ((?:{'|'.join(PROGRAMS)}) .*)$", fix)
    return [shlex.split(found[1])] if found else []


def parses(words: list[str]) -> None:
    """Raise click's error unless the command line takes these words."""
    group: Any = typer.main.get_command(app)
    _, verb, *rest = words
    context = click.Context(group)
    found = group.get_command(context, verb)
    assert found is not None, verb
    with found.make_context(verb, list(rest)):
        pass


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


def advice() -> Iterator[tuple[str, str]]:
    """Every text of `export/` and of its verbs that a `fix` is made of, with its place; {…} is a word."""
    files = [path for path in sources(ROOT) if path.is_relative_to(ROOT / "export")]
    files += [ROOT / "cli" / f"{verb}.py" for verb in ("export", "convert", "inspect")]
    files += [ROOT / "engines" / name for name in ("errors.py", "lfs.py", "safetensors_format.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    named = {
        target.id: node.value
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                found = [
                    named[n.id] for n in ast.walk(node.value) if isinstance(n, ast.Name) and n.id in named
                ]
                for part in (inner for value in (node.value, *found) for inner in ast.walk(value)):
                    if isinstance(part, ast.JoinedStr):
                        words = [w.value if isinstance(w, ast.Constant) else "WORD" for w in part.values]
                        yield f"{path.name}:{part.lineno}", "".join(map(str, words))
                    elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield f"{path.name}:{part.lineno}", part.value


def test_commands_are_made_by_command_and_end_the_advice() -> None:
    """A command written out has no paths in it, so that only its end can be wrong."""
    places = list(advice())
    assert len(places) > 40
    for place, text in places:
        assert not re.search(rf"(^|: |`)({'|'.join(PROGRAMS)}) .*WORD", text), f"{place}: use command()"
        assert not re.search(rf": ({'|'.join(PROGRAMS)}) .*[.,;]$", text), f"{place}: {text}"
        assert not re.search(r"(--?[a-z-]+|/\S+)\.$", text), f"{place}: a full stop behind an option"
