"""What the three TensorRT libraries declare: every class, member and signature, read without a GPU.

=============  ==============================================================================================
tensorrt 10    the stubs, from the wheel of `tensorrt-stubs`, or the folder LATENTRT_TENSORRT_STUBS names
tensorrt 11    the docstrings of its bindings, from their wheel; see `without_libraries`
tensorrt-rtx   the docstrings of the installed library
=============  ==============================================================================================

The wheels are fetched once and kept outside the repository; they cannot be installed, because both depend on
NVIDIA's libraries. Where they cannot be fetched, the tests are skipped with pip's reason.

Run as a program, this file prints the declarations of the module it is given: the libraries are loaded only
in processes of their own.
"""

import inspect
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# The oldest release we support is 10.14, but there are no newer stubs of the 10.x line than these.
STUBS = "tensorrt-stubs==10.13.0.35.1"
BINDINGS = "tensorrt-cu13-bindings==11.4.0.106"
LIBRARIES = ("tensorrt 10", "tensorrt 11", "tensorrt-rtx")

# Class -> member -> its declaration; the class "" is the module. A declaration has a `kind` (class, call,
# property or value), `text` (of a call: its signatures; of a property: its type) and `settable`.
Declared = dict[str, dict[str, dict[str, Any]]]

_SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+\(.*\)(?: -> .+)?)$", re.MULTILINE)
_PREFIX = re.compile(r"\btensorrt\w*\.(?:tensorrt\w*\.)?|\b(?:\w+::)+")  # of Python and C++
_SPECIAL = {
    "__init__",
    "__int__",
    "__index__",
    "__len__",
    "__getitem__",
    "__iter__",
    "__members__",
    "__buffer__",
}


@cache
def declared(library: str) -> Declared:
    """What a library declares. Skips the test where it cannot be had."""
    if library == "tensorrt 10":
        return _of_stubs(stub_file().read_text(encoding="utf-8"))
    if library == "tensorrt-rtx":
        if find_spec("tensorrt_rtx") is None:
            pytest.skip("tensorrt_rtx is not installed")
        return _of_child("tensorrt_rtx", Path.cwd())
    wheel = fetched(BINDINGS)
    with tempfile.TemporaryDirectory() as folder:
        package = shutil.copytree(wheel / "tensorrt_bindings", Path(folder) / "tensorrt_bindings")
        extension = package / "tensorrt.so"
        if not extension.is_file():
            pytest.skip(f"{BINDINGS} has no ELF extension on {sys.platform}")
        extension.write_bytes(without_libraries(extension.read_bytes()))
        return _of_child("tensorrt_bindings", Path(folder))


def stub_file() -> Path:
    """The stubs of TensorRT 10. Skips the test where they cannot be had."""
    given = os.environ.get("LATENTRT_TENSORRT_STUBS")
    files = sorted((Path(given) if given else fetched(STUBS)).rglob("tensorrt.pyi"))
    if not files:
        pytest.skip(f"no tensorrt.pyi in {given or STUBS}")
    return files[0]


# ── fetching ─────────────────────────────────────────────────────────────────────────────────────


def fetched(requirement: str) -> Path:
    """A folder with an unpacked wheel. Skips the test where it cannot be fetched."""
    folder, reason = _fetch(requirement)
    if folder is None:
        pytest.skip(f"{requirement} cannot be fetched: {reason}")
    return folder


@cache  # failures too: one wait for the network is enough
def _fetch(requirement: str) -> tuple[Path | None, str]:
    tag = f"{requirement.replace('==', '-')}-{sys.implementation.cache_tag}-{sys.platform}"
    kept = _cache_folder() / tag
    if kept.is_dir():
        return kept, ""
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--retries=1",
        "--timeout=10",
        "--disable-pip-version-check",
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-input", *options, "-d", folder, requirement]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return None, "pip took more than 90 s"
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines() or ["pip downloaded no wheel"]
            return None, next((line for line in reversed(said) if line.startswith("ERROR:")), said[-1])
        kept.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(dir=kept.parent))
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(half)
        try:
            half.rename(kept)
        except OSError:  # another session was faster
            shutil.rmtree(half)
    return kept, ""


