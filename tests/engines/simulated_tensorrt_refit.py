"""The part of the simulated TensorRT that changes weights."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tests.engines.simulated_tensorrt_names import NUMPY_TYPES, DataType, ILogger


class Weights:
    """Numbers at an address, which whoever made this keeps there: the simulation reads them when it runs."""

    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        self._kind, self._address, self._count = type, ptr, count

    @property
    def dtype(self) -> DataType:
        return self._kind

    @property
    def size(self) -> int:
        return self._count

    def _read(self) -> np.ndarray:
        size = self._count * np.dtype(NUMPY_TYPES[self._kind.name]).itemsize
        buffer = (ctypes.c_char * size).from_address(self._address)
        return np.frombuffer(buffer, NUMPY_TYPES[self._kind.name]).copy()


def _weights_of(array: np.ndarray) -> Weights:
    assert array.flags.c_contiguous
    name = next(name for name, kind in NUMPY_TYPES.items() if kind == array.dtype)
    return Weights(DataType[name], array.ctypes.data, array.size)


class Refitter:
    def __init__(self, engine: Any, logger: ILogger) -> None:
        assert engine.refittable, "the library makes no refitter for this engine"
        self._engine = engine
        self._set: dict[str, Weights] = {}
        model = onnx.load(engine._graph)
        self._known = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}

    def get_all_weights(self) -> list[str]:
        return list(self._engine._facts["refittable"])

    def get_missing_weights(self) -> list[str]:
        together = self._engine._facts.get("merged", [])
        if not self._engine._complete:
            together = self.get_all_weights()
        elif not set(together) & set(self._set):
            together = []
        return [name for name in together if name not in self._set]

    def get_weights_prototype(self, weights_name: str) -> Weights:
        return _weights_of(self._known[weights_name])

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        known = self._known[name] if name in self.get_all_weights() else None
        if known is None or weights.size != known.size or self._engine._fails("set_named_weights"):
            return self._engine._error(f"the weights {name} are refused")
        if weights.dtype != self.get_weights_prototype(name).dtype:
            return self._engine._error(f"the weights {name} have the type {weights.dtype.name}")
        self._set[name] = weights
        return True

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        if self.get_missing_weights() or not stream_handle or self._engine._fails("refit"):
            return self._engine._error("weights are missing")
        engine, given, known = self._engine, dict(self._set), self._known
        assert not engine._contexts, "weights are replaced before a context is made"
        engine._complete = True
        engine._world.counts[f"refit {engine._graph.parent.name}/{engine._graph.stem}"] += 1
        engine._world.counts["weights set"] += len(given)

        def read() -> None:
            """When the stream comes to it, and not before."""
            engine._changed.update({n: each._read().reshape(known[n].shape) for n, each in given.items()})
            engine._open()

        engine._world.submit(read)
        return True


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter
        self._errors: list[ParserError] = []
        self._held: list[np.ndarray] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def refit_from_bytes(self, model: bytes, path: str) -> bool:
        assert isinstance(path, str)
        loaded = onnx.load_from_string(model)
        onnx.load_external_data_for_model(loaded, str(Path(path).parent))
        found = {item.name: numpy_helper.to_array(item) for item in loaded.graph.initializer}
        for name in self._refitter.get_all_weights():
            self._held.append(np.ascontiguousarray(found[name]) if name in found else np.zeros(0))
            if name not in found or not self._refitter.set_named_weights(name, _weights_of(self._held[-1])):
                self._errors.append(ParserError(f"Failed to refit all the weights: {name}"))
                return False
        return True
