"""Gives an engine other weights than it was built with, right after it was loaded.

An engine that is stripped gets all of them from the package's graph. One that was built refittable gets those
that adapters change (`Package.changes`), each from its stored value: whoever wants others loads the engine
again, so that no sum is ever taken back, and what another set changed cannot be left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np

from ..errors import BackendError, LatentrtError, command
from ..external_data import ExternalTensor
from ..net_weights import (
    changed_names,
    changed_values,
    check_range,
    net_tensors,
    reading_changes,
    weight_values,
)
from ..package import Package
from ..spec import Array
from .flavour import Engine, Trt
from .loading import EngineOf
from .log import failure, messages

# Names in DataType of weights that are replaced -> NumPy's type.
# In narrower ones a weight would keep little of a change.
_TYPES = {"FLOAT": np.float32, "HALF": np.float16}
_AT_ONCE = 2**28  # values on the host at the same time, about: in float32 and in the engine's type


def refit_stripped(of: EngineOf, engine: Engine, graph: Path, weights: Path) -> None:
    """Give an engine without weights those of the graph that it was built from.

    The parser follows the graph's external data into the folder `weights`, as `Package.open` has checked, and
    fails unless it has found every weight of the engine. TensorRT-RTX has left weights out of
    `get_missing_weights` (pytorch/TensorRT pull request 4198), so that list alone proves nothing.

    Raises:
        BackendError: the engine takes no weights, or they are not those of this graph.
        MemoryLimitError: no memory for them.
    """
    trt, log = of.trt, messages(of.trt)
    mark = log.mark()
    refitter = trt.Refitter(engine, log.logger) if engine.refittable else None
    names = list(refitter.get_all_weights()) if refitter is not None else []
    parser = trt.OnnxParserRefitter(refitter, log.logger) if names else None
    content, beside = graph.read_bytes(), str(weights / graph.name)
    if refitter is None or parser is None or not parser.refit_from_bytes(content, beside):
        errors = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)] if parser else []
        raise failure(
            errors + log.since(mark),
            f"the engine of {of.net!r} does not take the weights of {graph.name}",
            net=of.net,
            expected=f"the graph it was built from ({len(names)} weights)",
            fix=of.rebuild,
        )
    if list(refitter.get_missing_weights()) or not refitter.refit_cuda_engine_async(of.device.stream):
        raise failure(
            log.since(mark),
            f"the weights of the engine of {of.net!r} could not be set",
            net=of.net,
            expected="an engine that was built without its weights",
            fix=of.rebuild,
        )
    of.device.synchronize()  # the stream reads what the parser holds


def refit_changed(of: EngineOf, engine: Engine, package: Package) -> int:
    """Give an engine that computes with its stored weights those that the package has in their place.

    Returns:
        How many weights were set: those, and what the library wants with them. They are in place.

    Raises:
        BackendError: the engine does not let go of one of them, or the library refuses them.
        NumericError: one is beyond what fp16 holds.
        MemoryLimitError: they do not fit.
        PackageError: a weights file is not what the graph says.
        LatentrtError: what a change raises. The engine is of no use then.
    """
    with reading_changes(package, of.net):
        names = changed_names(package, of.net)
        if not names:
            return 0
        stored = net_tensors(package, of.net)
    _check_replaceable(of, engine, names)
    return sum(_refit(of, engine, package, stored, batch) for batch in _batches(names, stored))


def rebuild_refittable(package: str | Path, backend: str, nets: Sequence[str]) -> str:
    """The command that builds engines of these nets whose weights can be replaced."""
    options = ("--backend", backend, "--weights", "refittable", "--nets", ",".join(nets))
    return f"Build them: {command('latentrt', 'build', package, *options)}"


def _check_replaceable(of: EngineOf, engine: Engine, names: Sequence[str]) -> None:
    trt, log = of.trt, messages(of.trt)
    refitter = trt.Refitter(engine, log.logger) if engine.refittable else None
    if refitter is None:
        raise BackendError(
            f"the weights of the engine of {of.net!r} are fixed, and adapters change {len(names)} of them",
            expected="an engine that was built refittable",
            fix=rebuild_refittable(of.package, of.flavour.backend, [of.net]),
        )
    free = set(refitter.get_all_weights())
    if kept := [name for name in names if name not in free]:
        raise BackendError(
            f"the adapters change {kept[0]}, which engines of {of.flavour.backend} do not let go of",
            expected="adapters that change matrices and convolutions alone",
            fix="Use another backend: --backend onnxruntime-cuda, or --backend onnxruntime",
        )


def _batches(names: Sequence[str], stored: Mapping[str, ExternalTensor]) -> Iterator[list[str]]:
    """The names, in order, as few together as the host has room for."""
    batch, values = list[str](), 0
    for name in names:
        size = prod(stored[name].shape)
        if batch and values + size > _AT_ONCE:
            yield batch
            batch, values = [], 0
        batch.append(name)
        values += size
    yield batch


def _refit(
    of: EngineOf, engine: Engine, package: Package, stored: Mapping[str, ExternalTensor], names: Sequence[str]
) -> int:
    """Replace some weights, and wait for it: the stream reads them until then."""
    log = messages(of.trt)
    mark = log.mark()
    refitter, held = of.trt.Refitter(engine, log.logger), list[Array]()
    try:
        _set(of, refitter, package, _values(package, of.net, stored, names), held)
        # What the library keeps in one piece with these: all of it, or the piece would be half of each.
        others = list(refitter.get_missing_weights())
        if unknown := [name for name in others if name not in stored]:
            raise _refused(of, mark, f"wants {unknown[0]} too, which is no weight of its graph")
        _set(of, refitter, package, _values(package, of.net, stored, others), held)
        if list(refitter.get_missing_weights()) or not refitter.refit_cuda_engine_async(of.device.stream):
            raise _refused(of, mark, f"does not take {len(held)} weights, first {names[0]}")
    except BaseException:
        with suppress(LatentrtError):  # the stream may read what is held here
            of.device.synchronize()
        raise
    of.device.synchronize()
    return len(held)


def _values(
    package: Package, net: str, stored: Mapping[str, ExternalTensor], names: Sequence[str]
) -> dict[str, Array]:
    """What the net computes with: the changed weight, or the stored one."""
    changes = package.changes_of(net)
    with reading_changes(package, net):
        folder = package.weights_folder(net)
        plain = {name: weight_values(stored[name], folder) for name in names if name not in changes}
        return {**plain, **changed_values(package, net, [name for name in names if name in changes])}


def _set(
    of: EngineOf, refitter: Trt, package: Package, values: Mapping[str, Array], held: list[Array]
) -> None:
    """Hand weights over in the engine's types. What it reads is added to `held`, and must live on."""
    mark = messages(of.trt).mark()
    for name, value in values.items():
        prototype = refitter.get_weights_prototype(name)
        kind = _TYPES.get(prototype.dtype.name)
        if kind is None or prototype.size != value.size:
            raise _refused(of, mark, f"has {prototype.size} values of {prototype.dtype.name} for {name}")
        check_range(name, value)
        held.append(np.ascontiguousarray(value, kind))
        weights = of.trt.Weights(prototype.dtype, held[-1].ctypes.data, held[-1].size)
        if not refitter.set_named_weights(name, weights):
            raise _refused(of, mark, f"refuses the weight {name}")


def _refused(of: EngineOf, mark: int, what: str) -> LatentrtError:
    return failure(
        messages(of.trt).since(mark),
        f"the engine of {of.net!r} {what}",
        net=of.net,
        expected="an engine that was built refittable from this package",
        fix=rebuild_refittable(of.package, of.flavour.backend, [of.net]),
    )
