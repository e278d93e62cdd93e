"""The part of the simulated TensorRT that changes weights."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tests.engines.simulated_tensorrt_names import NUMPY_TYPES, DataType, ILogger


class Weights:
    def __init__(self, a: np.ndarray) -> None:
        assert a.flags.c_contiguous
        self._array = a

    @property
    def dtype(self) -> DataType:
        return next(DataType[name] for name, kind in NUMPY_TYPES.items() if kind == self._array.dtype)

    @property
    def size(self) -> int:
        return self._array.size


class Refitter:
    def __init__(self, engine: Any, logger: ILogger) -> None:
        assert engine.refittable, "the library makes no refitter for this engine"
        self._engine = engine
        self._set: dict[str, np.ndarray] = {}
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
        return Weights(np.ascontiguousarray(self._known[weights_name]))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        known = self._known[name] if name in self.get_all_weights() else None
        if known is None or weights.size != known.size or self._engine._fails("set_named_weights"):
            return self._engine._error(f"the weights {name} are refused")
        self._set[name] = weights._array
        return True

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        if self.get_missing_weights() or not stream_handle or self._engine._fails("refit"):
            return self._engine._error("weights are missing")
        engine = self._engine
        shaped = {
            n: a.reshape(self._known[n].shape).astype(self._known[n].dtype) for n, a in self._set.items()
        }
        engine._changed.update({name: array.copy() for name, array in shaped.items()})
        engine._complete = True
        engine._world.submit(engine._open)
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
            if name not in found or not self._refitter.set_named_weights(
                name, Weights(np.ascontiguousarray(found[name]))
            ):
                self._errors.append(ParserError(f"Failed to refit all the weights: {name}"))
                return False
        return True
