"""Our calls type-check against stubs of TensorRT 10, and stubs made of what the newer libraries declare.

In the sources the library and its objects are `Any`, since no release installs stubs. Here a copy of them for
each library has the stubs' types in these places, and one run of the checker sees all copies and nothing
else. `test_tensorrt_names.py` compares names and arguments for what has no type here.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.engines.tensorrt_signatures import LIBRARIES, Declared, declared, signature, stub_file
from tests.engines.test_tensorrt_names import ABSENT, FOLDER, LOCAL, OBJECTS, SOURCES, source

# What else has a type: (file, in the source, in the copy).
TYPED = (
    ("flavour", "Engine: TypeAlias = Any", 'Engine: TypeAlias = "lib.ICudaEngine"'),
    ("nets", "Context: TypeAlias = Any", 'Context: TypeAlias = "lib.IExecutionContext"'),
    ("nets", "engine: Engine) -> Any", "engine: Engine) -> lib.IRuntimeConfig"),
    ("flavour", "Trt: TypeAlias = Any", "from lib import Trt as Trt"),
    ("log", "self.logger: Any", "self.logger: lib.ILogger"),
    ("log", "str], None]) -> Any", "str], None]) -> lib.ILogger"),
    ("builder", "monitor: Trt) -> Trt", "monitor: lib.IProgressMonitor) -> lib.IBuilderConfig"),
    ("builder", "phases: Phases) -> Trt", "phases: Phases) -> lib.IProgressMonitor"),
    ("builder", "(config: Trt, path", "(config: lib.IBuilderConfig, path"),
    # Without a refitter there are no names to refit, which no checker follows.
    (
        "refit",
        "trt.Refitter(engine, log.logger) if engine.refittable else None",
        "trt.Refitter(engine, log.logger)",
    ),
    ("refit", "refitter: Trt, package", "refitter: lib.Refitter, package"),
    ("network", "logger: Trt", "logger: lib.ILogger"),
    ("network", "network: Trt, names", "network: lib.INetworkDefinition, names"),
    ("network", "tuple[Trt, Trt]", "tuple[lib.INetworkDefinition, lib.OnnxParser]"),
    ("network", "Sequence[Trt]", "Sequence[lib.ITensor]"),
)
# Wrong calls, and what the checker says of them. They stand in copies of the files, beside the right ones.
WRONG = (
    ("nets", "context.set_device_memory(scratch, needed)", "context.set_device_memory(scratch)", '"size"'),
    (
        "nets",
        "set_optimization_profile_async(index, loaded",
        'set_optimization_profile_async("0", loaded',
        "type",
    ),
    ("nets", "context.infer_shapes()", "context.infer_shape()", '"infer_shape"'),
    ("loading", "deserialize_cuda_engine(data)", "deserialize_cuda_engine(bytes=data)", "No overloads"),
    ("builder", "ignore_mismatch=False", "ignore_mismatches=False", '"ignore_mismatches"'),
    (
        "builder",
        "None if cache is None else cache.serialize()",
        "cache",
        '"ITimingCache"',
    ),
    ("network", "mark_weights_refittable(name)", "mark_weights_refittable(0)", "type"),
    ("refit", "set_named_weights(name, weights)", "set_named_weights(weights, name)", "set_named_weights"),
    ("refit", ", held[-1].ctypes.data, held[-1].size)", ", held[-1].ctypes.data)", "No overloads"),
    ("network", "parser.parse(path.read_bytes(),", "parser.parse(path.read_bytes(), 1,", "argument"),
)
_FUTURE = "from __future__ import annotations\n"
# The bindings hand out the base class of a layer, which `parse_graph` mends in a way no checker follows.
_MENDED = ('"attention" for class "ILayer"', '"__class__" for class "ILayer"')
# Protocols of C, which neither stubs nor docstrings tell of.
_PROTOCOLS = {
    "Dims": "def __iter__(self) -> typing.Iterator[int]: ...",
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
}
_TYPES = {
    "int",
    "float",
    "bool",
    "str",
    "bytes",
    "object",
    "dict",
    "list",
    "tuple",
    "typing",
    "typing_extensions",
    "collections",
    "numpy",
}


def _key(library: str) -> str:
    return re.sub(r"\W", "_", library)


def _stubs_of(found: Declared) -> str:
    lines = ["import collections.abc", "import typing", "import numpy", "import typing_extensions"]
    for kind, members in found.items():
        if kind:
            lines += [f"class {kind}:", "    pass"]
            for name, member in members.items():
                lines += [f"    {line}" for line in _member(found, kind, name, member)]
    return "\n".join(lines)


def _member(found: Declared, kind: str, name: str, member: dict[str, object]) -> list[str]:
    texts = [str(text) for text in member.get("text") or ()]  # type: ignore[attr-defined]
    if name == "__members__":
        return [f"{name}: typing.ClassVar[dict[str, {kind}]]"]
    if member["kind"] == "property":
        type_ = _type(found, texts[0] if texts else "")
        setter = [f"@{name}.setter", f"def {name}(self, value: {type_}) -> None: ..."]
        return ["@property", f"def {name}(self) -> {type_}: ...", *(setter if member["settable"] else [])]
    if member["kind"] != "call":
        return [f"{name}: typing.ClassVar[{kind if '__members__' in found[kind] else 'typing.Any'}]"]
    lines = list[str]()
    for text in texts:
        form = signature(text)
        static = not form.parameters or form.parameters[0].name not in ("self", "arg0", "this")
        lines += [*(["@typing.overload"] if len(texts) > 1 else []), *(["@staticmethod"] if static else [])]
        parameters = ", ".join(_parameters(found, text))
        lines.append(f"def {name}({parameters}) -> {_type(found, form.returns)}: ...")
    return lines


def _parameters(found: Declared, text: str) -> list[str]:
    parts, optional = list[str](), False
    for index, one in enumerate(signature(text).parameters):
        if index == 0 and one.name in ("self", "arg0", "this"):
            parts.append("self")
            continue
        optional = optional or not one.required  # pybind11 allows required ones behind others
        name = one.name if one.keyword else f"__{one.name}"
        parts.append(f"{name}: {_type(found, one.type)}{' = ...' if optional else ''}")
    return [*parts, *(["*rest: typing.Any", "**more: typing.Any"] if signature(text).open else [])]


def _type(found: Declared, text: str) -> str:
    """As the docstring has it, or Any where that is C++, or of no module that the stubs know."""
    try:
        names = {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
    except SyntaxError:
        return "typing.Any"
    return text if names <= {*_TYPES, *found} else "typing.Any"


def _stubs(library: str) -> str:
    text = (
        _stubs_of(declared(library)) if library != "tensorrt 10" else stub_file().read_text(encoding="utf-8")
    )
    text = text.replace(": list[", ": typing.Sequence[")  # a parameter takes any sequence
    for name, line in _PROTOCOLS.items():
        assert f"class {name}:\n" in text
        text = text.replace(f"class {name}:\n", f"class {name}:\n    {line}\n")
    names = [name for name in declared(library) if name]
    # `Weights = Weights` within a class is a circle for the checker, which then takes it for Any.
    aliases = "".join(f"_of_{name} = {name}\n" for name in names)
    members = "".join(f"    {name} = _of_{name}\n" for name in names)
    nptype = "    @staticmethod\n    def nptype(trt_type: DataType) -> typing.Any: ...\n"
    return f"{text}\n{aliases}class Trt:\n    __version__: str\n{members}{nptype}"


def _available() -> dict[str, str]:
    """The libraries whose types can be had, and their stubs."""
    found = dict[str, str]()
    for library in LIBRARIES:
        with suppress(pytest.skip.Exception):  # said by the tests of that library alone
            found[library] = _stubs(library)
    return found


def _typed(name: str, text: str) -> str:
    """A source with the library's types."""
    for file, old, new in TYPED:
        if file == name:
            assert old in text, old
            text = text.replace(old, new)
    for called, kind in {**OBJECTS, **LOCAL.get(name, {})}.items():
        if kind:
            text = re.sub(rf"\b(_?{called}): (?:Trt|Any) = None", rf"\1: lib.{kind} | None = None", text)
            text = re.sub(rf"\b(_?{called}): (?:Trt|Any)\b", rf"\1: lib.{kind}", text)
    return text


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """Per library, (file, message). The folder has its own configuration, so the project's is not read."""
    root = tmp_path_factory.mktemp("types")
    (root / "typings").mkdir()
    available = _available()
    for library, text in available.items():
        stubs = f"lib_{_key(library)}"
        (root / "typings" / f"{stubs}.pyi").write_text(text, encoding="utf-8")
        engines = root / _key(library) / "engines"
        shutil.copytree(FOLDER, engines, ignore=shutil.ignore_patterns("__pycache__"))
        head = f"{_FUTURE}\nimport {stubs} as lib\n"
        texts = {name: source(name) for name in (*SOURCES, "flavour")}
        for index, (name, right, wrong, _) in enumerate(WRONG):
            assert right in texts[name], right
            texts[f"{name}_wrong_{index}"] = texts[name].replace(right, wrong)
        for name, text in texts.items():
            typed = _typed(name.split("_")[0], text).replace("from lib import", f"from {stubs} import")
            assert _FUTURE in typed
            path = engines / "tensorrt" / f"{name}.py"
            path.write_text(typed.replace(_FUTURE, head, 1), encoding="utf-8")
    files = [f"{_key(library)}/engines/tensorrt/{name}*.py" for library in available for name in SOURCES]
    settings = {"typeCheckingMode": "basic", "stubPath": "typings", "pythonVersion": "3.10", "include": files}
    (root / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", str(root)]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    result = json.loads(done.stdout)
    assert result["summary"]["filesAnalyzed"] < 200, "it has read more than the copies"
    found: dict[str, list[tuple[str, str]]] = {library: [] for library in available}
    for item in result["generalDiagnostics"]:
        path = Path(item["file"]).relative_to(root.resolve())
        library = next(library for library in available if _key(library) == path.parts[0])
        allowed = {f'"{member or kind}"' for kind, member in ABSENT[library]}
        known = any(name in item["message"] for name in (*allowed, *_MENDED))
        if item["severity"] == "error" and not known:
            found[library].append((path.stem, item["message"]))
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_call_fits_its_signature(library: str, errors: dict[str, list[tuple[str, str]]]) -> None:
    declared(library)  # or this is skipped, with the reason
    assert [item for item in errors[library] if "wrong" not in item[0]] == []


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("index", range(len(WRONG)))
def test_a_wrong_call_is_found(library: str, index: int, errors: dict[str, list[tuple[str, str]]]) -> None:
    declared(library)
    name, *_, said = WRONG[index]
    messages = [message for file, message in errors[library] if file == f"{name}_wrong_{index}"]
    assert messages
    assert any(said in message for message in messages), messages
