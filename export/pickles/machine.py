"""Reads pickled checkpoints without running anything that they name.

A pickle is a program. `pickletools` takes it apart, and the machine below interprets the opcodes that make
texts, numbers, dicts and records of tensors. It never imports a name that a pickle gives, so it never calls a
function. It knows torch's few names for tensors. Names of other packages (checkpoints hold their trainer's
objects beside the weights) stand for something inert. A name of the standard library that is not plain data
is refused, because honest checkpoints have none.
"""

from __future__ import annotations

import io
import pickletools
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn, cast

from ...engines.errors import CheckpointError

# SD 1.5 with averaged weights and Adam's state: a pickle of 0.45 MB and 128,000 opcodes.
PICKLE_LIMIT = 2**25  # bytes
_OPCODE_LIMIT = 2_000_000  # each makes at most one object
_RANK_LIMIT = 32

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_PYTHON_2 = {"cPickle", "commands", "exceptions"}
_PLAIN_DATA = {
    *("argparse.Namespace", "types.SimpleNamespace", "copyreg._reconstructor", "_codecs.encode"),
    *("builtins.bool", "builtins.bytearray", "builtins.bytes", "builtins.complex", "builtins.dict"),
    *("builtins.float", "builtins.frozenset", "builtins.int", "builtins.list", "builtins.object"),
    *("builtins.set", "builtins.slice", "builtins.str", "builtins.tuple", "typing.Any", "typing.Union"),
    *("collections.Counter", "collections.OrderedDict", "collections.defaultdict", "collections.deque"),
    *("datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone"),
    *("pathlib.Path", "pathlib.PosixPath", "pathlib.PurePath", "pathlib.PurePosixPath"),
    *("pathlib.PureWindowsPath", "pathlib.WindowsPath"),
}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # since Python 2


@dataclass(frozen=True)
class Storage:
    """A flat array of numbers in the file: its key there, safetensors' name of its type, and its length."""

    key: str
    dtype: str
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A view inside a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A name that the pickle gives. It is never looked up."""

    module: str
    name: str


_TENSORS = [_Global("torch._utils", name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2")]
_PARAMETERS = [_Global("torch._utils", f"_rebuild_parameter{end}") for end in ("", "_with_state")]


_PARAMETER_DICT = _Global("torch.nn.modules.container", "ParameterDict")


class _ParameterDict(dict[str, Any]):
    """Stands for torch's module of that name, which holds the vectors of AUTOMATIC1111's embeddings."""


class _Inert:
    """Stands for whatever is no tensor, text, number or container."""


def read_pickle(stream: io.BytesIO) -> tuple[object, dict[str, Storage]]:
    """Read the pickle at the stream's position, and leave the stream behind it.

    Returns:
        Its value, made of dicts (only items whose keys are text), lists, tuples, texts, numbers,
        `StoredTensor` and inert objects; and every storage that it names, by key.

    Raises:
        CheckpointError: it is damaged, too large for a checkpoint, or names what no honest checkpoint does.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == _OPCODE_LIMIT:
                refuse(f"a pickle of more than {count} operations", "a checkpoint's, of far fewer")
            machine.step(opcode.name, argument)
        return machine.pop(), machine.storages
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, MemoryError, Warning) as error:
        refuse(f"a damaged pickle ({type(error).__name__}: {str(error)[:100]})", "torch.save's pickle")


def refuse(found: str, expected: str) -> NoReturn:
    """Raise the CheckpointError for a pickled file that holds `found`."""
    fix = "Do not open it with other tools; get the .safetensors file of this model, or another copy."
    raise CheckpointError(f"it holds {found}", expected=expected, fix=fix)


