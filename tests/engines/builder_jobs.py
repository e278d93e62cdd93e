"""What the tests of building share: the demo model, a job for the builder, and the quickest build."""

from pathlib import Path
from typing import Any

from latentrt.engines.package import Package
from latentrt.engines.profiles import Profile, net_profiles
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tensorrt.build import build_package
from latentrt.engines.tensorrt.builder import BuildOptions, Job
from latentrt.runtime.model import SHIPPED

RTX = "tensorrt-rtx"
DEMO = Package.open(SHIPPED["demo"])
SMALL = [Profile.parse("64x64:b1")]


def job_of(
    net: str,
    engine: Path,
    *,
    package: Package = DEMO,
    options: BuildOptions = BuildOptions(),  # noqa: B008
) -> Job:
    file = package.manifest.nets[net]
    profiles = net_profiles(net, file.spec, SMALL)
    return Job(
        backend=RTX,
        net=net,
        graph=package.path(file.graph),
        weights=package.weights_folder(net),
        spec=file.spec,
        profiles=tuple(profile.shapes for profile in profiles),
        options=options,
        engine=engine,
    )


def build_small(package: Package, store: EngineStore, **options: Any) -> Any:
    """Build the net `unet_time`, the quickest of the demo, or the only one of the tiny package."""
    nets = [name for name in ("unet_time", "unet") if name in package.manifest.nets][:1]
    given = {"options": BuildOptions(), "nets": nets, **options}
    return build_package(package, RTX, SMALL, given.pop("options"), store, **given)


def assert_clean(store: EngineStore) -> None:
    assert not store.entries()
    assert not [path for path in store.building.glob("**/*") if path.is_file()]
