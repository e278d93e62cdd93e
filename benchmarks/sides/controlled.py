"""Pipelines that may draw with one ControlNet, ours and diffusers'.

    control                                         a picture that the ControlNet of `Task.control` steers;
                                                    figures: `stages_s`, of diffusers the stage "steps" alone
    unused                                          ours alone: a picture without, while it is loaded
    graphs                                          ours alone, once and without outputs: calls of the plain
                                                    graph and of the one that takes controls, in turns;
                                                    figures: `plain_s`, `controlled_s`
    picture, and what else the plain side has       the same

The ControlNet is loaded by the first workload that has it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import import_module
from time import perf_counter
from typing import Any

from PIL import Image, ImageDraw

from ...engines.spec import Array
from ...runtime.controls.control import Control
from ...runtime.loop.denoise import HostLoop, steps_of_calls
from ...runtime.loop.job import Clock, UNetCall
from ...runtime.pipeline import Pipeline
from ..case import Case
from . import diffusers_pipeline, ours
from .contract import (
    CONTROLLED,
    DIFFUSERS_CONTROLLED,
    PICTURE,
    STEPS,
    UNUSED,
    NotAvailableError,
    OpenSide,
    Task,
    Work,
)
from .drawing import drawing
from .ours import available as available
from .plain_pipeline import missing, open_plain

CONTROL = "control"
GRAPHS = "graphs"
PAIRS = 40  # of calls, in turns: half a percent would not show in whole pictures of two processes
_PLAIN, _CONTROLLED = "unet", "unet_controlled"


def open_side(task: Task) -> OpenSide:
    """Our pipeline, with the loop that a user has."""
    pipe = ours.open_pipeline(task)
    side = ours.side_over(pipe)

    def control(case: Case, stack: ExitStack) -> Work:
        return drawing(pipe, case, controls=[Control(model=_loaded(pipe, task), image=edges(case))])

    def unused(case: Case, stack: ExitStack) -> Work:
        _loaded(pipe, task)
        return side.makers[PICTURE](case, stack)

    def graphs(case: Case, stack: ExitStack) -> Work:
        seen = calls_of_both(pipe, case)
        return Work(call=dict[str, Array], figures=lambda: seen)

    own = {CONTROL: control, UNUSED: unused, GRAPHS: graphs}
    return replace(side, name=CONTROLLED, makers={**side.makers, **own})


def calls_of_both(pipe: Pipeline, case: Case) -> dict[str, list[float]]:
    """Seconds of a call where nothing steers: of the plain graph, and of the one that is given zeros.

    Raises:
        NotAvailableError: no host calls the nets.
    """
    if not isinstance(pipe.loop, HostLoop):
        raise NotAvailableError(
            "calls of the UNet are not timed on a device", expected="a CPU", fix="Take the steps."
        )
    request = pipe.request_of({"prompt": case.prompt, **case.parameters})
    job, calls = pipe.prepare(request), dict[str, UNetCall]()
    for graph in (_PLAIN, _CONTROLLED):
        run: Any = pipe.loop.net(graph)
        steps = steps_of_calls(job, pipe.package.manifest, pipe.loop.call, Clock(), None, graph, run)
        calls[graph] = next(item for item in steps if isinstance(item, UNetCall))
    seconds: dict[str, list[float]] = {graph: [] for graph in calls}
    for number in range(1 + PAIRS):  # what the first call allocates is not counted
        for graph in list(calls)[:: 1 if number % 2 else -1]:
            began = perf_counter()
            calls[graph].run(**calls[graph].inputs)
            seconds[graph].append(perf_counter() - began)
    return {"plain_s": seconds[_PLAIN][1:], "controlled_s": seconds[_CONTROLLED][1:]}


def _loaded(pipe: Pipeline, task: Task) -> str:
    """The ControlNet's name; to load it again would open its nets a second time."""
    assert task.control is not None, "the verb made it"
    return next(iter(pipe.controls.names), "") or pipe.load_control(task.control)


class OfDiffusers:
    """diffusers' pipeline, a side of its own."""

    @staticmethod
    def available(task: Task) -> str | None:
        """None if it can run here, else the reason."""
        return missing(task)

    @staticmethod
    def open_side(task: Task) -> OpenSide:
        """Every net but the ControlNet loaded."""
        plain = open_plain(task)
        scheduler = plain.scheduler  # every picture sets another one
        side = diffusers_pipeline.side_over(DIFFUSERS_CONTROLLED, task, plain)

        def control(case: Case, stack: ExitStack) -> Work:
            pipe, ends = _steered(plain, task, scheduler), _Ends(steps=case.steps, device=task.device)
            work = diffusers_pipeline.drawing(
                *(DIFFUSERS_CONTROLLED, task, pipe, case), image=edges(case), callback_on_step_end=ends
            )
            return replace(work, figures=lambda: {"stages_s": {STEPS: ends.seconds}})

        return replace(side, makers={**side.makers, CONTROL: control})


def _steered(plain: Any, task: Task, scheduler: Any) -> Any:
    """`StableDiffusionControlNetPipeline`, or SDXL's, with the nets of a plain pipeline."""
    diffusers: Any = import_module("diffusers")
    net = diffusers.ControlNetModel.from_pretrained(str(task.control))
    net.to(plain.unet.device, plain.unet.dtype)
    net.to(memory_format=diffusers_pipeline.layout_of(task, net.dtype))
    pipe = diffusers.AutoPipelineForText2Image.from_pipe(plain, controlnet=net, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(kw_only=True)
class _Ends:
    """When steps end, by the pipeline's own callback; when the first began, nothing tells."""

    steps: int
    device: str
    _times: list[float] = field(default_factory=list[float])

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            self._times.clear()
        if self.device == "cuda" and index in (0, self.steps - 1):  # between them nothing is waited for
            import torch

            torch.cuda.synchronize()
        self._times.append(perf_counter())
        return tensors

    @property
    def seconds(self) -> float:
        """All steps of the last picture, the first as long as the others."""
        first, *others = self._times
        return (others[-1] - first) / len(others) * len(self._times)


def edges(case: Case) -> Image.Image:
    """What the ControlNet is given, RGB of the case's size: white outlines on black, the same for all."""
    hint = Image.new("RGB", (case.width, case.height))
    draw, (right, bottom) = ImageDraw.Draw(hint), (case.width - 1, case.height - 1)
    line = max(1, min(case.width, case.height) // 64)
    for shape, box in ((draw.ellipse, (0.1, 0.1, 0.6, 0.6)), (draw.rectangle, (0.4, 0.5, 0.9, 0.9))):
        left, top, end, foot = box
        shape((left * right, top * bottom, end * right, foot * bottom), outline="white", width=line)
    return hint
