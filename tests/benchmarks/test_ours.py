"""latentrt's own side on the host: what each workload is called with, and what it computes."""

import shutil
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from latentrt.benchmarks import process
from latentrt.benchmarks.case import WORKLOADS, Case, inputs_of, time_inputs, whole_inputs
from latentrt.benchmarks.sides.contract import NotAvailableError, OpenSide, Task, Work
from latentrt.benchmarks.sides.ours import BETWEEN, host_side, open_pipeline
from latentrt.benchmarks.sides.ours_device import device_side
from latentrt.benchmarks.sides.plain_loop import plain_side
from latentrt.engines import spec
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.package import Package, write_manifest
from latentrt.runtime.loop.denoise import HostLoop
from latentrt.runtime.model import SHIPPED
from latentrt.runtime.pipeline import Pipeline
from tests.benchmarks.stand_in_side import PACKAGE
from tests.engines.host_device import HostDevice
from tests.runtime.device_bench import device_pipeline
from tests.runtime.small_nets import IMAGE_CHANNELS, VECTORS, WIDTH, write_small_package

GUIDED = Case.of(PACKAGE.manifest, width=64, height=48, steps=4)
PLAIN = Case.of(PACKAGE.manifest, width=48, height=64, steps=3, guidance_scale=1.0, pictures=2)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return open_pipeline(Task(model=PACKAGE.root, backend="onnxruntime", threads=1))


@pytest.fixture(scope="module")
def side(pipe: Pipeline) -> Generator[OpenSide]:
    assert isinstance(pipe.loop, HostLoop)
    with closing(host_side(pipe, pipe.loop)) as opened:
        yield opened


def ran(prepared: Work) -> Mapping[str, np.ndarray]:
    prepared.run()
    return prepared.outputs()


