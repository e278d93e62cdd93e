"""Models by name, and skeletons of full-size ones; making one is watched on stages that only write a file."""

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks import skeletons
from latentrt.benchmarks.models import full_size
from latentrt.benchmarks.models import open as models
from latentrt.benchmarks.models.checkpoints import make_checkpoint
from latentrt.benchmarks.models.full_size import main, run_stage
from latentrt.benchmarks.models.open import find_model
from latentrt.benchmarks.models.recipes import RECIPES
from latentrt.benchmarks.records import read_document
from latentrt.benchmarks.skeletons import FOLDER, fill_skeleton, save_skeleton
from latentrt.engines.errors import BackendError, CheckpointError, ModelError, UsageError
from latentrt.engines.package import Package
from latentrt.engines.profiles import default_profile
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tensorrt.build import build_package, find_engines
from latentrt.engines.tensorrt.builder import BuildOptions
from latentrt.engines.tensorrt.flavour import flavour, installed_version
from latentrt.engines.tensorrt.preflight import read_room
from latentrt.export import export_package
from latentrt.runtime import Pipeline
from latentrt.runtime.model import SHIPPED

STAGE = {"wall_seconds": 2.0, "cpu_seconds": 3.0, "peak_rss": 5_000.0}
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
    for checkpoint in (None, DEMO.parent / "checkpoint"):
        model = find_model("package", checkpoint=checkpoint)
        assert (model.name, model.checkpoint) == ("package", checkpoint)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    known = r"expected demo, sd15-fp32, sd15-fp16, sd21-fp32, sd21-fp16, a package's folder, or a checkpoint"
    for name in ("sd15", "sd15-int8", "sdxl-fp16", "no/such/folder"):
        with pytest.raises(UsageError, match=known):
            find_model(name)
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        find_model("demo", checkpoint=tmp_path)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was made; checkpoints are one file, packages the demo's, and exporting to fp16 fails."""
    done: list[str] = []

    def make(recipe: str, checkpoint: Path) -> None:
        checkpoint.mkdir()
        (checkpoint / "model_index.json").write_text("{}")
        done.append(recipe)

    def export(checkpoint: Path, package: Path, dtype: str, *flags: str) -> dict[str, Any]:
        assert (checkpoint / "model_index.json").is_file()
        if dtype == "fp16":
            raise ModelError("it broke", expected="a stage", fix="Mend it.")
        if not package.exists():
            package.symlink_to(DEMO)
        done.append(" ".join([package.name, *flags]))
        return STAGE

    monkeypatch.setattr(full_size, "make_checkpoint", make)
    monkeypatch.setattr(full_size, "export", export)
    return done


