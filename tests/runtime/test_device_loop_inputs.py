"""All that a job may have, on a device against the host: vectors, pictures behind the latent, masks, …"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentrt.engines.device import DeviceNet
from latentrt.engines.errors import MemoryLimitError, PackageError, UsageError
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.nets import CPU, open_onnxruntime_net
from latentrt.engines.package import Package
from latentrt.runtime.loop.denoise import HostLoop
from latentrt.runtime.loop.device.loop import DeviceLoop, _need, _RememberedPlan
from latentrt.runtime.loop.device.memory_fallback import MemoryPlan
from latentrt.runtime.loop.device.verdicts import Graphs
from latentrt.runtime.loop.job import Clock, DenoiseJob, Kept
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.noise import NoiseSource
from latentrt.runtime.sampling.samplers import make_table
from tests.engines.host_device import HostDevice
from tests.runtime.small_nets import IMAGE_CHANNELS, TOKENS, VECTORS, WIDTH, write_small_package

PICTURES, HEIGHT, WIDTH_8 = 2, 8, 12
BATCH = 2 * PICTURES


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    root = tmp_path_factory.mktemp("small")
    return {
        "plain": write_small_package(root / "plain"),
        "vectors": write_small_package(root / "vectors", vectors=True),
        "image": write_small_package(root / "image", image=True),
        "all": write_small_package(root / "all", vectors=True, image=True),
        "older": write_small_package(root / "older", older=True),
    }


@contextmanager
def on_host(package: Package) -> Generator[HostLoop]:
    loop = HostLoop(package, ONNXRUNTIME, 1)
    try:
        yield loop
    finally:
        loop.close()


@contextmanager
def on_device(
    package: Package, device: HostDevice | None = None, graphs: Graphs = "off", log: list[str] | None = None
) -> Generator[DeviceLoop]:
    memory = device or HostDevice()
    nets: dict[str, DeviceNet] = {
        name: open_onnxruntime_net(package, name, memory, provider=CPU, submit=memory.submit, threads=1)
        for name in package.manifest.nets
    }
    lines = [] if log is None else log
    loop = DeviceLoop(memory, nets, package.manifest, graphs=graphs, log=lines.append)
    try:
        yield loop
    finally:
        loop.close()
    assert not memory.blocks


def job_of(kind: str, *, masked: bool = False, seed: int = 0, **changes: Any) -> DenoiseJob:
    """A job for the package of that name: two guided pictures, noise in every row, every UNet row another."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    latent = (PICTURES, 4, HEIGHT, WIDTH_8)
    told = kind in ("vectors", "all")
    values: dict[str, Any] = {
        "context": normal(3, TOKENS, WIDTH),
        "text_of_row": (2, 0, 1, 2),
        "table": make_table(
            resolve("euler_a", {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}), 4
        ),
        "guided": True,
        "guidance_scales": np.full(4, 3.0, np.float32),
        "guidance_rescale": 0.0,
        "first": normal(*latent),
        "noise": NoiseSource((seed, seed + 1), "torch-cpu"),
        "vectors": {name: normal(BATCH, width) for name, width in VECTORS.items()} if told else {},
        "image_latents": normal(BATCH, IMAGE_CHANNELS, *latent[2:]) if kind in ("image", "all") else None,
        "kept": Kept(
            latent=normal(*latent),
            noise=normal(*latent),
            mask=random.random((PICTURES, 1, *latent[2:]), np.float32).round(1),
        )
        if masked
        else None,
    }
    return DenoiseJob(**{**values, **changes})


def check_draws(loop: DeviceLoop, host: HostLoop, job: DenoiseJob) -> None:
    wanted = list(host.steps(job, Clock(), None))
    found = list(loop.steps(job, Clock(), None))
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.latent, other.latent, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine.prediction, other.prediction, rtol=1e-3, atol=1e-4)
    drawn, picture = loop.draw(job, Clock(), decode=True), host.draw(job, Clock(), decode=True)
    np.testing.assert_allclose(drawn.latent, wanted[-1].latent, rtol=1e-4, atol=1e-5)
    assert drawn.image is not None
    assert picture.image is not None
    assert np.abs(drawn.image.astype(int) - picture.image).max() <= 1


@pytest.mark.parametrize(
    ("kind", "masked"),
    [
        *((kind, masked) for kind in ("plain", "vectors", "image", "all") for masked in (False, True)),
        ("older", False),
    ],
)
@pytest.mark.parametrize("rows", [None, 3, 1])
def test_the_device_draws_what_the_host_draws(
    packages: dict[str, Package], kind: str, rows: int | None, masked: bool
) -> None:
    """With rows = 3 the UNet runs in calls of 3 rows and 1, as when memory is short."""
    with on_device(packages[kind]) as loop, on_host(packages[kind]) as host:
        for seed in (0, 1):  # the second finds the first one's buffers
            job = job_of(kind, masked=masked, seed=seed)
            if rows is not None:
                need = _need(job, packages[kind].manifest.latent_scale)
                loop._plans[need] = _RememberedPlan(plan=MemoryPlan(rows=rows), requests_left=9)
            check_draws(loop, host, job)


def test_unguided_pictures(packages: dict[str, Package]) -> None:
    whole = job_of("all")
    half = {
        "text_of_row": whole.text_of_row[:PICTURES],
        "vectors": {name: rows[:PICTURES] for name, rows in whole.vectors.items()},
        "image_latents": None if whole.image_latents is None else whole.image_latents[:PICTURES],
    }
    with on_device(packages["all"]) as loop, on_host(packages["all"]) as host:
        check_draws(loop, host, replace(whole, guided=False, **half))