def _cache_folder() -> Path:
    """The user's own: what lies in it is executed, so a folder that all users may write is no place."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "latentrt-tests"


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def without_libraries(elf: bytes) -> bytes:
    """A copy of an extension that loads although NVIDIA's libraries, which it is linked to, are missing.

    Declaring its classes calls nothing in them. So the libraries are struck off the list of those needed
    (DT_NEEDED becomes DT_DEBUG, which a loader passes over in shared objects), and undefined symbols are made
    weak, which may stay undefined.
    """
    assert elf[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    data = bytearray(elf)
    headers, size, count = (
        struct.unpack_from(form, data, at)[0] for form, at in (("<Q", 32), ("<H", 54), ("<H", 56))
    )
    segments = [struct.unpack_from("<IIQQQQQ", data, headers + index * size) for index in range(count)]

    def offset(address: int) -> int:
        return next(s[2] + address - s[3] for s in segments if s[0] == 1 and s[3] <= address < s[3] + s[5])

    start = next(segment[2] for segment in segments if segment[0] == 2)  # PT_DYNAMIC
    entries: list[tuple[int, int, int]] = []
    while not entries or entries[-1][0]:
        entries.append((*struct.unpack_from("<QQ", data, start), start))
        start += 16
    table = {tag: value for tag, value, _ in entries}
    strings, symbols = offset(table[5]), offset(table[6])  # DT_STRTAB, DT_SYMTAB
    for tag, value, at in entries:
        if tag == 1 and data.startswith(b"libnv", strings + value):  # DT_NEEDED
            struct.pack_into("<Q", data, at, 21)  # DT_DEBUG
    # DT_GNU_HASH leaves the undefined symbols out, and says how many that are.
    for index in range(1, struct.unpack_from("<I", data, offset(table[0x6FFFFEF5]) + 4)[0]):
        at = symbols + 24 * index
        if data[at + 4] >> 4 == 1 and data[at + 6 : at + 8] == b"\0\0":  # STB_GLOBAL, SHN_UNDEF
            data[at + 4] = 0x20 | data[at + 4] & 0xF  # STB_WEAK
    return bytes(data)


def _of_child(module: str, folder: Path) -> Declared:
    command = [sys.executable, str(Path(__file__).resolve()), module]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{module} could not be read:\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def _of_module(module: Any) -> Declared:
    found: Declared = {"": {}}
    for name in [name for name in dir(module) if name == "__version__" or not name.startswith("_")]:
        value = getattr(module, name)
        if isinstance(value, type):
            found[""][name] = {"kind": "class"}
            members = [member for member in dir(value) if member in _SPECIAL or not member.startswith("_")]
            found[name] = {member: _member(value, member) for member in members}
        elif not inspect.ismodule(value):
            found[""][name] = _member(module, name)
    return found


def _member(owner: Any, name: str) -> dict[str, Any]:
    static = inspect.getattr_static(owner, name)
    value = getattr(owner, name)
    if isinstance(static, property):
        text = re.findall(r" -> (.+)", static.fget.__doc__ or "")[:1]
        return {
            "kind": "property",
            "text": [_plain(one) for one in text],
            "settable": static.fset is not None,
        }
    if inspect.isfunction(value):  # of Python
        return {"kind": "call", "text": [f"{name}{inspect.signature(value)}"]}
    if callable(value) and not isinstance(value, type):
        found = [one for one in _SIGNATURE.findall(value.__doc__ or "") if "*args, **kwargs" not in one]
        return {"kind": "call", "text": [_plain(one) for one in found]}
    return {"kind": "class" if isinstance(value, type) else "value"}


def _plain(text: str) -> str:
    return _PREFIX.sub("", text)


def _of_stubs(text: str) -> Declared:
    """The same of a stub file. One signature in 10.13's is no Python, so they are read line by line."""
    found: Declared = {"": {"__version__": {"kind": "value"}}}
    found[""]["nptype"] = {"kind": "call", "text": ["nptype(trt_type)"]}  # in the package's other file
    members, decorator, bases = found[""], "", dict[str, str]()
    for line in re.sub(r'""".*?"""', "", text, flags=re.DOTALL).splitlines():
        if line[:1] not in ("", " ", "#", "@"):
            members = found[""]
        if header := re.match(r"class (\w+)(?:\((\w+)\))?:", line):
            found[""][header[1]] = {"kind": "class"}
            members = found.setdefault(header[1], {})
            bases[header[1]] = header[2] or "object"
        elif header := re.match(r"(?:    )?@([\w.]+)$", line):
            decorator = header[1]
        elif header := re.match(r"(?:    )?def ((\w+)\(.*\)(?: -> (.+))?):", line):
            _add(members, decorator, header[2], header[1], header[3] or "")
            decorator = ""
        elif header := re.match(r"    class (\w+)[:(]", line):
            members.setdefault(header[1], {"kind": "class"})
        elif header := re.match(r"(?:    )?(\w+): ([\w.\[\], |]+)", line):
            constant = header[2].startswith("typing.ClassVar")
            kind = {"kind": "value"} if constant else {"kind": "property", "text": [header[2].strip()]}
            members.setdefault(header[1], {**kind, "settable": not constant})
    for name, base in bases.items():  # a base stands before its classes
        if base in found:
            found[name] = {**found[base], **found[name]}
    return found