def test_a_full_size_model_is_made_once_and_said_beforehand(cache: Path, stages: list[str]) -> None:
    printed = list[str]()
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
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where full-size models are made."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    return tmp_path / "benchmarks"


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo model is the skeleton of sd15-fp16, and torch is not installed."""
    skeleton = tmp_path / "skeletons" / "sd15-fp16"
    skeleton.mkdir(parents=True)
    save_skeleton(Package.open(DEMO), skeleton)
    monkeypatch.setattr(skeletons, "FOLDER", skeleton.parent)
    monkeypatch.setattr(models, "missing_modules", lambda *names: "not installed: torch")


@pytest.mark.usefixtures("without_torch", "cache")
def test_without_torch_and_skeleton_it_says_what_to_install() -> None:
    with pytest.raises(
        BackendError,
        match=r"must be exported first; not installed: torch; .*\[cpu,export\], or its skeleton .*/sd15-fp32",
    ):
        find_model("sd15-fp32")


@pytest.mark.usefixtures("without_torch")
def test_without_torch_a_skeleton_is_filled(cache: Path) -> None:
    printed = list[str]()
    (cache / "sd15").mkdir(parents=True)
    (cache / "sd15" / "model_index.json").write_text("{}")
    for _ in range(2):
        model = find_model("sd15-fp16", said=printed.append)
        assert model.checkpoint is None, "no checkpoint has its weights"
        assert model.package.root.name == "sd15-fp16-skeleton"
    assert len(printed) == 1
    assert not list(cache.glob(".sd15*")), "what it was made in is gone"
    with Pipeline.open(model.package.root, threads=1) as pipe:
        latent = pipe("a star", width=16, height=16, num_inference_steps=1, output_type="latent").images
    assert latent.shape == (1, 4, 2, 2)


@pytest.mark.slow  # a minute: two imports of torch, and all of an export
def test_a_small_one_is_really_made(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = """if True:
        import sys
        from pathlib import Path
        from tests.recipes import RECIPES, make_checkpoint
        make_checkpoint(RECIPES["tiny1"], Path(sys.argv[2]))
        """
    (tmp_path / "tiny.py").write_text(tiny)
    stage = full_size.run_stage

    def run_tiny(name: str, module: str, *arguments: str) -> dict[str, Any]:
        return stage(name, "tiny" if name == "make checkpoint" else module, *arguments)

    monkeypatch.setattr(full_size, "run_stage", run_tiny)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{tmp_path}")
    model = find_model("sd15-fp32")
    assert model.package.manifest.dtype == "fp32"
    assert model.checkpoint == cache / "sd15"
    made = sorted(path.name for path in cache.iterdir() if path.is_dir())
    assert made == ["sd15", "sd15-fp32"]


def test_a_stage_has_its_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "does.py").write_text("import sys; exec(sys.argv[1])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = run_stage("print", "does", "print('noise'); sys.exit(0)")
    assert min(found["wall_seconds"], found["cpu_seconds"]) > 0  # libraries have threads
    assert 1e6 < found["peak_rss"] < 1e9
    assert found.keys() == run_stage("quiet", "does", "pass").keys() == STAGE.keys()
    with pytest.raises(ModelError, match=r"^export fp16 failed: it ended with exit code 1: no room in …/x;"):
        run_stage("export fp16", "does", "sys.exit('no room in /home/someone/x')")


def test_the_script(tmp_path: Path, stages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path), "--dtypes", "fp32"])
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path), "--out", str(tmp_path / "export.json")])
    once = "sd15-fp32 --verify --overwrite"
    assert stages == ["sd15", once, once], "the checkpoint is made once"
    assert "export peak memory" in capsys.readouterr().out
    document = read_document(tmp_path / "export.json")
    assert document.benchmark == "export"
    assert document.model == {"name": "sd15"}
    assert [(row.workload, row.case["dtype"], row.unit, row.samples) for row in document.rows] == [
        ("export", "fp16", "s", ()),
        ("export", "fp32", "s", (2.0,)),
        ("export peak memory", "fp32", "B", (5000.0,)),
    ]
    assert (document.rows[0].status, document.rows[0].reason) == ("FAILED", "it broke")
    assert document.rows[1].figures == {"cpu_seconds": 3.0}


BACKEND = "tensorrt-rtx"


@pytest.fixture
def roomy(tmp_path: Path) -> Generator[Path]:
    """A folder for 4 GB of weights and engines, on a machine with the 6 GB that the UNet's build takes."""
    room = read_room(tmp_path)
    if (room.ram or 2**40) < 8e9 or (room.disk or 2**40) < 6e9:
        pytest.skip(f"{room.ram} bytes of memory and {room.disk} of disk are too little")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_every_net_of_full_size_sd15_builds_without_a_gpu(roomy: Path) -> None:
    package = fill_skeleton("sd15-fp16", roomy / "package")
    package.verify()
    store = EngineStore(roomy / "store")
    built = build_package(package, BACKEND, [default_profile(package.manifest)], BuildOptions(), store)
    assert [item.net for item in built] == [name for name in package.manifest.nets if name != "unet_whole"]
    for item in built:
        spec, facts = package.manifest.nets[item.net].spec, item.entry.facts
        assert facts["inputs"] == [tensor.name for tensor in spec.inputs]
        assert facts["outputs"] == [tensor.name for tensor in spec.outputs]
        assert facts["peak_rss"] < 10e9
        row, version = flavour(BACKEND), installed_version(BACKEND) or ""
        ((entry, profiles),) = find_engines(package, item.net, row, version, store)
        assert entry.key == item.entry.key
        assert len(profiles) == (2 if item.net in ("unet", "step", "step_masked") else 1)
    unet = next(item for item in built if item.net == "unet")
    assert 1.6e9 < unet.entry.size < 1.8e9, "two profiles share the weights of 859.5 M parameters"


def test_an_unknown_skeleton_or_a_folder_that_exists(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected one of .*sd15-fp16"):
        fill_skeleton("sd0", tmp_path / "package")
    with pytest.raises(UsageError, match="a folder that does not exist yet"):
        fill_skeleton("sd15-fp16", tmp_path)


@pytest.mark.slow
def test_the_skeleton_is_what_the_exporter_makes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(RECIPES["sd15"], tmp_path / "checkpoint")
    save_skeleton(export_package(checkpoint, tmp_path / "package", verify=False), tmp_path / "skeleton")
    for path in (FOLDER / "sd15-fp16").rglob("*.*"):
        if path.name != "manifest.json":
            made = tmp_path / "skeleton" / path.relative_to(FOLDER / "sd15-fp16")
            assert path.read_bytes() == made.read_bytes()
