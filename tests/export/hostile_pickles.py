"""Files of torch.save that lie, run code, or take more memory or time than a checkpoint may.

    python hostile_pickles.py FOLDER CANARY     # converts each file, and prints what came of it as JSON

`CANARY` is the folder in which any of them would leave a trace.
"""

import io
import json
import pickle
import resource
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C


def archive(pkl: bytes, *, entries: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """An archive as torch.save writes it: one storage of 8 bytes, "0", unless `entries` says otherwise."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as target:
        target.writestr("a/data.pkl", pkl)
        target.writestr("a/version", b"3\n")
        for name, content in (entries if entries is not None else {"a/data/0": b"\0" * 8}).items():
            target.writestr(name, content)
    return stream.getvalue()


def call(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle that calls `module.name(*arguments)`."""
    return f"\x80\x02c{module}\n{name}\n".encode("latin-1") + body(arguments) + b"R."


def body(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


class Named:
    """Pickled as a global, without the thing having to exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Reduced:
    """Pickled as a call of a global."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.function, self.arguments = Named(module, name), arguments


class Identified:
    """Pickled as a persistent id."""

    def __init__(self, *identity: Any) -> None:
        self.identity = identity


class Pickler(pickle._Pickler):  # type: ignore[misc,name-defined]
    """Writes the three above as the opcodes that they mean."""

    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Identified) else None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Named):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Reduced):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


def storage(length: Any = 2, key: Any = "0", kind: str = "FloatStorage", *more: Any) -> Identified:
    return Identified("storage", Named("torch", kind), key, "cpu", length, *more)


def tensor(shape: Any = (2,), strides: Any = (1,), offset: Any = 0, of: Any = None) -> Reduced:
    parts = (of if of is not None else storage(), offset, shape, strides, False, OrderedDict())
    return Reduced("torch._utils", "_rebuild_tensor_v2", *parts)


def lie(**parts: Any) -> bytes:
    return archive(dumps({"w": tensor(**parts)}))


def legacy(value: bytes, keys: Any = ("0",), storages: bytes | None = None, **system: Any) -> bytes:
    """The format before torch 1.6."""
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}} | system
    head = [pickle.dumps(MAGIC, 2), pickle.dumps(1001, 2), pickle.dumps(facts, 2), value]
    data = storages if storages is not None else struct.pack("<q", 2) + b"\0" * 8
    return b"".join([*head, pickle.dumps(list(keys), 2), data])


def nested(depth: int, opening: bytes, closing: bytes) -> bytes:
    return b"\x80\x02" + opening * depth + closing * depth + b"."


def directory_of(content: bytes, position: int, packed: bytes, entry: int = 0) -> bytes:
    """An archive with some bytes of one entry of its directory changed."""
    at = -1
    for _ in range(entry + 1):
        at = content.index(b"PK\x01\x02", at + 1)
    at += position
    return content[:at] + packed + content[at + len(packed) :]


def overlapping() -> bytes:
    """Two storages at the same place, together larger than the file."""
    names = {key: tensor((1000,), of=storage(1000, key)) for key in "01"}
    content = archive(dumps(names), entries={"a/data/0": b"\0" * 4000, "a/data/1": b""})
    first = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1) + 1)
    content = directory_of(content, 20, content[first + 20 : first + 28], entry=3)
    return directory_of(content, 42, content[first + 42 : first + 46], entry=3)


