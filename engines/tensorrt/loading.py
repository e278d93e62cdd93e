"""From the bytes of an engine to a library's engine object, and the check that it is the net it should be.

The bytes were hashed by the store before they come here: what TensorRT reports of an engine is whether it
suits this machine, never whether somebody changed it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ..device import Device
from ..errors import BackendError, LatentrtError, MemoryLimitError
from ..profiles import NetProfile
from ..spec import NetSpec
from ..store.engine_store import Entry
from .contract import check_engine
from .flavour import Engine, Flavour, Trt, abilities
from .log import failure, messages, reason

# Names in EngineInvalidityDiagnostics: what each means, and the fix where building again is none.
_DIAGNOSTICS = {
    "VERSION_MISMATCH": ("another release of the library built it", ""),
    "UNSUPPORTED_CC": ("it was not built for the compute capability of this GPU", ""),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is too old for it", "Update the NVIDIA driver."),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old for it", "Install it again: {install}"),
    "INSUFFICIENT_GPU_MEMORY": ("it does not fit into the memory of this GPU", ""),
    "MALFORMED_ENGINE": ("it is no engine of this library", ""),
    "CUDA_ERROR": ("the device reported an error", "See whether `nvidia-smi` shows the GPU."),
}


class StreamDevice(Device, Protocol):
    """A device whose stream a library can be handed."""

    @property
    def stream(self) -> int:
        """The handle, never the default stream's."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineOf:
    """What an engine is of, and where it goes; `profiles` are in the engine's order."""

    trt: Trt
    flavour: Flavour
    net: str
    spec: NetSpec
    profiles: tuple[NetProfile, ...]
    device: StreamDevice
    package: str = "PACKAGE"

    @property
    def rebuild(self) -> str:
        """The command that makes the engine anew."""
        return f"Build it again: latentrt build {self.package} --backend {self.flavour.backend}."


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded(EngineOf):
    """An engine on a device.

    `size` is in bytes, `streamable` the bytes of weights that the library could stream (0 unless the engine
    was built so). `runtime` must live as long as the engine. `remark` is the library's on an engine that is
    not the best for this device, else "".
    """

    size: int
    streamable: int
    runtime: Any
    engine: Engine
    remark: str

    def failed(self, mark: int, what: str) -> LatentrtError:
        """The error of a call that the library refused after `mark` (`Messages.mark`)."""
        memory = ""
        with suppress(LatentrtError):  # a device that fails to answer must not hide the first error
            now = self.device.memory()
            memory = f"{now.free} of {now.total} bytes free"
        return failure(
            messages(self.trt).since(mark),
            f"the net {self.net!r} {what}",
            net=self.net,
            expected="shapes, addresses and memory that its engine accepts",
            fix=self.rebuild,
            memory=memory,
        )


def check_room(entry: Entry, device: Device, *, net: str) -> None:
    """Raise MemoryLimitError where reading an engine would take memory that the device needs to load it.

    Where device and host share their memory, the bytes that are read and the engine that is made of them are
    there at once, and what runs out kills the process before any library can say so.
    """
    now = device.memory()
    if now.unified and now.free < 2 * entry.size:
        raise MemoryLimitError(
            f"{now.free} of {now.total} bytes that {device.name} shares with its host are free, to load the"
            f" engine of {net!r}, which has {entry.size}",
            expected=f"{2 * entry.size}: the engine as it is read, and as it is loaded",
            fix="Close other programs, or use a smaller model.",
            culprit=net,
        )


def load_engine(of: EngineOf, data: bytes) -> Loaded:
    """Deserialise an engine and check its boundary.

    Raises:
        BackendError: the engine does not suit this library, driver or device, in the library's own words.
        EngineError: its boundary or profiles are not those of the net.
        MemoryLimitError: it does not fit on the device.
    """
    trt, log = of.trt, messages(of.trt)
    mark = log.mark()
    runtime = trt.Runtime(log.logger)
    library = f"{of.flavour.module} {trt.__version__}"
    if runtime.engine_host_code_allowed:
        raise BackendError(
            f"{library} would run host code out of engines",
            expected="a runtime that does not (its default)",
            fix=f"Install a release that is known here: {of.flavour.install}",
        )
    remark = _validity(of, trt, runtime, data)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise failure(
            log.since(mark),
            f"{library} refuses the engine of {of.net!r} on {of.device.name}",
            net=of.net,
            expected="an engine that this release built for this kind of GPU",
            fix=of.rebuild,
        )
    check_engine(trt, engine, of.spec, of.profiles, net=of.net, fix=of.rebuild)
    return Loaded(
        **vars(of),
        size=len(data),
        streamable=_keep_resident(engine),
        runtime=runtime,
        engine=engine,
        remark=remark,
    )


def _keep_resident(engine: Engine) -> int:
    """The bytes of weights that could be streamed; all of them stay on the device until memory runs short.

    The documentation calls that the default, but a library that would rather choose by what is free now would
    be slower, and `stream_weights` could not count what it frees.
    """
    size = int(engine.streamable_weights_size)
    if size <= 0:
        return 0  # not built for it; the documentation wants the rest left alone then
    with suppress(RuntimeError):  # no room for all of them: it streams what it must
        engine.weight_streaming_budget_v2 = size
    return size


def _validity(of: EngineOf, trt: Trt, runtime: Any, data: bytes) -> str:
    """The library's remark on an engine that it will run, where it makes one."""
    if not abilities(trt).validity:
        return ""
    log = messages(trt)
    mark = log.mark()
    validity, bits = runtime.get_engine_validity(data)
    if validity == trt.EngineValidity.VALID:
        return ""
    kinds = trt.EngineInvalidityDiagnostics
    found = [name for name in _DIAGNOSTICS if int(bits) & int(getattr(kinds, name))]
    why = ", ".join(_DIAGNOSTICS[name][0] for name in found)
    if validity == trt.EngineValidity.SUBOPTIMAL:
        return f"the engine of {of.net!r} is not the best for this GPU{f' ({why})' if why else ''}"
    what = f"{of.flavour.module} {trt.__version__} finds the engine of {of.net!r} invalid"
    what = f"{what}{f' ({why})' if why else ''}"
    raise _invalid(of, found, what, log.since(mark))


def _invalid(of: EngineOf, found: list[str], what: str, lines: list[str]) -> LatentrtError:
    fixes = [
        _DIAGNOSTICS[name][1].format(install=of.flavour.install) for name in found if _DIAGNOSTICS[name][1]
    ]
    if "INSUFFICIENT_GPU_MEMORY" in found:
        return MemoryLimitError(
            f"{what}{reason(lines)}",
            expected="an engine that fits",
            fix="Free memory of the device, or build for smaller pictures: --profile 512x512:b1.",
            culprit=of.net,
        )
    return failure(
        lines,
        what,
        net=of.net,
        expected="an engine that this release built for this kind of GPU",
        fix=fixes[0] if fixes else of.rebuild,
    )
