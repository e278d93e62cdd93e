"""Full-size SD 1.5, without torch and without a GPU: its package, and every engine of it."""

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from latentrt.benchmarks.models.checkpoints import make_checkpoint
from latentrt.benchmarks.models.recipes import RECIPES
from latentrt.benchmarks.skeletons import FOLDER, fill_skeleton, save_skeleton
from latentrt.engines.errors import UsageError
from latentrt.engines.package import Package
from latentrt.engines.profiles import default_profile
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tensorrt.build import build_package, find_engines
from latentrt.engines.tensorrt.builder import BuildOptions
from latentrt.engines.tensorrt.flavour import flavour, installed_version
from latentrt.engines.tensorrt.preflight import read_room
from latentrt.export import export_package
from latentrt.runtime.pipeline import SHIPPED

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
        assert len(profiles) == (2 if item.net in ("unet", "step") else 1)
    unet = next(item for item in built if item.net == "unet")
    assert 1.6e9 < unet.entry.size < 1.8e9, "two profiles share the weights of 859.5 M parameters"


def test_an_unknown_skeleton_or_a_folder_that_exists(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected one of .*sd15-fp16"):
        fill_skeleton("sd0", tmp_path / "package")
    with pytest.raises(UsageError, match="a folder that does not exist yet"):
        fill_skeleton("sd15-fp16", tmp_path)


def test_the_header_of_a_skeleton_is_the_packages_own(tmp_path: Path) -> None:
    package = Package.open(SHIPPED["demo"])
    save_skeleton(package, tmp_path / "skeleton")
    with package.path("unet/weights.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        assert (tmp_path / "skeleton/unet/weights.safetensors.header.json").read_bytes() == file.read(size)


@pytest.mark.slow
def test_the_skeleton_is_what_the_exporter_makes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(RECIPES["sd15"], tmp_path / "checkpoint")
    save_skeleton(export_package(checkpoint, tmp_path / "package", verify=False), tmp_path / "skeleton")
    for path in (FOLDER / "sd15-fp16").rglob("*.*"):
        if path.name != "manifest.json":
            assert (
                path.read_bytes()
                == (tmp_path / "skeleton" / path.relative_to(FOLDER / "sd15-fp16")).read_bytes()
            )
