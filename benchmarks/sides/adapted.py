"""Pipelines while their adapters are changed, ours and diffusers'.

    a file of `Task.loras`, without its ending      every change of CHANGES once, each followed by a picture;
                                                    image: drawn with the adapter; figures: seconds of the
                                                    changes, and of the pictures by `picture_after`
    picture, and what else the plain side has       the same
    unused                                          a picture without adapters, while all files are loaded

A change is timed until a picture can be drawn with it: the call, and what the picture says that its adapters
took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from ...engines.spec import Array
from ..case import Case
from . import diffusers_pipeline, ours
from .contract import ADAPTED, DIFFUSERS_ADAPTED, PICTURE, UNUSED, Make, OpenSide, Task, Work
from .ours import available as available
from .plain_pipeline import missing, open_plain

LOAD, NEW, NONE, OPEN, UNLOAD = "load", "new set", "back to none", "open set", "unload"
CHANGES = (LOAD, NEW, NONE, OPEN, UNLOAD)  # in the order in which they are made
FOLLOWED = (NEW, NONE, OPEN)  # those that a picture follows
_NAME = "measured"  # of the adapter

Change = Callable[[], Any]


def picture_after(change: str) -> str:
    """The figure that has the seconds of the picture after a change."""
    return f"picture after {change}"


def open_side(task: Task) -> OpenSide:
    """Our pipeline, with the loop that a user has."""
    pipe = ours.open_pipeline(task)
    side = ours.side_over(pipe)

    def changes(file: Path) -> dict[str, Change]:
        return {
            LOAD: lambda: pipe.load_lora_weights(file, _NAME),
            NEW: lambda: pipe.set_adapters(_NAME),
            NONE: lambda: pipe.set_adapters([]),
            OPEN: lambda: pipe.set_adapters(_NAME),
            UNLOAD: pipe.unload_lora_weights,
        }

    def unused(case: Case, stack: ExitStack) -> Work:
        for file in _files(task).values():
            pipe.load_lora_weights(file)
        stack.callback(pipe.unload_lora_weights)
        return side.makers[PICTURE](case, stack)

    makers = {**side.makers, **_makers(task, side, changes), UNUSED: unused}
    return replace(side, name=ADAPTED, makers=makers)


class OfDiffusers:
    """diffusers' pipeline, a side of its own."""

    @staticmethod
    def available(task: Task) -> str | None:
        """None if it can run here, else the reason."""
        return missing(task, "peft")

    @staticmethod
    def open_side(task: Task) -> OpenSide:
        """Every net loaded."""
        pipe = open_plain(task)
        side = diffusers_pipeline.side_over(DIFFUSERS_ADAPTED, task, pipe)

        def changes(file: Path) -> dict[str, Change]:
            return {
                LOAD: lambda: pipe.load_lora_weights(str(file), adapter_name=_NAME),
                NEW: lambda: pipe.set_adapters(_NAME),
                NONE: pipe.disable_lora,
                OPEN: pipe.enable_lora,
                UNLOAD: pipe.unload_lora_weights,
            }

        return replace(side, makers={**side.makers, **_makers(task, side, changes)})


def _files(task: Task) -> dict[str, Path]:
    """The adapters of a task by name."""
    return {path.stem: path for path in sorted(task.loras.glob("*.safetensors"))} if task.loras else {}


def _makers(
    task: Task, side: OpenSide, changes: Callable[[Path], Mapping[str, Change]]
) -> Mapping[str, Make]:
    """A workload for each adapter."""

    def prepare(file: Path, case: Case, stack: ExitStack) -> Work:
        seconds: dict[str, float] = {}
        picture = side.makers[PICTURE](case, stack)
        call = partial(_change, changes(file), picture, seconds)
        return Work(call=call, figures=lambda: seconds)

    return {name: partial(prepare, file) for name, file in _files(task).items()}


def _change(changes: Mapping[str, Change], picture: Work, seconds: dict[str, float]) -> Mapping[str, Array]:
    """Make every change, and write down what it took; the picture with the adapter."""
    outputs: Mapping[str, Array] = {}
    for name in CHANGES:
        began = perf_counter()
        changes[name]()
        changed = perf_counter()
        seconds[name] = changed - began
        if name in FOLLOWED:
            picture.run()
            took = perf_counter() - changed
            ready = picture.figures().get("stages_s", {}).get("adapters", 0.0)
            seconds[name] += ready
            seconds[picture_after(name)] = took - ready
            outputs = picture.outputs() if name == NEW else outputs
    return outputs
