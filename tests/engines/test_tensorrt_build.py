"""Real builds with TensorRT-RTX, which needs no GPU for them: the demo model's nets, and what goes wrong."""

from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.cuda.facts import DeviceFacts
from latentrt.engines.errors import BackendError, PackageError, StorageError, UsageError
from latentrt.engines.net_weights import engine_bytes, net_tensors
from latentrt.engines.package import Package
from latentrt.engines.profiles import Profile, net_profiles
from latentrt.engines.store.engine_store import BuildProgress, EngineStore, Entry, Miss
from latentrt.engines.store.key import ANYWHERE
from latentrt.engines.tensorrt import build as build_module
from latentrt.engines.tensorrt import build as build_process
from latentrt.engines.tensorrt.build import (
    WantedEngine,
    build_package,
    built_nets,
    engine_key,
    find_engines,
    plan_build,
    run_builder,
    target,
)
from latentrt.engines.tensorrt.builder import BuildOptions, Job, Weights, _replaceable
from latentrt.engines.tensorrt.flavour import flavour, installed_version, load
from latentrt.engines.tensorrt.network import mark_weights, parse_graph
from tests.engines.builder_jobs import DEMO, RTX, SMALL, build_small, job_of

NETS = (
    "text_encoder",
    "vae_encoder",
    "unet_context",
    "unet_time",
    "unet",
    "step",
    "step_masked",
    "vae_decoder",
)
USUAL = [Profile.parse("128x128:b1-2")]
GPU = DeviceFacts(
    index=0,
    name="NVIDIA L4",
    compute_capability=(8, 9),
    multiprocessors=58,
    driver="580.82.07",
    cuda="13.0",
    total=24 * 2**30,
    unified=False,
    uuid="GPU-0",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(store, engines, progress) of the demo model, with and without guidance."""
    store, progress = EngineStore(tmp_path_factory.mktemp("store") / "engines"), list[BuildProgress]()
    return store, build_package(DEMO, RTX, USUAL, BuildOptions(), store, progress.append), progress


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


# ── builds that succeed ─────────────────────────────────────────────────────────────────────────────────


def test_every_net_of_the_demo_builds(built: Any) -> None:
    store, engines, _ = built
    assert tuple(item.net for item in engines) == NETS
    for item in engines:
        facts = item.entry.facts
        spec = DEMO.manifest.nets[item.net].spec
        assert (facts["inputs"], facts["outputs"]) == tuple(
            [tensor.name for tensor in tensors] for tensors in (spec.inputs, spec.outputs)
        )
        assert facts["size"] == item.entry.size == len(item.entry.read())
        assert facts["size"] > engine_bytes(DEMO, item.net)
        assert (engine_bytes(DEMO, item.net) > 0) == (not item.net.startswith("step"))
        assert facts["layers"] > 10
        assert 0 < facts["peak_rss"] < 2e9
        assert facts["seconds"] > facts["parse_seconds"] > 0
        assert facts["library"].startswith("tensorrt_rtx 1.")
        assert item.why
        assert "has been built yet" in item.why
    names = sorted(path.name for path in store.root.glob("engines/*/*"))
    assert names == ["engine.bin"] * len(NETS) + ["manifest.json"] * len(NETS)


def test_one_engine_has_profiles_with_and_without_guidance(built: Any) -> None:
    labels = {item.net: item.entry.facts["labels"] for item in built[1]}
    assert labels["unet"] == ["128x128 b1-2 guided", "128x128 b1-2 unguided"]
    assert labels["unet_time"] == ["1-2000@30 steps"]
    assert built[1][0].entry.facts["profiles"] == ["128x128:b1-2"]


def test_one_engine_has_two_sizes_and_only_what_they_change_is_built(built: Any) -> None:
    profiles = [*USUAL, Profile.parse("192x128:b1")]
    planned = {item.net: item for item in plan_build(DEMO, RTX, profiles, BuildOptions(), built[0])}
    missing = [net for net, item in planned.items() if item.why]
    assert missing == ["vae_encoder", "unet", "step", "step_masked", "vae_decoder"]
    assert "differs in profiles" in planned["unet"].why
    assert isinstance(planned["text_encoder"].found, Entry)
    (decoder,) = build_package(DEMO, RTX, profiles, BuildOptions(), built[0], nets=["vae_decoder"])
    assert decoder.entry.facts["labels"] == ["128x128 b1-2", "192x128 b1"]
    assert decoder.entry.facts["profiles"] == ["128x128:b1-2", "192x128:b1"]


def test_progress_never_falls_and_ends_at_one(built: Any) -> None:
    progress: list[BuildProgress] = built[2]
    for index, net in enumerate(NETS):
        own = [item.fraction for item in progress if item.net == net]
        assert own == sorted(own)
        assert (own[0], own[-1]) == (0.0, 1.0)
        assert {item.index for item in progress if item.net == net} == {index}
    assert {item.total for item in progress} == {len(NETS)}
    assert {"Parsing", "Optimizing graph", "Writing"} - {item.phase for item in progress} <= {
        "Optimizing graph"
    }


def test_a_second_build_builds_nothing(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_process, "_COMMAND", ("false",))
    store, first, _ = built
    progress: list[BuildProgress] = []
    again = build_package(DEMO, RTX, USUAL, BuildOptions(), store, progress.append)
    assert [item.entry for item in again] == [item.entry for item in first]
    assert not any(item.why for item in again)
    assert progress == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (BuildOptions(optimization_level=0), "optimization_level (3 there, 0 here)"),
        (BuildOptions(workspace_limit=2**20), "workspace_limit (0 there, 1048576 here)"),
        (BuildOptions(weights=Weights.streamed), "flags (none there, WEIGHT_STREAMING here)"),
    ],
)
def test_another_option_is_another_engine_and_the_reason_says_which(
    built: Any, options: BuildOptions, field: str
) -> None:
    for item in plan_build(DEMO, RTX, USUAL, options, built[0]):
        assert isinstance(item.found, Miss)
        assert item.why.endswith(f"of {item.net}, differs in {field}")


def test_the_runtime_finds_engines_whatever_their_profiles_and_options(store: EngineStore) -> None:
    row, version = flavour(RTX), installed_version(RTX) or ""
    assert find_engines(DEMO, "unet_time", row, version, store) == ()
    (first,) = build_small(DEMO, store)
    (second,) = build_small(DEMO, store, options=BuildOptions(optimization_level=1))
    found = find_engines(DEMO, "unet_time", row, version, store)
    assert {entry.path for entry, _ in found} == {first.entry.path, second.entry.path}
    assert all([item.label for item in profiles] == first.entry.facts["labels"] for _, profiles in found)
    assert find_engines(DEMO, "unet", row, version, store) == ()
    assert find_engines(DEMO, "unet_time", row, "1.8", store) == ()


def test_options_reach_the_library(store: EngineStore) -> None:
    options = BuildOptions(weights=Weights.streamed, optimization_level=0, workspace_limit=2**24)
    (first,) = build_small(DEMO, store, options=options)
    (second,) = build_small(DEMO, store)
    assert first.entry.key.flags == ("WEIGHT_STREAMING",)
    assert first.entry.path != second.entry.path
    assert "differs in flags" in second.why


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────


need_gpu = pytest.mark.parametrize("weights", [Weights.stripped, Weights.refittable])


@need_gpu
def test_engines_that_need_a_gpu_say_so_before_building(store: EngineStore, weights: Weights) -> None:
    with pytest.raises(BackendError, match=rf"--weights {weights.value} .*needs a GPU"):
        build_small(DEMO, store, options=BuildOptions(weights=weights))
    assert not store.root.exists()


@need_gpu
def test_the_library_itself_refuses_them_here(tmp_path: Path, weights: Weights) -> None:
    """If this fails because the library builds them: take the flags out of `FLAGS_NEEDING_GPU`."""
    job = job_of("unet_time", tmp_path / "e", options=BuildOptions(weights=weights))
    with pytest.raises(BackendError, match=r"cannot build the net 'unet_time': .*CUDA_SUCCESS"):
        run_builder(job, lambda phase, fraction: None)


def test_the_library_knows_every_weight_by_the_name_in_its_graph(tmp_path: Path) -> None:
    """Marking needs no GPU, and refuses no weight; building then does."""
    row = flavour(RTX)
    trt = load(row)
    logger = trt.Logger(trt.Logger.ERROR)
    for net in built_nets(DEMO):
        job = job_of(net, tmp_path / "e")
        builder = trt.Builder(logger)
        network, _parser = parse_graph(trt, row, builder, logger, job.graph, job.weights)
        names = _replaceable(job)
        assert set(names) == {key for key, item in net_tensors(DEMO, net).items() if len(item.shape) > 1}
        assert bool(names) == (not net.startswith("step"))
        mark_weights(row, network, names, graph=job.graph)
        with pytest.raises(BackendError, match=r"1 weights of .* not in its network, first 'other'"):
            mark_weights(row, network, [*names, "other"], graph=job.graph)


def test_the_nets_of_the_loop_use_every_weight_of_the_whole_unet() -> None:
    used = {name for net in ("unet", "unet_context", "unet_time") for name in net_tensors(DEMO, net)}
    whole = set(net_tensors(DEMO, "unet_whole"))
    assert used == whole
    assert len(whole) > 200


def test_an_unreadable_graph_has_no_tensors(package: Package) -> None:
    path = package.path("unet/loop.onnx")
    for content in (b"\xff" * 8, b"\x3a\x05\x00"):
        path.write_bytes(content)
        with pytest.raises(PackageError, match=r"loop.onnx is not a readable ONNX graph .*export"):
            net_tensors(package, "unet")


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_portable_engine_names_no_device() -> None:
    assert target(flavour(RTX), GPU) == target(flavour("tensorrt", "11.4"), None) == ANYWHERE


def test_other_engines_name_the_device_and_the_driver() -> None:
    row = flavour("tensorrt", "11.4")
    profiles = net_profiles("unet", DEMO.manifest.nets["unet"].spec, SMALL)
    key = engine_key(DEMO, "unet", row, "11.4.0", profiles, BuildOptions(), gpu=GPU)
    assert (key.compute_capability, key.gpu, key.driver) == ("sm_89", "NVIDIA L4, 58 SMs, 24 GiB", "580")
    assert key.weights == DEMO.manifest.files["unet/weights.safetensors"].sha256


def test_a_library_with_a_timing_cache_gets_it_back_with_the_next_build(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bytes] = []

    def builder(job: Job, report: Any, **_: Any) -> dict[str, Any]:
        assert job.timing_cache
        given.append(job.timing_cache.read_bytes())
        job.timing_cache.write_bytes(b"timings")
        job.engine.write_bytes(b"engine")
        return {}

    monkeypatch.setattr(build_module, "run_builder", builder)
    monkeypatch.setattr(build_module, "flavour", lambda backend: flavour(backend, "11.4"))
    monkeypatch.setattr(build_module, "installed_version", lambda backend: "11.4")
    for net in ("unet", "vae_decoder"):
        (item,) = build_package(DEMO, "tensorrt", SMALL, BuildOptions(), store, nets=[net], gpu=GPU)
        assert sorted(path.name for path in item.entry.path.iterdir()) == ["engine.bin", "manifest.json"]
    assert given == [b"", b"timings"]
    assert [path.name for path in store.root.glob("caches/timing/*")] == [
        "tensorrt_11_4_sm_89_NVIDIA_L4__58_SMs__24_GiB"
    ]


@pytest.mark.parametrize("failing", ["nothing written", "disk full"])
def test_a_timing_cache_that_cannot_be_kept_costs_no_engine(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def builder(job: Job, report: Any, **_: Any) -> dict[str, Any]:
        assert job.timing_cache
        job.timing_cache.unlink()
        if failing == "disk full":
            job.timing_cache.write_bytes(b"timings")
        job.engine.write_bytes(b"engine")
        return {"warnings": ["an earlier one"]}

    def full(path: Path, data: bytes) -> None:
        raise StorageError("the disk is full", expected="room", fix="Make some.")

    monkeypatch.setattr(build_module, "run_builder", builder)
    monkeypatch.setattr(build_module, "flavour", lambda backend: flavour(backend, "11.4"))
    monkeypatch.setattr(build_module, "installed_version", lambda backend: "11.4")
    monkeypatch.setattr(store, "write_side_file", full)
    (item,) = build_package(DEMO, "tensorrt", SMALL, BuildOptions(), store, nets=["unet"], gpu=GPU)
    assert item.entry.read() == b"engine"
    warnings = item.entry.facts["warnings"]
    assert warnings[0] == "an earlier one"
    assert [("disk is full" in line) for line in warnings[1:]] == ([True] if failing == "disk full" else [])


def test_nets_can_be_picked() -> None:
    assert built_nets(DEMO) == NETS
    assert built_nets(DEMO, ["vae_decoder", "unet"]) == ("unet", "vae_decoder")
    assert built_nets(DEMO, ["unet_controlled"]) == ("unet_controlled",)
    with pytest.raises(UsageError, match="no net 'unet_whole' to build"):
        built_nets(DEMO, ["unet_whole"])


def test_a_plan_says_why(built: Any) -> None:
    item: WantedEngine = plan_build(DEMO, RTX, SMALL, BuildOptions(), built[0], nets=["unet"])[0]
    assert item.why
    assert [profile.label for profile in item.profiles] == ["64x64 b1 guided", "64x64 b1 unguided"]


def test_weights_changed_in_place_get_no_engine(package: Package, store: EngineStore) -> None:
    weights = package.path(package.manifest.nets["unet"].weights[0])
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PackageError, match=r"weights.safetensors has sha256 .* as the manifest says"):
        build_package(package, RTX, USUAL, BuildOptions(), store, nets=["unet"])
    assert not store.entries()
