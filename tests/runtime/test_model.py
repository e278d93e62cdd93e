"""What a model may be opened with, and what is said of what cannot be."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from latentrt.cli.inspect import place
from latentrt.engines.errors import CheckpointError, UsageError
from latentrt.runtime import Pipeline
from latentrt.runtime.model import CheckpointOptions, is_package


@pytest.mark.parametrize(("name", "value"), [("dtype", "fp99"), ("vae", 3), ("tiny_vae", b"x")])
def test_options_that_no_checkpoint_has(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is "):
        CheckpointOptions(**{name: value})


def test_a_package_takes_no_options_of_checkpoints() -> None:
    with pytest.raises(UsageError, match=r"--vae \(vae=…\) was given for .*, which is a package"):
        Pipeline.open("demo", checkpoint=CheckpointOptions(vae="other"))


@pytest.mark.parametrize("model", ["", "  "])
def test_no_name(model: str) -> None:
    with pytest.raises(UsageError, match="the model's name is empty"):
        Pipeline.open(model)


@pytest.mark.parametrize("model", ["no such model", "none.safetensors"])
def test_nothing_there(model: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Pipeline.open(model)


def test_another_autoencoder_that_is_not_there(tmp_path: Path) -> None:
    from tests.checkpoints.conftest import write_small

    model = write_small(tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; expected an autoencoder"):
        Pipeline.open(model, checkpoint=CheckpointOptions(vae=str(tmp_path / "nowhere")))


def test_a_folder_that_this_user_may_not_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        is_package(tmp_path)


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"loop is a link to .*loop, which does not exist"):
        Pipeline.open(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"loop is a link to .*loop, which does not exist"):
        place(str(tmp_path / "loop"))
    with pytest.raises(CheckpointError, match=r"is a link to .*gone\.safetensors, which does not exist"):
        Pipeline.open(tmp_path / "link.safetensors")


@pytest.mark.parametrize("model", [None, b"", 5])
def test_what_is_no_name(model: Any) -> None:
    with pytest.raises(UsageError, match="the model is "):
        Pipeline.open(model)


def test_options_that_are_none() -> None:
    options: Any = {"dtype": "fp32"}
    with pytest.raises(UsageError, match=r"checkpoint is \{'dtype': 'fp32'\}; expected CheckpointOptions"):
        Pipeline.open("demo", checkpoint=options)


def test_an_open_pipeline_stays_in_its_process() -> None:
    with Pipeline.open("demo", threads=1) as pipe, pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(pipe)
