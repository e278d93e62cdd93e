"""Builds the stand-in's libraries for one CUDA provider: `python -m tests.cuda.libraries FOLDER [PROVIDER]`.

What CUDA's runtime and cuDNN's graphs do is written by hand, in `stand_in/`. The other functions that the
provider imports get an entry by their name alone (`_ENTRIES`): a handle is made, work is enqueued, a setting
is taken. A release of the provider that imports what neither has fails here, with the names.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "stand_in"
PROVIDER = "libonnxruntime_providers_cuda.so"
RUNTIME = "libcudart.so.13"
# What the provider links, or loads by name when it first needs it.
_LIBRARY = re.compile(r"lib(?:cu\w+|cudnn)\.so\.\d+")
_LOADED = re.compile(rb"(?<=\0)cudnn[A-Z]\w+(?=\0)")
_DRIVER, _CUDNN = "libcuda.so.1", "libcudnn.so.9"
# The first that fits makes the entry. What cannot be answered without computing is not supported: 15 is
# CUBLAS_STATUS_NOT_SUPPORTED, 3000 is CUDNN_STATUS_NOT_SUPPORTED, 801 is CUDA_ERROR_NOT_SUPPORTED.
_ENTRIES = tuple(
    (re.compile(pattern), entry)
    for pattern, entry in (
        (r"cu(blas|blasLt|dnn)Create(_v2)?|cu(blasLt|dnn)\w*Create\w*", "CREATE({name})"),
        (r"cu(blas|blasLt|dnn)Destroy(_v2)?|cu(blasLt|dnn)\w*Destroy\w*", "DESTROY({name})"),
        (r"cu(blas|dnn)SetStream(_v2)?", "SET_STREAM({name})"),
        (r"cu(blas|dnn)Get\w+(String|Name)", "TEXT({name})"),
        (r"cublas(Lt)?\w*(Get|Init|SetAttribute)\w*|cublasSetMathMode", "ANSWER({name}, {refused})"),
        (r"cublas[SDCZH]?(geam|copy|scal|gemm|getr[fi]|Gemm)\w*", "COMPUTE({name})"),
        (r"cudnn(Set|Get|Find|Derive|DropoutGet)\w+", "ANSWER({name}, {refused})"),
        (r"cudnn\w+Forward\w*|cudnn(Add|Reduce)Tensor", "COMPUTE({name})"),
        (r"cuTensorMap\w+", "ANSWER({name}, 801)"),
    )
)


def missing() -> str:
    """Why the libraries cannot be built here; "" if they can."""
    tools = [tool for tool in ("cc", "nm", "readelf") if shutil.which(tool) is None]
    return f"there is no {' and no '.join(tools)}: apt install gcc" if tools else ""


def find_provider() -> Path:
    """The CUDA provider of the onnxruntime that this interpreter imports; it is not loaded."""
    found = find_spec("onnxruntime")
    assert found is not None, "onnxruntime-gpu is not installed in this environment"
    return Path(str(found.origin)).parent / "capi" / PROVIDER


def wanted_of(provider: Path) -> dict[str, set[str]]:
    """The functions that a provider wants of each library, by the library's file name."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for name in _LIBRARY.findall(_output("readelf", "-d", str(provider))):
        wanted[name] = set()
    for line in _output("nm", "-D", "--undefined-only", "--with-symbol-versions", str(provider)).splitlines():
        name, _, library = line.split()[-1].partition("@")
        if _LIBRARY.fullmatch(library):
            wanted[library].add(name)
        elif not library and re.match(r"cu[A-Z]", name):
            wanted[_DRIVER].add(name)
    wanted[_CUDNN] = {name.decode() for name in _LOADED.findall(provider.read_bytes())}
    return dict(wanted)


def build(folder: Path, provider: Path) -> Path:
    """Build all of them into `folder`, which LD_LIBRARY_PATH should begin with; returns it.

    Raises NotImplementedError with the functions that the stand-in lacks.
    """
    wanted = wanted_of(provider)
    runtime = build_runtime(folder)
    lacking: dict[str, list[str]] = {}
    for name in sorted(wanted):
        if name != runtime.name:
            _build_one(folder, name, wanted[name], [str(runtime)])
        there = _output("nm", "-D", "--defined-only", str(folder / name))
        if lost := wanted[name] - {line.split()[-1].partition("@")[0] for line in there.splitlines()}:
            lacking[name] = sorted(lost)
    if lacking:
        raise NotImplementedError(f"{provider} wants functions that the stand-in lacks: {lacking}")
    return folder


def build_runtime(folder: Path) -> Path:
    """Build libcudart alone, for tests of its own rules; needs no provider."""
    folder.mkdir(parents=True, exist_ok=True)
    _build_one(folder, RUNTIME, set(), [])
    return folder / RUNTIME


def _build_one(folder: Path, library: str, names: set[str], linked: list[str]) -> None:
    stem = library.partition(".")[0].removeprefix("lib")
    written = SOURCES / f"{stem}.c"
    entries, versions = folder / f"{stem}_entries.c", folder / f"{stem}.map"
    lines = [entry for name in sorted(names) if (entry := _entry(name))]
    entries.write_text("\n".join(['#include "stand_in.h"', *lines, ""]))
    versions.write_text(f"{library} {{ global: *; }};\n")
    sources = [str(entries), *([str(written)] if written.exists() else [])]
    _output(
        *("cc", "-shared", "-fPIC", "-O1", f"-I{SOURCES}"),
        *("-o", str(folder / library), *sources, *linked, "-pthread"),
        *(f"-Wl,-soname,{library}", f"-Wl,--version-script,{versions}", "-Wl,--no-as-needed"),
    )


def _entry(name: str) -> str:
    """The line that declares a function by its name; "" if no rule knows it."""
    entry = next((entry for pattern, entry in _ENTRIES if pattern.fullmatch(name)), "")
    setting = "Set" in name or "MathMode" in name or name.endswith("Init")
    return entry.format(name=name, refused=0 if setting else 3000 if name.startswith("cudnn") else 15)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else find_provider()))