def test_replayed_rows_keep_another_picture_each_time(packages: dict[str, Package]) -> None:
    device = HostDevice()
    with on_device(packages["all"], device, "on") as loop, on_host(packages["all"]) as host:
        for seed in range(4):
            job = job_of("all", masked=True, seed=seed)
            wanted, before = host.draw(job, Clock(), decode=False).latent, device.launches
            found = loop.draw(job, Clock(), decode=False).latent
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
            compared = 2 if seed == 1 else 0
            assert device.launches - before == (len(job.table) + compared if seed else 0)


def test_one_synchronisation_and_nothing_allocated(packages: dict[str, Package]) -> None:
    device = HostDevice()
    with on_device(packages["all"], device) as loop:
        loop.draw(job_of("all", masked=True), Clock(), decode=True)
        sizes, allocations, waits = dict(device.sizes), device.allocations, device.synchronisations
        loop.draw(job_of("all", masked=True, seed=1), Clock(), decode=True)
        assert (device.sizes, device.allocations) == (sizes, allocations)
        assert device.synchronisations == waits + 1


def test_another_models_vectors_are_refused(packages: dict[str, Package]) -> None:
    with on_device(packages["vectors"]) as loop, pytest.raises(UsageError, match="called with"):
        loop.draw(job_of("plain"), Clock(), decode=False)


def test_an_older_package_cannot_keep_a_picture(packages: dict[str, Package]) -> None:
    with (
        on_device(packages["older"]) as loop,
        pytest.raises(PackageError, match=r"no net 'step_masked'.*latentrt export") as caught,
    ):
        loop.draw(job_of("plain", masked=True), Clock(), decode=False)
    assert "'small'" in caught.value.found


# ── tiles ──────────────────────────────────────────────────────────────────────────────────────────


def test_tiles_from_the_beginning(packages: dict[str, Package], monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture and one tile at a time; the graph sees one cell, so tiles have no seams."""
    random = np.random.default_rng(3)
    first = random.standard_normal((PICTURES, 4, 40, 56), np.float32)
    job, log = job_of("plain", first=first, tile=256), list[str]()
    with on_device(packages["plain"], log=log) as loop, on_host(packages["plain"]) as host:
        decoder, shapes = loop.nets["vae_decoder"], set[tuple[int, ...]]()
        bind = decoder.bind

        def noted(given: Any, addresses: Any, scratch: int) -> Any:
            shapes.add(given["latent"])
            return bind(given, addresses, scratch)

        monkeypatch.setattr(decoder, "bind", noted)
        drawn, wanted = loop.draw(job, Clock(), decode=True), host.draw(job, Clock(), decode=True)
        assert drawn.image is not None
        assert drawn.mean is not None
        assert np.abs(drawn.image.astype(int) - wanted.image).max() <= 1
        np.testing.assert_allclose(drawn.mean, wanted.mean, rtol=1e-4)
        image, _ = loop.decode(drawn.latent, tile=256)
        np.testing.assert_array_equal(image, drawn.image)
        assert shapes == {(1, 4, 32, 32)}
        assert not loop._plans, "nothing was given up"
    assert not log


# ── calls ──────────────────────────────────────────────────────────────────────────────────────────


def pictures(count: int, side: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(count)
    return {
        "image": random.integers(0, 256, (count, side, side, 3), np.uint8),
        "mask": random.integers(0, 256, (count, side, side, 1), np.uint8),
    }


def test_a_call_is_the_hosts(packages: dict[str, Package]) -> None:
    device = HostDevice()
    with on_device(packages["plain"], device) as loop, on_host(packages["plain"]) as host:
        for count in (1, 2, 1):
            found = loop.call("vae_encoder", **pictures(count))
            wanted = host.call("vae_encoder", **pictures(count))
            assert set(found) == {"mean"}
            np.testing.assert_allclose(found["mean"], wanted["mean"], rtol=1e-6)
        allocations, waits = device.allocations, device.synchronisations
        loop.call("vae_encoder", **pictures(2))
        assert (device.allocations, device.synchronisations) == (allocations, waits + 1)


def test_a_call_of_what_is_not_there(packages: dict[str, Package]) -> None:
    with on_device(packages["plain"]) as loop, on_host(packages["plain"]) as host:
        said: list[str] = []
        for each in (loop, host):
            with pytest.raises(PackageError, match="no net 'image_encoder'") as caught:
                each.call("image_encoder", image=np.zeros((1, 8, 8, 3), np.uint8))
            said.append(str(caught.value))
        assert said[0] == said[1]
        with pytest.raises(UsageError, match="exactly"):
            loop.call("vae_encoder", image=pictures(1)["image"])
        with pytest.raises(UsageError, match="uint8"):
            loop.call("vae_encoder", **{**pictures(1), "mask": np.zeros((1, 16, 16, 1), np.float32)})


def test_a_call_frees_what_is_idle_or_is_refused(packages: dict[str, Package]) -> None:
    device, log = HostDevice(), list[str]()
    with on_device(packages["plain"], device, log=log) as loop:
        loop.draw(job_of("plain"), Clock(), decode=True)
        device.limit = device.used + 1000
        wanted = loop.call("vae_encoder", **pictures(1))["mean"]
        assert ["free idle contexts" in line for line in log] == [True]
        np.testing.assert_array_equal(loop.call("vae_encoder", **pictures(1))["mean"], wanted)
        with pytest.raises(MemoryLimitError, match=r"vae_encoder of image \(9, 128, 128, 3\).* does not fit"):
            loop.call("vae_encoder", **pictures(9, 128))
