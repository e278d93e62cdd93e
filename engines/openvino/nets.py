"""Nets of OpenVINO: compiled for the shapes they are called with, and called with arrays.

Shapes are fixed before a net is compiled, because what is compiled for any shape is slower (docs/design.md).
A net that is open has its graph and a view of its weights; each of its shapes has a copy of them, packed for
the processor's kernels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ..device import MemoryLedger, Shapes
from ..errors import BackendError, PackageError, UsageError, command
from ..graphs.given import given_graph
from ..heap import give_back_heap
from ..net_weights import engine_bytes
from ..package import Package
from ..processors import thread_count
from ..spec import DTYPES, Array, NetSpec, TensorSpec, output_shapes
from ..spilled import available_bytes, spill
from ..store.files import default_root
from .library import HOST, core, library, run_error, version
from .lowering import constant, lower

F32 = "f32"  # as OpenVINO writes a precision
MOST_SHAPES = 4  # of a net that are kept compiled, where memory has room for them
_WHILE_COMPILED = 2  # times its weights is what another shape of a net takes, at most, while it is compiled
_SMALL = 2**18  # bytes of an input that are sooner copied than bound
_FELT = 2**26  # bytes of weights from which what compiling leaves behind is worth a look
_CHECK = "Check the inputs; if they are right, report this with the package's manifest."

_Key = tuple[tuple[int, ...], ...]  # the shapes of a net's inputs, in the order of its spec


class OpenvinoNet:
    """A net on one device. Several threads may call at once: each call has an infer request to itself.

    Args:
        package: where the net is from.
        name: of the net.
        threads: of the CPU for one run; None is every processor.
        device: OpenVINO's name of it.
        precision: of the arithmetic, as OpenVINO writes it.

    Raises:
        PackageError: OpenVINO refuses the graph, its boundary is not the manifest's, or its weights are not
            what it says.
        NumericError: a weight with adapters is beyond what fp16 holds.
        MemoryLimitError: the weights do not fit.
        UsageError: `threads` is less than 1.
    """

    def __init__(
        self,
        package: Package,
        name: str,
        *,
        threads: int | None = None,
        device: str = HOST,
        precision: str = F32,
    ) -> None:
        self.name, self.device = name, device
        self.spec: NetSpec = package.manifest.nets[name].spec
        self._package = package
        self._settings = _settings(device, thread_count(threads), precision)
        self._dtypes = {item.name: np.dtype(DTYPES[item.dtype]) for item in self.spec.inputs}
        self._compiled: OrderedDict[_Key, Future[_Compiled]] = OrderedDict()
        self._latest: tuple[_Key, _Compiled] | None = None  # which needs no lock to be looked at
        self._lock = Lock()
        self._io = 0
        path = package.path(package.manifest.nets[name].graph)
        self._model: Any = _read(package, name, path)
        _check_boundary(self._model, self.spec, path)

    @property
    def shapes(self) -> tuple[Shapes, ...]:
        """What it is compiled for now, the shapes used longest ago first."""
        with self._lock:
            keys = tuple(self._compiled)
        return tuple(dict(zip((item.name for item in self.spec.inputs), key, strict=True)) for key in keys)

    @property
    def memory(self) -> MemoryLedger:
        """Weights at the width of the arithmetic, once for each compiled shape, and the last call's arrays.

        Raises PackageError if the graph cannot be read any more.
        """
        copies = max(1, len(self._compiled))
        return MemoryLedger(weights=copies * self._weights, activations=None, io=self._io)

    @cached_property
    def _weights(self) -> int:
        return engine_bytes(self._package, self.name)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once; the first call with other shapes compiles the net for them.

        Raises BackendError after `close` or for wrong inputs, MemoryLimitError.
        """
        if self._model is None:
            raise BackendError(
                f"the net {self.name!r} is closed",
                expected="an open net",
                fix="Call it inside its `with` block.",
            )
        compiled = self._known(arrays) or self._for_shapes(self._checked(arrays))
        try:
            results = compiled.run(arrays)
        except Exception as error:  # the library's own are all RuntimeError; pybind11 adds others
            raise run_error(self.name, error, f"with {_shapes(arrays)}") from error
        self._io = compiled.io
        return results

    def _known(self, arrays: Mapping[str, Array]) -> _Compiled | None:
        """What ran last, where the inputs are as its inputs were, so that nothing is wrong with them."""
        latest = self._latest
        if latest is None or len(arrays) != len(self._dtypes):
            return None
        key, compiled = latest
        for (name, dtype), shape in zip(self._dtypes.items(), key, strict=True):
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype is not dtype:
                return None
        return compiled

    def _checked(self, arrays: Mapping[str, Array]) -> _Key:
        """The shapes of inputs that the net takes. Raises BackendError for all others."""
        shapes = _shapes(arrays)
        try:
            output_shapes(self.spec, shapes)
            for name, array in arrays.items():
                if array.dtype != self._dtypes[name]:
                    expected = str(self._dtypes[name])
                    raise UsageError(f"{name} is {array.dtype}", expected=expected, fix=_CHECK)
        except UsageError as error:
            raise BackendError(
                f"the net {self.name!r} failed on {shapes}: {error.found}",
                expected=error.expected,
                fix=_CHECK,
            ) from error
        return tuple(shapes[name] for name in self._dtypes)

    def _for_shapes(self, key: _Key) -> _Compiled:
        """The net compiled for the shapes of its inputs. Others who ask for them meanwhile wait for it."""
        with self._lock:
            mine = None if key in self._compiled else Future[_Compiled]()
            if mine is not None:
                self._latest = None
                self._make_room()
                self._compiled[key] = mine
            self._compiled.move_to_end(key)
            found = self._compiled[key]
        if mine is not None:
            try:
                mine.set_result(self._compile(key))
            except BaseException as error:
                with self._lock:
                    self._compiled.pop(key, None)
                mine.set_exception(error)
        compiled = found.result()
        with self._lock:
            if key in self._compiled:
                self._latest = key, compiled
        return compiled

    def _make_room(self) -> None:
        """Forget the shapes used longest ago, as many as are too many or do not leave memory for another.

        Under the lock. What a thread is running is freed behind it.
        """
        while len(self._compiled) >= MOST_SHAPES or (self._compiled and self._is_short()):
            self._compiled.popitem(last=False)
            if self._weights > _FELT:
                give_back_heap()

    def _is_short(self) -> bool:
        available = available_bytes()
        return available is not None and available < _WHILE_COMPILED * self._weights

    def _compile(self, key: _Key) -> _Compiled:
        model = self._model
        shapes = dict(zip((item.name for item in self.spec.inputs), key, strict=True))
        try:
            fixed = model.clone()  # weights are shared
            fixed.reshape({name: list(shape) for name, shape in shapes.items()})
            compiled = core().compile_model(fixed, self.device, self._settings)
        except Exception as error:
            raise run_error(self.name, error, f"while it is compiled for {shapes}") from error
        if self._weights > _FELT:
            give_back_heap()
        return _Compiled(compiled, [item.name for item in self.spec.outputs], weights_of=model)

    def close(self) -> None:
        """Free everything; what another thread runs is freed behind it. May be called twice."""
        with self._lock:
            used = bool(self._compiled)
            self._compiled.clear()
            self._latest = None
        self._model = None
        if used and self._weights > _FELT:
            give_back_heap()

    def __enter__(self) -> OpenvinoNet:
        """The net itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _shapes(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


class _Compiled:
    """A net compiled for one shape of each input, and the infer requests that no call is using."""

    def __init__(self, compiled: Any, outputs: list[str], weights_of: Any) -> None:
        self._compiled = compiled
        names: list[set[str]] = [port.get_names() for port in compiled.outputs]
        self._outputs = {name: next(i for i, one in enumerate(names) if name in one) for name in outputs}
        self._weights_of = weights_of  # biases are read where they lie
        self._idle: list[Any] = []
        self.io = 0  # bytes of the inputs and outputs of a run, once there was one

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Inputs are read where they lie; outputs are copies, which no later run overwrites."""
        try:
            request = self._idle.pop()
        except IndexError:  # all are in use
            request = _Request(self._compiled.create_infer_request())
        found = request.run(arrays)
        self._idle.append(request)
        results = {name: found[index] for name, index in self._outputs.items()}
        self.io = self.io or sum(array.nbytes for array in (*arrays.values(), *results.values()))
        return results