def hostile(canary: Path) -> dict[str, bytes]:
    """Name -> content. What each would do, it would do to `canary`."""
    touch, path, code = f"touch {canary}/x", f"{canary}/x", f"open({str(canary / 'x')!r}, 'w')"
    good = dumps({"w": tensor()})
    calls = {
        "os.system": ("os", "system", touch),
        "posix.system": ("posix", "system", touch),
        "nt.system": ("nt", "system", touch),
        "os.mkdir": ("os", "mkdir", path),
        "os.execv": ("os", "execv", "/bin/touch", ["touch", path]),
        "subprocess.Popen": ("subprocess", "Popen", ["touch", path]),
        "subprocess.check_output": ("subprocess", "check_output", ["touch", path]),
        "eval": ("builtins", "eval", code),
        "exec": ("builtins", "exec", code),
        "Python 2's eval": ("__builtin__", "eval", code),
        "Python 2's commands": ("commands", "getoutput", touch),
        "__import__": ("builtins", "__import__", "antigravity"),
        "open": ("builtins", "open", path, "w"),
        "getattr": ("builtins", "getattr", "", "__class__"),
        "compile": ("builtins", "compile", code, "x", "exec"),
        "importlib": ("importlib", "import_module", "antigravity"),
        "runpy": ("runpy", "run_path", path),
        "functools.partial": ("functools", "partial", code),
        "operator.attrgetter": ("operator", "attrgetter", "system"),
        "operator.methodcaller": ("operator", "methodcaller", "system", touch),
        "pickle.loads": ("pickle", "loads", call("os", "system", touch)),
        "_pickle.loads": ("_pickle", "loads", call("os", "system", touch)),
        "marshal.loads": ("marshal", "loads", b"\xe3"),
        "types.FunctionType": ("types", "FunctionType", None, {}),
        "ctypes.CDLL": ("ctypes", "CDLL", "libc.so.6"),
        "socket": ("socket", "create_connection", ["127.0.0.1", 9]),
        "urlopen": ("urllib.request", "urlopen", "http://127.0.0.1:9"),
        "shutil.rmtree": ("shutil", "rmtree", str(canary)),
        "webbrowser": ("webbrowser", "open", "http://127.0.0.1:9"),
        "pty.spawn": ("pty", "spawn", ["touch", path]),
        "timeit": ("timeit", "timeit", code),
        "pydoc.locate": ("pydoc", "locate", "antigravity"),
        "logging file": ("logging", "FileHandler", path),
        "bdb": ("bdb", "Bdb.run", code),
        "torch.hub": ("torch.hub", "load", "x/y", "z"),
        "torch.load": ("torch.serialization", "load", path),
        "numpy's runstring": ("numpy.testing._private.utils", "runstring", code, {}),
        "pip": ("pip", "main", ["install", "x"]),
    }
    hidden = {
        f"{name} behind weights": dumps({"w": tensor(), "x": Reduced(*calls[name])})
        for name in ("os.system", "eval", "getattr", "pickle.loads", "functools.partial")
    }
    text = body(touch)
    programs = {
        **{name: call(*parts) for name, parts in calls.items()},
        **hidden,
        "STACK_GLOBAL": b"\x80\x04" + body("os") + body("system") + b"\x93" + text + b"\x85R.",
        "names from the memo": b"\x80\x04"
        + body("os")[:-2]
        + b"\x940"
        + body("system")[:-2]
        + b"\x940h\x00h\x01\x93"
        + text
        + b"\x85R.",
        "a name that is a list": b"\x80\x04]" + body("system") + b"\x93.",
        "INST": b"(" + text + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n)}\x92.",
        "BUILD": b"\x80\x02ctorch.nn\nModule\n)\x81}" + body("__setstate__") + b"cos\nsystem\nsb.",
        "BUILD of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
        "a call of a text": b"\x80\x02" + text + text + b"\x85R.",
        "a call without a tuple": b"\x80\x02ctorch\nSize\n]R.",
        "EXT1": b"\x80\x02\x82\x01.",
        "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "PERSID": b"Pos.system\n.",
        "BINPERSID of a text": b"\x80\x02" + text + b"Q.",
        "another persistent id": dumps(
            {"w": tensor(of=Identified("module", Named("torch", "nn"), "0", "cpu", 2))}
        ),
        "no STOP": good[:-1],
        "empty": b"",
        "pop of nothing": b"\x80\x020.",
        "mark of nothing": b"\x80\x02t.",
        "memo of nothing": b"\x80\x02h\x07.",
        "a huge LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a negative LONG4": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "a huge BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        "a huge BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b".",
        "a huge memo": b"\x80\x02Nr\xff\xff\xff\xff0N.",
        "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
        "an escape that is none": b"S'\\q'\n.",
        "deep tuples as a key": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",
        "tuples of themselves as a key": b"\x80\x02}"
        + b")q\x00"
        + b"h\x00h\x00\x86q\x000" * 60
        + b"h\x00Ns.",
        "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "a dict in itself": b"\x80\x02}q\x00" + body("state_dict") + b"h\x00s.",
        "a dict of an odd number": b"\x80\x02}(NNNu.",
        "no dict": pickle.dumps([1, 2], 2),
        "no tensors": pickle.dumps({"state_dict": {"epoch": 3}}, 2),
    }
    lies = {
        "offset outside": lie(offset=1),
        "offset far outside": lie(offset=2**61),
        "negative offset": lie(offset=-1),
        "shape outside": lie(shape=(3,)),
        "negative extent": lie(shape=(-2,)),
        "huge shape": lie(shape=(2**40, 2**40), strides=(0, 0)),
        "one number repeated": lie(shape=(2**40,), strides=(0,)),
        "stride outside": lie(strides=(2,)),
        "negative stride": lie(strides=(-1,), offset=1),
        "strides of another rank": lie(strides=(1, 1)),
        "an extent of text": lie(shape=("2",)),
        "an extent of truth": lie(shape=(True,), strides=(1,)),
        "33 axes": lie(shape=(1,) * 33, strides=(1,) * 33),
        "a shape that is a list": lie(shape=[2]),
        "a storage that is none": lie(of=3),
        "a storage longer than its data": lie(of=storage(3)),
        "a storage shorter than its data": lie(of=storage(1), shape=(1,)),
        "a storage of 2**61 numbers": lie(of=storage(2**61), shape=(2**61,)),
        "a negative storage": lie(of=storage(-2)),
        "a storage outside the archive": lie(of=storage(key="../../etc/passwd")),
        "a storage of no name": lie(of=storage(key=["0"])),
        "a quantised storage": lie(of=storage(kind="QInt8Storage")),
        "two storages of one name": archive(dumps({"a": tensor(), "b": tensor(of=storage(1), shape=(1,))})),
        "a name that safetensors keeps": archive(dumps({"__metadata__": tensor()})),
        "a name that is no UTF-8": archive(dumps({"\ud800": tensor()})),
        "one storage under many names": archive(
            dumps({f"w{i}": tensor((500,), of=storage(500)) for i in range(2_000)}),
            entries={"a/data/0": b"\0" * 2_000},
        ),
    }
    archives = {
        "compressed": archive(good, compression=zipfile.ZIP_DEFLATED),
        "a bomb": archive(good, entries={"a/data/0": b"\0" * 30_000_000}, compression=zipfile.ZIP_DEFLATED),
        "storages one over the other": overlapping(),
        "no data.pkl": archive(good).replace(b"data.pkl", b"data.pki"),
        "data.pkl twice": archive(good, entries={"b/data.pkl": good, "a/data/0": b"\0" * 8}),
        "data.pkl deeper": archive(good).replace(b"a/data.pkl", b"a/d.ta.pkl"),
        "outside names": archive(good, entries={"../x": b"x", f"{canary}/x": b"x"}),
        "big endian": archive(good, entries={"a/data/0": b"\0" * 8, "a/byteorder": b"big"}),
        "encrypted": directory_of(archive(good), 8, b"\x01\x00"),
        "an entry larger than the file": directory_of(archive(good), 20, struct.pack("<II", 2**31, 2**31)),
        "an entry behind the file": directory_of(archive(good), 42, struct.pack("<I", 2**31)),
        "cut short": archive(good)[:-30],
        "a directory of 2 GB": archive(good)[:-10] + struct.pack("<IIH", 2**31, 0, 0),
        "a beginning alone": b"PK\x03\x04",
    }
    old = {
        "old: plain pickle": call("os", "system", touch),
        "old: os.system": legacy(call("os", "system", touch)),
        "old: another magic number": legacy(good).replace(pickle.dumps(MAGIC, 2), pickle.dumps(7, 2)),
        "old: big endian": legacy(good, little_endian=False),
        "old: keys are none": legacy(good, keys=()),
        "old: keys of others": legacy(good, keys=("1",)),
        "old: a key that is a list": legacy(good, keys=([],)),
        "old: another length": legacy(good, storages=struct.pack("<q", 3) + b"\0" * 12),
        "old: cut short": legacy(good)[:-1],
        "old: a view of a storage": legacy(
            dumps({"w": tensor(of=storage(2, "0", "FloatStorage", ("1", 0, 2)))})
        ),
        "old: nothing": b"",
        "old: safetensors": struct.pack("<Q", 2) + b"{}",
    }
    return {**{name: archive(pkl) for name, pkl in programs.items()}, **lies, **archives, **old}


