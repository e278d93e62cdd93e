"""`latentrt doctor`: what this machine can draw with, and what keeps it from more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

if TYPE_CHECKING:
    from ..runtime.doctor import BackendFinding, Findings


def doctor(as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, backends, devices and folders, and why a backend cannot run. Exit code 4: none can."""
    from ..engines.errors import BackendError
    from ..runtime.doctor import examine

    found = examine()
    print(json.dumps(found.to_json()) if as_json else "\n".join(_lines(found)))
    if not found.can_draw:
        raise Exit(BackendError.exit_code)


def _lines(found: Findings) -> Iterator[str]:
    head = ("latentrt", "python", "system")
    yield f"latentrt {found.versions.get('latentrt')}, Python {found.versions.get('python')}," + (
        f" {found.versions.get('system')}"
    )
    yield ", ".join(f"{name} {number}" for name, number in found.versions.items() if name not in head)
    yield "\nbackends"
    width = max(len(backend.name) for backend in found.backends)
    for backend in found.backends:
        yield from _backend_lines(backend, width)
    yield f"  auto takes {found.auto or 'none of them'}\n"
    yield from _machine_lines(found)
    for problem in found.problems:
        yield f"problem      {problem}"


def _backend_lines(backend: BackendFinding, width: int) -> Iterator[str]:
    name = f"  {backend.name:<{width}}  "
    if backend.seconds is not None:
        yield f"{name}draws: {backend.what}, opened and drew in {backend.seconds:.2f} s"
        return
    yield f"{name}does not draw: {backend.found}"
    yield f"{'':<{width + 4}}{backend.fix}"


def _machine_lines(found: Findings) -> Iterator[str]:
    gpu, cpu, memory, store, shipped = (
        dict[str, Any](part)
        for part in (found.gpu, found.processors, found.memory, found.store, found.shipped)
    )
    if "name" in gpu:
        yield (
            f"GPU          {gpu['name']} ({gpu['architecture']}), {_size(gpu['memory'])}, driver"
            f" {gpu['driver']}, CUDA {gpu['cuda']}"
        )
    elif gpu:
        yield f"GPU          {gpu['found']}{', driver ' + gpu['driver'] if gpu['driver'] else ''}"
    if cpu:
        quota = "none" if cpu["quota"] is None else f"{cpu['quota']:g} processors"
        yield (
            f"processors   {cpu['name']}: {cpu['machine']}, of which {cpu['schedulable']} may be run on;"
            f" quota {quota}; {cpu['usable']} used"
        )
    if memory:
        yield (
            f"memory       {_size(memory['total'])}, {_size(memory['available'])} available, limit"
            f" {'none' if memory['limit'] is None else _size(memory['limit'])}"
        )
    if store:
        engines = ", ".join(f"{count} of {backend}" for backend, count in store["engines"].items())
        yield (
            f"store        {store['path']}: {_size(store['bytes'])}, engines: {engines or 'none'};"
            f" {_size(store['free'])} free, {'writable' if store['writable'] else 'NOT WRITABLE'}"
        )
        for name, size in store["folders"].items():
            yield f"             {name}  {_size(size)}"
    if shipped:
        yield f"demo model   {shipped['path']}: {_size(shipped['bytes'])}, {shipped['dtype']}"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
