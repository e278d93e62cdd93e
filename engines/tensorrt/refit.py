"""Other weights for an engine that stays as it is: some by name (LoRA), or all of a stripped engine's.

Partial work must not go unnoticed: TensorRT-RTX has left weights out of `get_missing_weights`
(pytorch/TensorRT pull request 4198), so every name is checked when it is set as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendError, UsageError
from ..spec import Array
from .flavour import Engine, Trt
from .log import failure, messages

_REPORT = "Report this with the engine's manifest (`latentrt cache ls --json`)."


def refit(trt: Trt, engine: Engine, stream: int, weights: Mapping[str, Array], *, net: str, fix: str) -> None:
    """Replace weights by name; enqueued on `stream`, and the arrays may be freed when this returns.

    Args:
        trt: the library.
        engine: built with REFIT_INDIVIDUAL for at least these names.
        stream: the one that the engine's contexts run on.
        weights: of the dtype and number of elements that the graph has.
        net: for messages.
        fix: the command that builds an engine that can be refitted.

    Raises:
        UsageError: a name that cannot be refitted, or an array of another dtype or size; nothing has changed.
        BackendError: the library asks for more weights, or refuses.
        MemoryLimitError: no memory for the copies.
    """
    log = messages(trt)
    mark = log.mark()
    refitter = trt.Refitter(engine, log.logger) if engine.refittable else None
    known = set(refitter.get_all_weights()) if refitter is not None else set[str]()
    if unknown := sorted(set(weights) - known):
        raise UsageError(
            f"the engine of {net!r} cannot change the weight {unknown[0]!r} ({len(unknown)} such names)",
            expected=f"names it was built to refit ({len(known)})",
            fix=fix,
        )
    held = [_set(trt, refitter, name, array, net=net, mark=mark) for name, array in sorted(weights.items())]
    _run(trt, refitter, stream, mark=mark, net=net)
    del held  # the library reads the arrays until `_run` returns


def refit_identical(trt: Trt, engine: Engine, stream: int, graph: Path, *, net: str, fix: str) -> int:
    """Give a stripped engine all its weights: those of the graph it was built from.

    The parser follows the graph's external data into the package's weights file, which `Package.open` has
    checked, and fails unless it has found every weight of the engine.

    Returns:
        how many weights it has set.

    Raises:
        BackendError: the engine takes no weights, or they are not those of this graph.
        MemoryLimitError: no memory for them.
    """
    log = messages(trt)
    mark = log.mark()
    refitter = trt.Refitter(engine, log.logger) if engine.refittable else None
    names = list(refitter.get_all_weights()) if refitter is not None else []
    parser = trt.OnnxParserRefitter(refitter, log.logger) if names else None
    if parser is None or not parser.refit_from_file(str(graph)):
        errors = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)] if parser else []
        raise failure(
            errors + log.since(mark),
            f"the engine of {net!r} does not take the weights of {graph.name}",
            net=net,
            expected=f"the graph it was built from ({len(names)} weights)",
            fix=fix,
        )
    _run(trt, refitter, stream, mark=mark, net=net)
    return len(names)


def _set(trt: Trt, refitter: Any, name: str, array: Array, *, net: str, mark: int) -> Array:
    prototype = refitter.get_weights_prototype(name)
    dtype = np.dtype(trt.nptype(prototype.dtype))
    if array.dtype != dtype or array.size != prototype.size:
        raise UsageError(
            f"the weight {name!r} for the engine of {net!r} is {array.dtype} with {array.size} elements",
            expected=f"{dtype} with {prototype.size} elements",
            fix="Convert it to what the graph has (`latentrt inspect PACKAGE`).",
        )
    held = np.ascontiguousarray(array)
    if not refitter.set_named_weights(name, trt.Weights(held)):
        raise failure(
            messages(trt).since(mark),
            f"the engine of {net!r} refuses the weight {name!r}",
            net=net,
            expected="a weight it was built to refit",
            fix=_REPORT,
        )
    return held


def _run(trt: Trt, refitter: Any, stream: int, *, mark: int, net: str) -> None:
    if missing := list(refitter.get_missing_weights()):
        raise BackendError(
            f"the engine of {net!r} misses {len(missing)} weights beside those given, first {missing[0]!r}",
            expected="all weights that the engine has merged with those given",
            fix="Give the missing ones as well, from the package.",
        )
    if not refitter.refit_cuda_engine_async(stream):
        raise failure(
            messages(trt).since(mark),
            f"the weights of the engine of {net!r} could not be replaced",
            net=net,
            expected="an engine that can be refitted",
            fix=_REPORT,
        )
