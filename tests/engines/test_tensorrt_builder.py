"""The process that builds: contracts, kills, interrupts, and what it says of its progress."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from latentrt.engines.errors import BackendError, MemoryLimitError, NumericError, PackageError, StorageError
from latentrt.engines.package import Package, write_manifest
from latentrt.engines.spec import NetSpec, TensorSpec
from latentrt.engines.store.engine_store import BuildProgress, EngineStore
from latentrt.engines.tensorrt import build as build_process
from latentrt.engines.tensorrt import builder as tensorrt_builder
from latentrt.engines.tensorrt.build import run_builder
from latentrt.engines.tensorrt.builder import Job, Phases, build, check_contract, parse_graph
from latentrt.engines.tensorrt.flavour import flavour, load
from latentrt.engines.tensorrt.preflight import Room
from tests.engines.builder_jobs import DEMO, RTX, assert_clean, build_small, job_of


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


def with_spec(package: Package, change: Callable[[TensorSpec], TensorSpec]) -> Package:
    """The package with another output in the contract of its only net."""
    net = package.manifest.nets["unet"]
    spec = NetSpec(inputs=net.spec.inputs, outputs=tuple(map(change, net.spec.outputs)))
    manifest = replace(package.manifest, nets={"unet": replace(net, spec=spec)})
    return write_manifest(package.root, manifest)


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda spec: replace(spec, name="z"), "output 'y' is not in the contract; output 'z' is missing"),
        (lambda spec: replace(spec, dtype="float16"), "output 'y' is DataType.FLOAT, not float16"),
        (
            lambda spec: replace(spec, shape=("B", 4, 1)),
            r"output 'y' has the shape \(-1, 4\), not \(B, 4, 1\)",
        ),
        (lambda spec: replace(spec, shape=("B", 5)), r"output 'y' has .* not \(B, 5\)"),
        (lambda spec: replace(spec, shape=("B", "T")), r"output 'y' has .* not \(B, T\)"),
    ],
)
def test_a_graph_that_breaks_its_contract(
    package: Package, store: EngineStore, change: Callable[[TensorSpec], TensorSpec], found: str
) -> None:
    with pytest.raises(PackageError, match=f"does not keep its net's contract: {found}"):
        build_small(with_spec(package, change), store)
    assert_clean(store)


def test_an_input_that_is_fixed_where_the_contract_is_open(package: Package) -> None:
    row = flavour(RTX)
    trt = load(row)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    graph = package.path("unet/loop.onnx")
    network, _parser = parse_graph(trt, row, builder, logger, graph)
    spec = package.manifest.nets["unet"].spec
    check_contract(trt, network, spec, graph=graph)
    network.get_input(0).shape = (2, 4)
    with pytest.raises(PackageError, match=r"input 'x' has the shape \(2, 4\), not \(B, 4\)"):
        check_contract(trt, network, spec, graph=graph)


def test_a_corrupt_graph(package: Package, tmp_path: Path) -> None:
    graph = package.path("unet/loop.onnx")
    graph.write_bytes(graph.read_bytes().replace(b"Add", b"Odd"))
    job = job_of("unet", tmp_path / "engine", package=package)
    with pytest.raises(PackageError, match=r"tensorrt_rtx cannot read .*loop\.onnx: .*Odd"):
        run_builder(job, lambda phase, fraction: None)
    graph.write_bytes(b"\x0a\xff\xff")
    with pytest.raises(PackageError, match="tensorrt_rtx cannot read"):
        run_builder(job, lambda phase, fraction: None)


def test_a_killed_builder(store: EngineStore) -> None:
    pids: list[int] = []

    def kill(now: BuildProgress) -> None:
        os.kill(pids[-1], signal.SIGKILL)

    with pytest.raises(MemoryLimitError, match="builder of the net 'unet_time' was killed") as caught:
        build_small(DEMO, store, progress=kill, started=pids.append)
    assert caught.value.culprit == "unet_time"
    assert_clean(store)
    (item,) = build_small(DEMO, store)
    assert "has been built yet" in item.why


def test_an_interrupt_ends_the_builder(store: EngineStore) -> None:
    pids: list[int] = []

    def interrupt(now: BuildProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_small(DEMO, store, progress=interrupt, started=pids.append)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert_clean(store)


def test_the_builder_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    command = [sys.executable, "-m", "latentrt.engines.tensorrt.builder"]
    job = json.dumps(job_of("unet", engine).to_json())
    done = subprocess.run(command, input=job + "\n", text=True, capture_output=True, check=False, timeout=60)
    assert done.returncode == 1  # stdin closed behind the job
    assert '"facts"' not in done.stdout
    assert not engine.exists()


def test_a_crashed_builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "import os; os.write(1, b'{cut'); os.write(2, b'oh no'); os.abort()"
    monkeypatch.setattr(build_process, "_COMMAND", (sys.executable, "-c", script))
    with pytest.raises(BackendError, match=r"'unet_time' crashed with exit code -6: .*oh no"):
        run_builder(job_of("unet_time", tmp_path / "engine"), lambda phase, fraction: None)


def test_a_builder_that_never_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_process, "_COMMAND", (sys.executable, "-c", "import os; os.close(0)"))
    job = replace(job_of("unet_time", tmp_path / "engine"), net="x" * 2**20)
    with pytest.raises(BackendError, match="crashed with exit code 0"):
        run_builder(job, lambda phase, fraction: None)


def test_an_engine_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written") as caught:
        run_builder(job_of("unet_time", tmp_path / "missing" / "engine"), lambda phase, fraction: None)
    assert "--store" in caught.value.fix


def test_no_room(store: EngineStore) -> None:
    with pytest.raises(StorageError, match="of disk are free for the engine of 'unet_time'"):
        build_small(DEMO, store, room=lambda folder: Room(disk=1, ram=None))
    assert_clean(store)


def test_out_of_memory_is_its_own_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = flavour(RTX)
    job = job_of("unet_time", tmp_path / "engine")
    said = ["[defaultAllocator] CUDA: out of memory: requested 9 bytes"]
    error = tensorrt_builder._refused(job, row, said)  # pyright: ignore[reportPrivateUsage]
    assert isinstance(error, MemoryLimitError)
    assert "--workspace" in error.fix
    assert error.culprit == "unet_time"
    told = {"error": {"type": "MemoryLimitError", "found": "f", "expected": "e", "fix": "x"}}
    monkeypatch.setattr(build_process, "_COMMAND", (sys.executable, "-c", f"print({json.dumps(told)!r})"))
    with pytest.raises(MemoryLimitError, match="f; expected e") as caught:
        run_builder(job, lambda phase, fraction: None)
    assert caught.value.culprit == "unet_time", "also across the pipe"


def test_a_job_survives_the_pipe(tmp_path: Path) -> None:
    job = replace(job_of("unet", tmp_path / "e"), timing_cache=tmp_path / "t")
    text = json.dumps(job.to_json())
    assert json.dumps(Job.from_json(json.loads(text)).to_json()) == text


def test_building_in_this_process(tmp_path: Path, package: Package) -> None:
    told: list[tuple[str, float]] = []
    job = job_of("unet", tmp_path / "engine", package=package)
    facts = build(job, lambda phase, fraction: told.append((phase, fraction)))
    assert (tmp_path / "engine").stat().st_size == facts["size"]
    assert (told[0], told[-1]) == (("Parsing", 0.0), ("Writing", 1.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timings_are_read_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # RTX has the calls, though no use for them: the nearest thing to TensorRT that runs without a GPU.
    row = replace(flavour(RTX), cache="timing")
    monkeypatch.setattr("latentrt.engines.tensorrt.builder.flavour", lambda backend: row)
    job = replace(job_of("unet_time", tmp_path / "engine"), timing_cache=tmp_path / "timings")
    for _ in range(2):
        assert build(job, lambda phase, fraction: None)["size"] > 0
        assert (tmp_path / "timings").stat().st_size > 0


@pytest.mark.parametrize("refused_by", ["create_timing_cache", "set_timing_cache"])
def test_timings_that_the_library_refuses_are_begun_anew(tmp_path: Path, refused_by: str) -> None:
    created: list[bytes] = []
    attached: list[bytes] = []

    class Config:
        def create_timing_cache(self, known: bytes) -> bytes | None:
            created.append(known)
            return None if known and refused_by == "create_timing_cache" else known

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch, "another GPU's timings"
            if cache and refused_by == "set_timing_cache":
                return False
            attached.append(cache)
            return True

    path = tmp_path / "timings"
    path.write_bytes(b"damaged")
    tensorrt_builder._use_timings(Config(), path)  # pyright: ignore[reportPrivateUsage]
    assert (created, attached) == ([b"damaged", b""], [b""])
    path.unlink()
    tensorrt_builder._use_timings(Config(), path)  # pyright: ignore[reportPrivateUsage]
    assert (created[2:], attached[1:]) == ([b""], [b""])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("failing", ["none attached", "no bytes", "disk"])
def test_timings_that_cannot_be_kept_cost_no_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    row = replace(flavour(RTX), cache="timing")
    monkeypatch.setattr("latentrt.engines.tensorrt.builder.flavour", lambda backend: row)
    save = tensorrt_builder._save_timings  # pyright: ignore[reportPrivateUsage]

    class Cache:
        def serialize(self) -> bytes | None:
            return None if failing == "no bytes" else b"timings"

    class Config:
        def get_timing_cache(self) -> Cache | None:
            return None if failing == "none attached" else Cache()

    monkeypatch.setattr(tensorrt_builder, "_save_timings", lambda config, path: save(Config(), path))
    timings = tmp_path / "timings"
    if failing == "disk":
        timings = tmp_path / "missing" / "timings"
    job = replace(job_of("unet_time", tmp_path / "engine"), timing_cache=timings)
    facts = build(job, lambda phase, fraction: None)
    assert (tmp_path / "engine").stat().st_size == facts["size"] > 0
    assert facts["warnings"][0].startswith("the timing cache was not kept: ")
    assert not timings.exists()


def test_nested_phases_are_one_fraction() -> None:
    told: list[tuple[str, float]] = []
    phases = Phases(report=lambda phase, fraction: told.append((phase, fraction)), share=0.5)
    phases.start("all", "", 2)
    phases.start("first", "all", 4)
    phases.step("first", 1)
    phases.start("deep", "first", 2)
    phases.step("deep", 0)
    phases.finish("deep")
    phases.finish("first")
    phases.step("all", 0)
    phases.start("second", "all", 1)
    phases.start("deeper", "second", 1)
    phases.step("deeper", 0)
    phases.step("unknown", 3)
    phases.step("all", 1)
    phases.start("more", "", 1)
    phases.finish("more")
    assert told == [("first", 0.125), ("first", 0.156), ("all", 0.25), ("second", 0.5)]


def test_phases_that_name_each_other_come_to_an_end() -> None:
    phases = Phases(report=lambda phase, fraction: None)
    phases.start("a", "b", 1)
    phases.start("b", "a", 1)
    phases.step("a", 0)


def test_an_error_of_another_kind_stays_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = {"error": {"type": NumericError.__name__, "found": "f", "expected": "e", "fix": "x"}}
    script = f"print({json.dumps(told)!r}); raise SystemExit(4)"
    monkeypatch.setattr(build_process, "_COMMAND", (sys.executable, "-c", script))
    with pytest.raises(BackendError, match=r"f; expected e\. x"):
        run_builder(job_of("unet_time", tmp_path / "engine"), lambda phase, fraction: None)