class _Machine:
    """The stack, its marks and the memo. `_ACTIONS` says what each opcode does to them."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in _NOTHING:
            refuse(f"a pickle with the operation {opcode}", "torch.save's pickle")

    def pop(self) -> Any:
        return self._stack.pop()

    def push(self, value: object) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def pop_marked(self) -> list[Any]:
        """Pop everything above the last mark."""
        items, self._stack = self._stack, self._marked.pop()
        return items

    def pop_some(self, count: int) -> tuple[Any, ...]:
        items = [self._stack.pop() for _ in range(count)]
        return tuple(reversed(items))

    def remember(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def recall(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def extend(self, items: Iterable[Any]) -> None:
        if isinstance(self._stack[-1], list):
            cast(list[Any], self._stack[-1]).extend(items)

    def update(self, flat: list[Any]) -> None:
        """Add items, but only with text keys: weights have names, and hashing other keys can take forever."""
        if isinstance(self._stack[-1], dict):
            pairs = zip(flat[::2], flat[1::2], strict=True)
            cast(dict[str, Any], self._stack[-1]).update({k: v for k, v in pairs if isinstance(k, str)})

    def make(self, kind: Any, arguments: Any) -> None:
        """Push an object of a class that the pickle names."""
        self._stack.append(_ParameterDict() if kind == _PARAMETER_DICT else _Inert())

    def build(self, state: Any) -> None:
        """Give the last object its state; nothing but parameters by name has one that counts."""
        if isinstance(self._stack[-1], _ParameterDict) and isinstance(state, dict):
            parameters = cast(dict[str, Any], state).get("_parameters")
            self._stack[-1].update(cast(dict[str, Any], parameters) if isinstance(parameters, dict) else {})

    def name_storage(self, identity: Any) -> None:
        storage = _storage(identity)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("two storages of one name")
        self._stack.append(storage)


def _global(module: Any, name: Any) -> _Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name that is no text")
    module = _RENAMED.get(module, module)
    standard = module.partition(".")[0] in sys.stdlib_module_names or module in _PYTHON_2
    if standard and f"{module}.{name}" not in _PLAIN_DATA:
        refuse(f"a pickle that asks for {module[:60]}.{name[:60]}, which can run code", "weights")
    return _Global(module, name)


def _call(function: Any, arguments: Any) -> object:
    """The result of a call in the pickle, if it is part of a tensor or a state dict; else something inert."""
    if not isinstance(function, _Global | _Inert) or not isinstance(arguments, tuple):
        raise TypeError("a call of something that is no function")
    values = cast(tuple[Any, ...], arguments)
    if function == _Global("collections", "OrderedDict"):
        pairs = cast(list[Any], values[0]) if values and isinstance(values[0], list) else []
        return {key: value for key, value in pairs if isinstance(key, str)}
    if function in _TENSORS:
        return _tensor(*values[:4])
    return values[0] if function in _PARAMETERS else _Inert()


def _storage(identity: Any) -> Storage:
    """The storage of torch's persistent id: ("storage", type, key, device, number of elements[, view])."""
    kind, dtype, key, _, length, *view = identity
    known = isinstance(dtype, _Global) and dtype.module == "torch" and dtype.name in _STORAGES
    if kind != "storage" or not known or not isinstance(key, str) or view not in ([], [None]):
        raise ValueError("a persistent id of another kind than torch's storages")
    return Storage(key, _STORAGES[dtype.name], _natural(length))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise TypeError("a tensor of other parts than torch's")
    view = StoredTensor(
        storage,
        _natural(offset),
        tuple(map(_natural, cast(tuple[Any, ...], shape))),
        tuple(map(_natural, cast(tuple[Any, ...], strides))),
    )
    if len(view.shape) != len(view.strides) or len(view.shape) > _RANK_LIMIT:
        raise ValueError(f"a tensor of {len(view.shape)} axes and {len(view.strides)} strides")
    elements = prod(view.shape)
    last = sum((extent - 1) * stride for extent, stride in zip(view.shape, view.strides, strict=True))
    # A stride of 0 repeats elements: one number could become any number of gigabytes.
    if elements and (view.offset + last >= storage.length or elements > storage.length):
        raise ValueError(
            f"a tensor of the shape {view.shape} outside its storage of {storage.length} elements"
        )
    return view


def _natural(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**62:
        raise ValueError("a size that is no number of 62 bits")
    return number


# github.com/python/cpython/blob/main/Lib/pickletools.py describes the opcodes. torch.save writes protocol 2
# and later, so opcodes of earlier protocols alone (INST, OBJ, …) are missing here.
_NOTHING = {"PROTO", "FRAME", "STOP"}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: Mapping[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": _Inert,
}


def _inert(pops: Callable[[_Machine], object]) -> Callable[[_Machine, Any], None]:
    """The action of an opcode that makes an object of a class that the pickle names."""

    def act(machine: _Machine, _: Any) -> None:
        pops(machine)
        machine.push(_Inert())

    return act


_ACTIONS: Mapping[str, Callable[[_Machine, Any], object]] = {
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_marked(),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_marked())),
    "TUPLE1": lambda machine, _: machine.push(machine.pop_some(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop_some(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop_some(3)),
    "FROZENSET": _inert(_Machine.pop_marked),
    "APPEND": lambda machine, _: machine.extend(machine.pop_some(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_marked()),
    "ADDITEMS": lambda machine, _: machine.pop_marked(),
    "SETITEM": lambda machine, _: machine.update(list(machine.pop_some(2))),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_marked()),
    **{name: lambda machine, place: machine.remember(place) for name in ("PUT", "BINPUT", "LONG_BINPUT")},
    "MEMOIZE": lambda machine, _: machine.remember(None),
    **{name: lambda machine, place: machine.recall(place) for name in ("GET", "BINGET", "LONG_BINGET")},
    "GLOBAL": lambda machine, names: machine.push(_global(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.push(_global(*machine.pop_some(2))),
    "BINPERSID": lambda machine, _: machine.name_storage(machine.pop()),
    "REDUCE": lambda machine, _: machine.push(_call(*machine.pop_some(2))),
    "BUILD": lambda machine, _: machine.build(machine.pop()),
    "NEWOBJ": lambda machine, _: machine.make(*machine.pop_some(2)),
    "NEWOBJ_EX": _inert(lambda machine: machine.pop_some(3)),
}