EVENTS = (
    "exec",
    "compile",
    "import",
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "urllib.",
    "pty.",
)
HARMLESS = ("os.listdir", "os.scandir")


def watch(traces: list[str]) -> Callable[[], None]:
    """Note every event that a conversion has no business to cause. Returns what ends it."""
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and not set(arguments[1]) <= set("rb")
        if active and (writes or (event.startswith(EVENTS) and event not in HARMLESS)):
            traces.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)
    return active.clear


def main(folder: Path, canary: Path) -> None:
    from latentrt.engines.errors import CheckpointError
    from latentrt.export.pickles.convert import convert_pickle

    source, output = folder / "x.ckpt", folder / "x.safetensors"
    source.write_bytes(archive(dumps({"w": tensor()})))
    convert_pickle(source, output)  # imports what it needs before anyone watches
    output.unlink()
    cases = hostile(canary)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {}
    for name, content in cases.items():
        source.write_bytes(content)
        traces: list[str] = []
        stop = watch(traces)
        try:
            convert_pickle(source, output)
            verdict = "converted"
        except CheckpointError as error:
            verdict = str(error)
        except BaseException as error:
            verdict = f"another error: {error!r}"
        stop()
        found[name] = {"verdict": verdict, "traces": traces, "left": sorted(p.name for p in folder.iterdir())}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    print(json.dumps({"cases": found, "grown": grown, "canary": sorted(p.name for p in canary.iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