def _add(members: dict[str, dict[str, Any]], decorator: str, name: str, signature: str, returns: str) -> None:
    if decorator == "property":
        members[name] = {"kind": "property", "text": [returns], "settable": False}
    elif decorator.endswith(".setter"):
        members[name]["settable"] = True
    elif decorator.endswith("overload") and name in members:
        members[name]["text"].append(signature)
    else:
        members[name] = {"kind": "call", "text": [signature]}


# ── signatures ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Parameter:
    """`required` is whether it has no default; `keyword` and `positional`, how it may be given."""

    name: str
    type: str
    required: bool
    positional: bool
    keyword: bool


@dataclass(frozen=True)
class Signature:
    """One form of a call; `open` means that it takes anything beyond its parameters."""

    parameters: tuple[Parameter, ...]
    returns: str
    open: bool

    def accepts(self, positional: int, keywords: list[str]) -> bool:
        """Whether a call with that many positional arguments, and these keywords, fits."""
        places = [one for one in self.parameters if one.positional]
        named = {one.name for one in self.parameters if one.keyword} - {
            one.name for one in places[:positional]
        }
        given = {one.name for one in places[:positional]} | set(keywords)
        missing = {one.name for one in self.parameters if one.required} - given
        return not missing and (self.open or (positional <= len(places) and named >= set(keywords)))


@cache
def signature(text: str) -> Signature:
    """`name(a: int, b: str = 'x') -> T`, as docstrings and stubs have it. A default need not be Python."""
    parts, depth, part, rest = list[str](), 0, "", ""
    for index, char in enumerate(text):
        depth += (char in "([{<") - (char in ")]}>" and text[index - 1 : index + 1] != "->")
        if depth == 0 and char == ")":
            rest = text[index + 1 :]
            break
        if depth == 1 and char in "(,":
            parts, part = [*parts, part.strip()], ""
        elif depth:
            part += char
    parameters, free, markers = list[Parameter](), False, False
    for text in filter(None, [*parts[1:], part.strip()]):
        if text.startswith("*") or text == "/":
            free, markers = free or text.strip("*/") != "", markers or text.startswith("*")
            continue
        name, kind, default = re.fullmatch(r"(\w+)(?:: (.*?))?(?: ?= ?(.*))?", text, re.DOTALL).groups()  # type: ignore[union-attr]
        parameters.append(
            # pybind11 calls what has no name arg0, arg1, …
            Parameter(name, kind or "", default is None, not markers, not re.fullmatch(r"arg\d+", name))
        )
    return Signature(tuple(parameters), rest.removeprefix(" -> ").strip(), free)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # not this folder
    # Symbols of libraries that are not there may stay unresolved as long as nothing calls them.
    if hasattr(sys, "setdlopenflags"):
        sys.setdlopenflags(os.RTLD_LAZY)
    print(json.dumps(_of_module(import_module(sys.argv[1]))))
