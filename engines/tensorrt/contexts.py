"""Execution contexts: where the libraries differ when an engine runs, and the cache of what they compile.

What a library can do is read off the library itself, so this table needs no version numbers:

====================  ===============  ===============  ============
                      tensorrt 10      tensorrt 11      tensorrt_rtx
====================  ===============  ===============  ============
engine validity       no               no               yes
engine statistics     no               yes              yes
kernels at run time   no               no               yes
tells capturability   no               no               yes
====================  ===============  ===============  ============
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ..errors import StorageError
from ..store.folder import StoreFolder
from .flavour import Engine, Trt

Context: TypeAlias = Any  # IExecutionContext

CACHE_KIND = "runtime"  # the store's folder of these side files


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a library can do. `compiles` means that it makes its kernels at run time, and can keep them."""

    validity: bool
    statistics: bool
    compiles: bool
    tells_capturable: bool


def abilities(trt: Trt) -> Abilities:
    """The column of the table above that a library belongs to."""
    return Abilities(
        validity=hasattr(trt, "EngineValidity"),
        statistics=hasattr(trt, "EngineStat"),
        compiles=hasattr(trt, "CudaGraphStrategy"),
        tells_capturable=hasattr(trt.IExecutionContext, "is_stream_capturable"),
    )


class CacheFile(Protocol):
    """Where compiled kernels are kept between processes."""

    def read(self) -> bytes:
        """What was written last; b"" if nothing, or nothing sound."""
        ...

    def write(self, data: bytes) -> None:
        """Replace it. Raises StorageError."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoredCache:
    """A runtime cache among the store's side files: one per engine and kind of GPU.

    The library takes a cache back on the same kind of GPU alone, so two kinds must not overwrite each
    other's.
    """

    store: StoreFolder
    digest: str  # of the engine's key
    device: str  # its name

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.digest[:32]}-{re.sub(r'[^A-Za-z0-9]+', '_', self.device)}"

    def read(self) -> bytes:
        """See CacheFile."""
        return self.store.read_side_file(self.store.side_file(CACHE_KIND, self.name))

    def write(self, data: bytes) -> None:
        """See CacheFile."""
        self.store.write_side_file(self.store.side_file(CACHE_KIND, self.name), data)


class Contexts:
    """Makes the execution contexts of one engine."""

    def __init__(self, trt: Trt, engine: Engine, file: CacheFile | None) -> None:
        self._trt, self._file = trt, file
        self._config: Any = None
        self._cache: Any = None
        self._stored = b""
        self._new = False  # kernels may have been compiled since `settle`
        if abilities(trt).compiles:
            self._config = self._configure(engine)

    def make(self, engine: Engine) -> Context | None:
        """A context that owns no activations: whoever binds it brings them. None if the library cannot."""
        if self._config is not None:
            return engine.create_execution_context(self._config)
        return engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def ran(self) -> None:
        """A context has been enqueued for the first time, which is when kernels are compiled."""
        self._new = True

    def settle(self) -> None:
        """Save, if there may be something new. That fails in silence: it would only have saved time."""
        new, self._new = self._new, False
        if new:
            with suppress(StorageError):
                self.save()

    def save(self) -> None:
        """Keep the kernels compiled so far, if any are new. Raises StorageError."""
        cache, file = self._cache, self._file
        if cache is None or file is None:
            return
        data = bytes(cache.serialize())
        if data != self._stored:
            file.write(data)
            self._stored = data

    def close(self) -> None:
        """Let go of the engine. May be called twice."""
        self._cache = self._config = None

    def _configure(self, engine: Engine) -> Any:
        trt, config = self._trt, engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Rows are captured by us; a graph of the library's own inside would be a second one.
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        # Otherwise the first pictures run on fallback kernels, several times slower (NVIDIA's demo of 1.5).
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        cache = config.create_runtime_cache()
        if self._file is not None and (stored := self._file.read()):
            # Refused after an update of the driver or the library: then everything is compiled once more.
            self._stored = stored if cache.deserialize(stored) else b""
        config.set_runtime_cache(cache)
        self._cache = cache
        return config
