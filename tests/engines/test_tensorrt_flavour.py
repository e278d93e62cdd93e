"""The table of libraries, against the one that is installed here."""

import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

import pytest

from latentrt.engines.errors import BackendError, UsageError
from latentrt.engines.installed import install_command
from latentrt.engines.tensorrt import flavour as tensorrt_flavour
from latentrt.engines.tensorrt.builder import FLAGS, BuildOptions, Weights
from latentrt.engines.tensorrt.flavour import (
    FLAGS_NEEDING_GPU,
    FLAVOURS,
    Flavour,
    flavour,
    installed_backends,
    installed_version,
    load,
)


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    return flavour("tensorrt-rtx", "1.7.1")


@pytest.fixture(scope="module")
def trt(rtx: Flavour) -> Any:
    return load(rtx)


def test_the_installed_library_is_found_without_importing_it() -> None:
    assert installed_version("tensorrt-rtx") == version("tensorrt-rtx-cu13")
    assert installed_backends() == ("tensorrt-rtx",)
    assert flavour("tensorrt-rtx").module == "tensorrt_rtx"


@pytest.mark.parametrize(
    ("backend", "release", "line"),
    [
        ("tensorrt", "10.14.1.48", "10.14 to 10.x"),
        ("tensorrt", "10.99", "10.14 to 10.x"),
        ("tensorrt", "11.0.0.1", "11.x"),
        ("tensorrt", "11.4.0.106.post1", "11.x"),
        ("tensorrt-rtx", "1.7.1.116", "1.7 to 1.x"),
    ],
)
def test_the_version_picks_the_row(backend: str, release: str, line: str) -> None:
    assert flavour(backend, release).line == line


@pytest.mark.parametrize(
    ("backend", "release"),
    [
        ("tensorrt", "10.13.3.9"),  # its parser does not know Attention
        ("tensorrt", "8.6.1"),
        ("tensorrt", "12.0"),
        ("tensorrt-rtx", "1.6"),
        ("tensorrt", "x"),
    ],
)
def test_unsupported_releases(backend: str, release: str) -> None:
    with pytest.raises(BackendError, match=release) as caught:
        flavour(backend, release)
    assert caught.value.fix.endswith(install_command(backend, "--upgrade"))


def test_a_missing_library_names_the_command() -> None:
    with pytest.raises(BackendError, match="tensorrt, which is not installed") as caught:
        flavour("tensorrt")
    assert caught.value.fix.endswith(install_command("tensorrt"))


def test_an_unknown_backend() -> None:
    for call in (flavour, installed_version):
        with pytest.raises(BackendError, match="'onnxruntime' builds no engines"):
            call("onnxruntime")


def test_a_library_without_distribution_tells_its_own_version(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    module.__version__ = "10.14.1"  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(tensorrt_flavour, "find_spec", lambda name: object())
    assert installed_version("tensorrt") == "10.14.1"
    assert flavour("tensorrt").line == "10.14 to 10.x"


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, rtx: Flavour) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match="tensorrt_rtx cannot be imported") as caught:
        load(rtx)
    assert "--force-reinstall" in caught.value.fix


def test_rows_of_a_backend_follow_each_other_without_gap() -> None:
    for backend in {row.backend for row in FLAVOURS}:
        rows = [row for row in FLAVOURS if row.backend == backend]
        assert [row.before for row in rows[:-1]] == [row.oldest for row in rows[1:]]
        assert len({row.install for row in rows}) == 1


def test_the_live_library_has_every_name(trt: Any, rtx: Flavour) -> None:
    flags = {flag for names in FLAGS.values() for flag in names} | set(FLAGS_NEEDING_GPU) | {"TF32"}
    assert flags <= set(trt.BuilderFlag.__members__)
    assert "STRONGLY_TYPED" in trt.NetworkDefinitionCreationFlag.__members__
    assert "ATTENTION_INPUT" in trt.LayerType.__members__
    assert hasattr(trt.IAttentionInputLayer, "attention")
    assert hasattr(trt.IAttention, "decomposable")
    assert {"FLOAT", "HALF", "INT32", "INT64", "UINT8"} <= set(trt.DataType.__members__)
    assert "WORKSPACE" in trt.MemoryPoolType.__members__
    assert {"AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"} <= set(trt.HardwareCompatibilityLevel.__members__)
    names = {f"SM{name.replace('.', '')}" for name in rtx.compute_capabilities}
    assert names <= set(trt.ComputeCapability.__members__)
    for owner, methods in {
        "Builder": ("create_network", "create_builder_config", "build_serialized_network"),
        "IBuilderConfig": ("progress_monitor", "builder_optimization_level", "set_memory_pool_limit"),
        "INetworkDefinition": ("get_layer", "get_input", "get_output"),
        "OnnxParser": ("parse", "num_errors", "get_error"),
        "ParserError": ("desc", "node_name", "node_operator"),
        "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
    }.items():
        assert not [name for name in methods if not hasattr(getattr(trt, owner), name)]


def test_every_policy_has_its_flags() -> None:
    assert set(FLAGS) == set(Weights)
    for weights in Weights:
        flags = BuildOptions(weights=weights).flags
        assert flags == tuple(sorted(flags))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"optimization_level": 6}, "optimization level is 6"),
        ({"optimization_level": -1}, "optimization level is -1"),
        ({"workspace_limit": -1}, "workspace limit is -1"),
        ({"hardware_compatibility": "all"}, "hardware compatibility is 'all'"),
    ],
)
def test_options_no_library_takes(values: dict[str, Any], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        BuildOptions(**values)


@pytest.mark.parametrize("weights", [Weights.stripped, Weights.refittable])
def test_refitting_needs_a_gpu(rtx: Flavour, weights: Weights) -> None:
    with pytest.raises(BackendError, match=f"--weights {weights.value} .*needs a GPU") as caught:
        BuildOptions(weights=weights).check(rtx, has_gpu=False)
    assert "embedded, streamed" in caught.value.expected
    BuildOptions(weights=weights).check(rtx, has_gpu=True)


def test_a_library_that_builds_on_its_gpu() -> None:
    with pytest.raises(BackendError, match="there is none here"):
        BuildOptions().check(flavour("tensorrt", "11.4"), has_gpu=False)
    options = BuildOptions(hardware_compatibility="ampere_plus")
    options.check(flavour("tensorrt", "11.4"), has_gpu=True)


def test_compatibility_without_effect_is_refused(rtx: Flavour) -> None:
    with pytest.raises(BackendError, match="ignores the hardware compatibility"):
        BuildOptions(hardware_compatibility="ampere_plus").check(rtx, has_gpu=True)


def test_options_survive_the_job() -> None:
    options = BuildOptions(weights=Weights.streamed, optimization_level=1, workspace_limit=5)
    assert BuildOptions.from_json(options.to_json()) == options