class _Request:
    """An infer request, and the arrays that its inputs are bound to.

    To bind dozens of inputs anew in every step, as `infer(inputs)` does, is felt in the demo's step. Most are
    the same arrays as in the step before, and stay bound. The latent and what follows from the timestep are
    others each time: from the second time on they are copied into arrays that stay bound.
    """

    def __init__(self, request: Any) -> None:
        self._request = request
        self._bound: dict[str, Array] = {}
        self._changed = set[str]()  # those that were bound anew in the last run
        self._copied = set[str]()

    def run(self, arrays: Mapping[str, Array]) -> tuple[Array, ...]:
        """Run once; the outputs in their order, copies."""
        for name, array in arrays.items():
            if self._bound.get(name) is array:
                self._changed.discard(name)
            elif name in self._copied:
                self._bound[name][...] = array
            elif name in self._changed and array.nbytes <= _SMALL:
                self._copied.add(name)
                self._bind(name, np.array(array, order="C"))
            else:
                self._changed.add(name)
                self._bind(name, np.require(array, requirements=["C", "W"]))  # copies what is read-only
        return self._request.infer(share_outputs=False).to_tuple()

    def _bind(self, name: str, values: Array) -> None:
        self._request.set_tensor(name, library().Tensor(values, shared_memory=True))
        self._bound[name] = values