@pytest.mark.parametrize("case", [GUIDED, PLAIN], ids=["guided", "plain"])
def test_every_workload_has_the_contracts_outputs(side: OpenSide, case: Case) -> None:
    rows, latent = case.batch, (4, case.height // 8, case.width // 8)
    expected: dict[str, dict[str, Any]] = {
        "text_encoder": {"context": ((2 if case.guided else 1, 77, 96), np.float32)},
        "invariants": {},
        "unet": {"prediction": ((rows, *latent), np.float32)},
        "update": {"latent": ((case.pictures, *latent), np.float32)},
        "vae_decoder": {"image": ((case.pictures, case.height, case.width, 3), np.uint8)},
        "picture": {"image": ((case.pictures, case.height, case.width, 3), np.uint8)},
    }
    assert set(expected) == set(WORKLOADS)
    for workload, wanted in expected.items():
        found = ran(side.prepare(workload, case))
        assert {name: (array.shape, array.dtype) for name, array in found.items()} == wanted, workload
        assert all(array.std() > 0 for array in found.values()), workload
    with pytest.raises(NotAvailableError, match="latentrt has no workload 'gemm'"):
        side.prepare("gemm", case)


def test_a_picture_is_the_pipelines_and_tells_its_stages(side: OpenSide, pipe: Pipeline) -> None:
    picture = side.prepare("picture", GUIDED)
    wanted = pipe(GUIDED.prompt, output_type="np", **GUIDED.parameters).images
    np.testing.assert_array_equal(ran(picture)["image"], wanted)
    stages = picture.figures()["stages_s"]
    assert {"text_encoder", "invariants", "unet", "update", "vae_decoder"} <= set(stages)
    assert stages["unet"] > stages["update"] > 0
    first = dict(stages)
    picture.run()
    assert picture.figures()["stages_s"] != first, "of the last run"


def test_update_calls_no_net(side: OpenSide, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    loop: Any = pipe.loop
    monkeypatch.setattr(loop, "nets", dict.fromkeys(loop.nets, None))
    update = side.prepare("update", GUIDED)
    first = ran(update)["latent"]
    np.testing.assert_array_equal(ran(update)["latent"], first)
    assert np.isfinite(first).all()
    with pytest.raises(TypeError, match="not callable"):
        side.prepare("text_encoder", GUIDED).run()


def test_memory_and_versions(side: OpenSide) -> None:
    ledger = side.memory()["ledger"]
    assert set(ledger) == {"text_encoder", "unet_context", "unet_time", "unet", "vae_decoder"}
    files = {file for name in ledger for file in PACKAGE.manifest.nets[name].weights}
    values = sum(array.size for name in files for array in load_file(PACKAGE.path(name)).values())
    float32 = sum(row["weights"] for row in ledger.values()) / 4
    assert 0.95 < float32 / values <= 1, "each weight once, though nets share files"
    assert side.versions["backend"].startswith("onnxruntime")


def test_seconds_are_of_one_of_the_repetitions(side: OpenSide, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = count(100.0, 2.0)  # every run begins at one of them and ends at the next
    monkeypatch.setattr(process, "perf_counter", lambda: next(moments))
    makers: Any = {"any": lambda case, stack: Work(call=dict, repeats=4)}
    server = process.Server(OpenSide(name="it", versions={}, makers=makers), Task(model=SHIPPED["demo"]))
    first = server.answer({"do": "prepare", "workload": "any", "case": GUIDED.to_json(), "slot": ""})
    timed = server.answer({"do": "time", "slot": "", "runs": 3})
    assert [first["seconds"], *timed["seconds"]] == [0.5] * 4
    assert (side.prepare("update", GUIDED).repeats, side.prepare("unet", GUIDED).repeats) == (BETWEEN, 1)


SMALL = Case(width=64, height=48, guidance_scale=2.0, pictures=2, steps=3)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Whose UNet has vectors, and a picture behind the latent."""
    root = tmp_path_factory.mktemp("told") / "package"
    small = write_small_package(root, vectors=True, image=True)
    shutil.copytree(PACKAGE.root / "tokenizer", root / "tokenizer")
    return write_manifest(root, small.manifest)


def test_the_inputs_are_the_contracts(package: Package) -> None:
    manifest = package.manifest
    inputs = inputs_of(package, "unet", SMALL)
    steps = np.linspace(999, 0, 3, dtype=np.float32)
    schedule = time_inputs(SMALL, manifest, inputs, steps)
    manifest.nets["unet_time"].spec.check(schedule)
    np.testing.assert_array_equal(schedule["timestep"], np.repeat(steps, 4))
    for name in VECTORS:
        np.testing.assert_array_equal(schedule[name][4:8], inputs[name])
    whole = spec.unet_whole(channels=4 + IMAGE_CHANNELS, width=WIDTH, float_dtype="float32", vectors=VECTORS)
    whole.check(whole_inputs(SMALL, manifest, inputs))


@pytest.mark.parametrize("workload", ["invariants", "unet"])
def test_both_loops_compute_them(package: Package, workload: str) -> None:
    host_loop = HostLoop(package, ONNXRUNTIME, 1)
    for name in ("unet_context", "unet_time", "unet"):
        host_loop.net(name)
    host = host_side(Pipeline.over(package, host_loop, "host", cache_bytes=0), host_loop)
    with closing(host), device_pipeline(package, HostDevice()) as (pipe, loop):
        with closing(device_side(pipe, loop)) as side:
            found, wanted = (ran(opened.prepare(workload, SMALL)) for opened in (side, host))
        assert set(found) == set(wanted)
        for name, array in wanted.items():
            assert array.std() > 0
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


def test_plain_loops_draw_no_such_pictures(package: Package) -> None:
    nets = {**package.manifest.nets, "unet_whole": package.manifest.nets["unet"]}
    whole = replace(package, manifest=replace(package.manifest, nets=nets))
    side = plain_side("it", whole, lambda name, shapes: dict, {})
    with pytest.raises(NotAvailableError, match="it has no workload 'picture'"):
        side.prepare("picture", SMALL)
