"""Models by name; making one is watched on stages that only write a file: the real ones take minutes."""

import json
from pathlib import Path

import pytest

from latentrt.benchmarks import skeletons
from latentrt.benchmarks.models import full_size
from latentrt.benchmarks.models import open as models
from latentrt.benchmarks.models.full_size import Stage
from latentrt.benchmarks.models.open import find_model
from latentrt.benchmarks.skeletons import save_skeleton
from latentrt.engines.errors import BackendError, CheckpointError, ModelError, UsageError
from latentrt.engines.package import Package
from latentrt.runtime import Pipeline
from latentrt.runtime.pipeline import SHIPPED

STAGE = Stage(seconds=1.0, cpu_seconds=1.0, peak_rss=1)
DEMO = SHIPPED["demo"]


def test_the_demo_model_has_its_checkpoint_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    model = find_model("demo")
    assert model.name == "demo"
    assert model.package.root == DEMO
    assert model.checkpoint is not None
    assert (model.checkpoint / "unet" / "config.json").is_file()
    monkeypatch.setattr(models, "_INDEX", "no such file")  # as where the wheel is installed
    assert find_model("demo").checkpoint is None


def test_a_package_by_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO.parent)
    model = find_model("package")
    assert (model.name, model.checkpoint) == ("package", None)
    assert (
        find_model("package", checkpoint=DEMO.parent / "checkpoint").checkpoint == DEMO.parent / "checkpoint"
    )


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    known = r"expected demo, sd15-fp32, sd15-fp16, sd21-fp32, sd21-fp16, or a package's folder"
    for name in ("sd15", "sd15-int8", "sdxl-fp16", "no/such/folder"):
        with pytest.raises(UsageError, match=known):
            find_model(name)
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        find_model("demo", checkpoint=tmp_path)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was made; checkpoints are one file, packages the demo's."""
    done: list[str] = []

    def make(recipe: str, checkpoint: Path) -> Stage:
        checkpoint.mkdir()
        (checkpoint / "model_index.json").write_text("{}")
        done.append(recipe)
        return STAGE

    def export(checkpoint: Path, package: Path, dtype: str) -> Stage:
        assert (checkpoint / "model_index.json").is_file()
        if dtype == "fp16":
            raise ModelError("it broke", expected="a stage", fix="Mend it.")
        package.symlink_to(DEMO)
        done.append(package.name)
        return STAGE

    monkeypatch.setattr(full_size, "make_checkpoint", make)
    monkeypatch.setattr(full_size, "export", export)
    return done


def test_a_full_size_model_is_made_once_and_said_beforehand(
    tmp_path: Path, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    cache, printed = tmp_path / "benchmarks", list[str]()
    for _ in range(2):
        model = find_model("sd21-fp32", said=lambda line: printed.append(f"after {stages}: {line}"))
        assert (model.name, model.checkpoint) == ("sd21-fp32", cache / "sd21")
        assert model.package.manifest == Package.open(DEMO).manifest
        assert stages == ["sd21", "sd21-fp32"]
    first, second = printed
    assert first.startswith(f"after []: making {cache / 'sd21'}: ")
    assert second.startswith(f"after ['sd21']: making {cache / 'sd21-fp32'}: ")
    assert "2.6 GB" in first
    with pytest.raises(ModelError, match="it broke"):
        find_model("sd15-fp16")


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo model is the skeleton of sd15-fp16, and torch is not installed."""
    skeleton = tmp_path / "skeletons" / "sd15-fp16"
    skeleton.mkdir(parents=True)
    save_skeleton(Package.open(DEMO), skeleton)
    monkeypatch.setattr(skeletons, "FOLDER", skeleton.parent)
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "torch" else name)


@pytest.mark.usefixtures("without_torch")
def test_without_torch_and_skeleton_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError,
        match=r"must be exported first, which needs torch; .*\[cpu,export\], or its skeleton .*/sd15-fp32",
    ):
        find_model("sd15-fp32", cache=tmp_path / "cache")


@pytest.mark.usefixtures("without_torch")
def test_without_torch_a_skeleton_is_filled(tmp_path: Path) -> None:
    cache, printed = tmp_path / "cache", list[str]()
    (cache / "sd15").mkdir(parents=True)
    (cache / "sd15" / "model_index.json").write_text("{}")
    for _ in range(2):
        model = find_model("sd15-fp16", cache=cache, said=printed.append)
        assert model.checkpoint is None, "no checkpoint has its weights"
        assert model.package.root.name == "sd15-fp16-skeleton"
    assert len(printed) == 1
    assert not list(cache.glob(".sd15*")), "what it was made in is gone"
    with Pipeline.open(model.package.root, threads=1) as pipe:
        latent = pipe("a star", width=16, height=16, num_inference_steps=1, output_type="latent").images
    assert latent.shape == (1, 4, 2, 2)


def test_the_size_that_is_said_is_the_skeletons() -> None:
    """A digest of the weights' headers and the graphs."""
    files = [path for path in (skeletons.FOLDER / "sd15-fp16").rglob("*") if path.is_file()]
    headers = [json.loads(path.read_bytes()) for path in files if path.name.endswith(".header.json")]
    ends = [
        max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        for header in headers
    ]
    total = sum(ends) + sum(path.stat().st_size for path in files)
    assert models.SIZES["sd15"] == f"{total / 1e9:.1f} GB"


@pytest.mark.slow  # a minute: two imports of torch, and all of an export
def test_a_small_one_is_really_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage = full_size.run_stage

    def tiny(name: str, arguments: list[str]) -> Stage:
        if name == "make checkpoint":
            code = "import sys; from pathlib import Path; from tests.recipes import RECIPES, make_checkpoint"
            arguments = ["-c", f"{code}; make_checkpoint(RECIPES['tiny1'], Path(sys.argv[1]))", arguments[-1]]
        return run_stage(name, arguments)

    monkeypatch.setattr(full_size, "run_stage", tiny)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    model = find_model("sd15-fp32", cache=tmp_path)
    assert model.package.manifest.dtype == "fp32"
    assert model.checkpoint == tmp_path / "sd15"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["sd15", "sd15-fp32"]
