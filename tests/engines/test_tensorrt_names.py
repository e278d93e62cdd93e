"""Every name and call of our code exists in the three TensorRT libraries, and the simulation adds no name.

Names, numbers of arguments and keywords are compared here with what `tensorrt_signatures.py` reads of the
libraries, for every object that is called as in OBJECTS; `test_tensorrt_types.py` compares types.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import latentrt.engines
from tests.engines.simulated_tensorrt import SimulatedLibrary
from tests.engines.simulated_tensorrt_names import ONLY, VARIANTS
from tests.engines.tensorrt_signatures import LIBRARIES, Declared, declared, signature

FOLDER = Path(latentrt.engines.__path__[0])
RUNNING = ("contract", "loading", "log", "nets", "refit")  # what the simulation stands in for
SOURCES = (*RUNNING, "builder", "network")
# What our code calls its objects of the library -> their class; "" is the module.
OBJECTS = {
    "trt": "",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "builder": "Builder",
    "network": "INetworkDefinition",
}
# … and what only one file calls so.
LOCAL = {
    "nets": {"config": "IRuntimeConfig", "cache": "IRuntimeCache"},
    "refit": {"parser": "OnnxParserRefitter", "prototype": "Weights"},
    "builder": {
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "plan": "IHostMemory",
        "cache": "ITimingCache",
    },
    "network": {
        "parser": "OnnxParser",
        "error": "ParserError",
        "layer": "IAttentionInputLayer",
        "tensor": "ITensor",
    },
}
_RTX_ALONE = {name for name, variants in ONLY.items() if variants == ("tensorrt-rtx",)}
_RTX_MEMBERS = {"get_engine_validity", "is_stream_capturable"}
# What our code asks for only where a library has it (`flavour.abilities`, `parse_graph`).
_NEWER = {
    *((name, "") for name in _RTX_ALONE - {"IRuntimeConfig"}),
    ("Runtime", "get_engine_validity"),
    ("IExecutionContext", "is_stream_capturable"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeConfig", "cuda_graph_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
}
ABSENT = {
    "tensorrt 10": {
        *_NEWER,
        ("EngineStat", ""),
        ("ICudaEngine", "get_engine_stat"),
        ("IAttentionInputLayer", ""),
        ("LayerType", "ATTENTION_INPUT"),
    },
    "tensorrt 11": _NEWER,
    "tensorrt-rtx": set[tuple[str, str]](),
}


def source(name: str) -> str:
    return (FOLDER / "tensorrt" / f"{name}.py").read_text(encoding="utf-8")


def _used() -> set[tuple[str, ...]]:
    """Paths like (EngineValidity, VALID) and (ICudaEngine, num_io_tensors)."""
    used: set[tuple[str, ...]] = set()
    for name in RUNNING:
        objects = {**OBJECTS, **LOCAL.get(name, {})}
        for node in ast.walk(ast.parse(source(name))):
            chain: list[str] = []
            while isinstance(node, ast.Attribute):
                chain.insert(0, node.attr)
                node = node.value
            base = node.id if isinstance(node, ast.Name) else ""
            for index, part in enumerate([base, *chain[:-1]] if chain else []):
                kind = objects.get(part.removeprefix("_"))
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
        ("Refitter", "set_named_weights"),
        ("Weights", "size"),
        ("OnnxParserRefitter", "refit_from_bytes"),
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


class Calls:
    """What of one source does not fit a library."""

    def __init__(self, library: str, name: str, text: str) -> None:
        self._declared: Declared = declared(library)
        self._absent = ABSENT[library]
        self._objects = {**OBJECTS, **LOCAL.get(name, {})}
        self._tree = ast.parse(text)
        self.checked = 0

    def problems(self) -> list[str]:
        found = list[str]()
        for node in ast.walk(self._tree):
            said: Iterator[str] = iter(())
            if isinstance(node, ast.Attribute):
                said = self._attribute(node)
            elif isinstance(node, ast.Call):
                said = self._call(node)
            elif isinstance(node, ast.ClassDef):
                said = self._overrides(node)
            found += [f"line {getattr(node, 'lineno', 0)}: {text}" for text in said]
        return found

    def _kind(self, node: ast.expr) -> tuple[str, bool] | None:
        """Class of a value, and whether it is an instance; None if it is nothing of the library."""
        if isinstance(node, ast.Name):
            kind = self._objects.get(node.id)
            return None if kind is None else (kind, True)
        if isinstance(node, ast.Call):
            return self._result(node.func)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self._kind(node.value)
        if owner is None:
            kind = self._objects.get(node.attr.removeprefix("_"))
            return None if kind is None else (kind, True)
        if owner == ("", True):
            return node.attr, False
        member = self._declared.get(owner[0], {}).get(node.attr, {})
        if member.get("kind") == "property":
            return self._known(member["text"][0] if member["text"] else "")
        return (owner[0], True) if member.get("kind") == "value" else None

    def _result(self, function: ast.expr) -> tuple[str, bool] | None:
        kind = self._kind(function)
        if kind is not None and not kind[1]:  # a class makes an instance of itself
            return kind[0], True
        owner = self._kind(function.value) if isinstance(function, ast.Attribute) else None
        if owner is None:
            return None
        texts = self._declared.get(owner[0], {}).get(getattr(function, "attr", ""), {}).get("text") or [""]
        return self._known(signature(texts[0]).returns) if texts[0] else None

    def _known(self, kind: str) -> tuple[str, bool] | None:
        return (kind, True) if kind in self._declared else None

    def _owner(self, node: ast.expr) -> tuple[str, bool] | None:
        """What an attribute belongs to; None also where the library is known to lack it and is not asked."""
        if not isinstance(node, ast.Attribute) or (node.attr.startswith("__") and node.attr != "__init__"):
            return None
        owner = self._kind(node.value)
        if owner is None or {(owner[0] or node.attr, ""), (owner[0], node.attr)} & self._absent:
            return None
        return owner

    def _attribute(self, node: ast.Attribute) -> Iterator[str]:
        owner = self._owner(node)
        if owner is None:
            return
        self.checked += 1
        member = self._declared.get(owner[0], {}).get(node.attr)
        if member is None:
            yield f"{owner[0]}.{node.attr} does not exist"
        elif isinstance(node.ctx, ast.Store) and not member.get("settable"):
            yield f"{owner[0]}.{node.attr} cannot be set"

    def _call(self, node: ast.Call) -> Iterator[str]:
        owner = self._owner(node.func)
        if owner is None or not isinstance(node.func, ast.Attribute):
            return
        kind, name, bound = owner[0], node.func.attr, owner[1]
        if (kind, bound) == ("", True) and name in self._declared:
            kind, name = name, "__init__"
        member = self._declared.get(kind, {}).get(name)
        if member is None or any(isinstance(one, ast.Starred) for one in node.args):
            return
        positional = len(node.args) + (bound and bool(kind))
        keywords = [word.arg or "" for word in node.keywords]
        if not any(signature(text).accepts(positional, keywords) for text in member.get("text", ())):
            yield f"{kind}.{name} takes {member.get('text')}, not {ast.unparse(node)}"

    def _overrides(self, node: ast.ClassDef) -> Iterator[str]:
        """The library calls our methods by position."""
        for base in node.bases:
            kind = self._kind(base)
            for method in [item for item in node.body if kind and isinstance(item, ast.FunctionDef)]:
                texts = self._declared.get(kind[0], {}).get(method.name, {}).get("text", ())  # type: ignore[index]
                places = {len(signature(text).parameters) for text in texts}
                if method.name != "__init__" and len(method.args.args) not in places:
                    yield f"{method.name} overrides {list(texts) or 'nothing'}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_call_fits(library: str) -> None:
    checked = 0
    for name in SOURCES:
        calls = Calls(library, name, source(name))
        assert calls.problems() == [], name
        checked += calls.checked
    assert checked > 100


WRONG = (
    ("nets", "context.infer_shapes()", "context.infer_shape()", "IExecutionContext.infer_shape does not"),
    ("nets", "set_device_memory(scratch, needed)", "set_device_memory(scratch)", "set_device_memory takes"),
    ("nets", "context.infer_shapes()", "context.infer_shapes(1)", "infer_shapes takes"),
    ("builder", "ignore_mismatch=False", "ignore_mismatches=False", "set_timing_cache takes"),
    ("builder", "cache.serialize()", "cache.save()", "ITimingCache.save does not"),
    (
        "builder",
        "MemoryPoolType.WORKSPACE",
        "MemoryPoolType.WORKSPACES",
        "MemoryPoolType.WORKSPACES does not",
    ),
    ("builder", "phase_name: str, step: int", "phase_name: str", "step_complete overrides"),
    ("builder", "trt.Builder(log.logger)", "trt.Builder()", "Builder.__init__ takes"),
    ("network", "trt.OnnxParser(network, logger)", "trt.OnnxParser(network, log=logger)", "__init__ takes"),
    (
        "network",
        "trt.OnnxParser(network, logger)",
        "trt.ONNXParser(network, logger)",
        ".ONNXParser does not",
    ),
    ("network", "network.mark_weights_refittable(", "network.mark_weight_refittable(", "does not"),
    ("refit", "get_weights_prototype(name)", "get_weights_prototype()", "get_weights_prototype takes"),
    ("refit", "of.trt.Weights(prototype.dtype, ", "of.trt.Weights(", "Weights.__init__ takes"),
    ("contract", "trt.TensorLocation.DEVICE", "trt.TensorLocation.GPU", "TensorLocation.GPU does not"),
    ("nets", "engine.weight_streaming_budget_v2 =", "engine.streamable_weights_size =", "cannot be set"),
)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "right", "wrong", "said"), WRONG)
def test_a_wrong_call_is_found(library: str, name: str, right: str, wrong: str, said: str) -> None:
    text = source(name)
    assert right in text
    found = Calls(library, name, text.replace(right, wrong, 1)).problems()
    assert found
    assert all(said in one for one in found)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_is_not_asked_for_it_does_not_have(library: str) -> None:
    for kind, member in ABSENT[library]:
        assert member not in declared(library)[kind] if member else kind not in declared(library), (
            kind,
            member,
        )


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_name_exists(library: str) -> None:
    found = declared(library)
    for path in {*USED, *_simulated(library)}:
        kind, member = (*path, "")[:2]
        if {(kind, ""), (kind, member)} & ABSENT[library]:
            continue
        assert member in found[kind] if member else kind in found[""], path


def test_numbers_of_the_live_library() -> None:
    live = pytest.importorskip("tensorrt_rtx")
    for name in ("EngineInvalidityDiagnostics", "EngineValidity", "DataType", "TensorLocation"):
        for member in getattr(SimulatedLibrary("tensorrt-rtx"), name):
            assert int(getattr(getattr(live, name), member.name)) == int(member), member