def _settings(device: str, threads: int, precision: str) -> dict[str, Any]:
    """What nets are compiled with.

    The precision is said, because where a processor has bfloat16 OpenVINO's own choice is that, with or
    without the units that make it faster, and too coarse for the bars of exact packages (`backend.py`).
    """
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if device == HOST:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def _read(package: Package, name: str, path: Path) -> Any:
    """The graph of a net, with its weights as constants that have no copy. Raises as `OpenvinoNet`."""
    given, weights = given_graph(package, name), dict[str, Array]()
    try:
        _let_go_of_memory(given.values, engine_bytes(package, name))
        model = core().read_model(given.graph)
        for parameter in model.get_parameters():
            label = next(iter(parameter.output(0).names & given.values.keys()), None)
            if label is not None:
                # A copy is made of what its file does not align.
                array: Array = np.require(given.values.pop(label), requirements=["C", "A", "W"])
                made = constant(array)
                weights[made.get_friendly_name()] = array
                parameter.output(0).replace(made.output(0))
                model.remove_parameter(parameter)
        lower(model, weights)
        return model
    except Exception as error:  # its frontend raises RuntimeError, and classes of its own that derive from it
        raise PackageError(
            f"openvino {version()} refuses {path}: {error}",
            expected="a graph of opset 23 with its weights beside it",
            fix="Export the package again, or upgrade the library: "
            + command("pip", "install", "--upgrade", "openvino"),
        ) from error


def _let_go_of_memory(values: dict[str, Array], weights: int) -> None:
    """Move to a file what has none, where memory is short: packed copies are what OpenVINO reads."""
    available = available_bytes()
    if available is not None and available < _WHILE_COMPILED * weights:
        made = {name: value for name, value in values.items() if not isinstance(value, np.memmap)}
        spill(made, default_root())
        values |= made


def _check_boundary(model: Any, spec: NetSpec, path: Path) -> None:
    """Raise PackageError unless the inputs and outputs of the graph at `path` are those of `spec`."""
    for kind, found, expected in (
        ("input", model.inputs, spec.inputs),
        ("output", model.outputs, spec.outputs),
    ):
        graph = dict(_described(port, expected) for port in found)
        manifest = {item.name: (item.dtype, len(item.shape)) for item in expected}
        if graph != manifest:
            differing = sorted(set(graph.items()) ^ set(manifest.items()))
            raise PackageError(
                f"{path}: {kind}s differ from the manifest's: {differing[:4]}",
                expected="the boundary that the manifest records",
                fix="Export the package again: latentrt export CHECKPOINT -o PACKAGE",
            )


def _described(port: Any, expected: tuple[TensorSpec, ...]) -> tuple[str, tuple[str, int]]:
    """Name, type and rank of an input or output. Of the several names of a tensor the expected one counts."""
    names: set[str] = port.get_names()
    name = next((item.name for item in expected if item.name in names), min(names, default=""))
    rank = port.get_partial_shape().rank
    return name, (str(port.get_element_type().to_dtype()), int(rank.get_length()) if rank.is_static else -1)
