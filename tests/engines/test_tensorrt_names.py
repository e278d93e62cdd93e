"""Every name that our code asks a TensorRT library for exists in the real ones, and the simulation adds none.

Three sources: the live `tensorrt_rtx`; the binary of `tensorrt_bindings` 11 (it cannot be imported without
its libraries); and the stubs of 10.13, from the folder that LATENTRT_TENSORRT_STUBS names:

    pip download --no-deps tensorrt-stubs==10.13.0.35.1 -d DIR, then unzip the wheel there
"""

import ast
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import latentrt.engines
from tests.engines.simulated_tensorrt import SimulatedLibrary
from tests.engines.simulated_tensorrt_names import ONLY, VARIANTS

SOURCES = ("contexts", "loading", "log", "nets", "refit")
# What our code calls its objects of the library -> their class; "" is the module.
OBJECTS = {
    "trt": "",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "cache": "IRuntimeCache",
    "refitter": "Refitter",
    "parser": "OnnxParserRefitter",
    "prototype": "Weights",
}
_RTX_ALONE = {name for name, variants in ONLY.items() if variants == ("tensorrt-rtx",)}
_RTX_MEMBERS = {"get_engine_validity", "is_stream_capturable"}


def _used() -> set[tuple[str, ...]]:
    """Paths like (EngineValidity, VALID) and (ICudaEngine, num_io_tensors)."""
    used: set[tuple[str, ...]] = set()
    for name in SOURCES:
        path = Path(latentrt.engines.__path__[0]) / f"tensorrt_{name}.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            chain: list[str] = []
            while isinstance(node, ast.Attribute):
                chain.insert(0, node.attr)
                node = node.value
            base = node.id if isinstance(node, ast.Name) else ""
            for index, part in enumerate([base, *chain[:-1]] if chain else []):
                kind = OBJECTS.get(part.removeprefix("_"))
                if kind is not None:
                    rest = chain[index:]
                    used.add(tuple(filter(None, (kind, *rest[: 1 if kind else 2]))))
    return used


USED = sorted(_used())


def test_the_walk_finds_what_is_used() -> None:
    assert len(USED) > 50
    for path in (
        ("ICudaEngine", "get_device_memory_size_for_profile_v2"),
        ("IExecutionContext", "execute_async_v3"),
        ("EngineStat", "TOTAL_WEIGHTS_SIZE"),
        ("Refitter", "refit_cuda_engine_async"),
        ("OnnxParserRefitter", "refit_from_file"),
        ("IRuntimeConfig", "cuda_graph_strategy"),
        ("IRuntimeCache", "serialize"),
        ("Runtime", "engine_host_code_allowed"),
        ("IExecutionContext", "is_stream_capturable"),
    ):
        assert path in USED


def _simulated(variant: str) -> set[tuple[str, ...]]:
    """Every public class of the simulation and its members."""
    module: Any = SimulatedLibrary(variant)
    paths: set[tuple[str, ...]] = set()
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, type):
            members = {
                member for kind in value.__mro__[:2] for member in vars(kind) if kind.__module__ != "enum"
            }
            public = {member for member in members if not member.startswith("_")}
            paths |= {(name,), *((name, member) for member in public - {"get_engine_validity"})}
    if variant == "tensorrt-rtx":
        paths |= {("Runtime", "get_engine_validity")}
        config = module.IRuntimeConfig(module._world)
        paths |= {("IRuntimeConfig", member) for member in vars(config) if not member.startswith("_")}
    return {path for path in paths if not hasattr(int, path[-1])}  # enumerations are ints here


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_simulation_covers_what_is_used(variant: str) -> None:
    module: Any = SimulatedLibrary(variant)
    for path in USED:
        if variant != "tensorrt-rtx" and (path[0] in _RTX_ALONE or path[-1] in _RTX_MEMBERS):
            continue
        if variant == "tensorrt 10" and path[0] == "EngineStat":
            continue
        owner = getattr(module, path[0])
        if len(path) == 2 and path not in {("Runtime", "engine_host_code_allowed")}:
            assert hasattr(owner, path[1]) or path[1] in _instance_names(), path


def _instance_names() -> set[str]:
    """Attributes that the simulation makes in its constructors."""
    config = SimulatedLibrary("tensorrt-rtx").IRuntimeConfig(None)  # type: ignore[attr-defined]
    return set(vars(config))


# ── the real ones ────────────────────────────────────────────────────────────────────────────────


def test_live_rtx_has_every_name() -> None:
    live = pytest.importorskip("tensorrt_rtx")
    for path in {*USED, *_simulated("tensorrt-rtx")}:
        owner = live
        for name in path:
            assert hasattr(owner, name), path
            owner = getattr(owner, name)
    for name in ("EngineInvalidityDiagnostics", "EngineValidity", "DataType", "TensorLocation"):
        simulated = getattr(SimulatedLibrary("tensorrt-rtx"), name)
        for member in simulated:
            assert int(getattr(getattr(live, name), member.name)) == int(member), member


def test_the_binary_of_tensorrt_11_has_every_name() -> None:
    spec = find_spec("tensorrt_bindings")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    binaries = [path for folder in folders for path in Path(folder).glob("tensorrt*.so")]
    if not binaries:
        pytest.skip("tensorrt_bindings is not installed")
    content = binaries[0].read_bytes()
    for path in {*USED, *_simulated("tensorrt 11")}:
        if path[0] not in _RTX_ALONE and path[-1] not in _RTX_MEMBERS and path != ("nptype",):
            for name in path:
                # the linker may have merged a string into the end of a longer one
                assert name.encode() + b"\0" in content, path
    for name in (*_RTX_ALONE - {"IRuntimeConfig"}, *_RTX_MEMBERS):
        assert b"\0" + name.encode() + b"\0" not in content, f"{name}: the table of abilities is out of date"


@pytest.fixture(scope="module")
def stubs() -> dict[str, set[str]]:
    folder = os.environ.get("LATENTRT_TENSORRT_STUBS")
    files = sorted(Path(folder).rglob("*.pyi")) if folder else []
    if not files:
        pytest.skip("LATENTRT_TENSORRT_STUBS names no folder with the stubs")
    classes: dict[str, set[str]] = {}
    for file in files:  # one signature in them is no Python, so they are read line by line
        members = set[str]()
        for line in file.read_text(encoding="utf-8").splitlines():
            if found := re.match(r"(?:class|def) (\w+)", line):
                members = classes.setdefault(found[1], set())
            elif found := re.match(r"    (?:def |class )?(\w+)(?:[:(]|$)", line):
                members.add(found[1])
    return classes


def test_the_stubs_of_tensorrt_10_have_every_name(stubs: dict[str, set[str]]) -> None:
    newer = {"EngineStat", *_RTX_ALONE}
    for path in {*USED, *_simulated("tensorrt 10")}:
        if path[0] in newer or path[-1] in (*_RTX_MEMBERS, "get_engine_stat", "__version__"):
            continue
        assert path[0] in stubs, path
        if len(path) == 2:
            assert path[1] in stubs[path[0]], path
    assert not newer - {"IRuntimeConfig"} & set(stubs)
