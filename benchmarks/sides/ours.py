"""latentrt's own runtime as a side: its loop's nets and its whole pipeline. On a device: `ours_device.py`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from ...engines.backend import choose_backend
from ...engines.errors import LatentrtError
from ...engines.spec import DTYPES, Array
from ...runtime.loop.calls import answered, at_once
from ...runtime.loop.denoise import HostLoop, denoise, guide, guided_batch, narrow
from ...runtime.loop.open import LoopOptions, open_loop
from ...runtime.pipeline import Pipeline
from ..case import BETWEEN, Case, inputs_of, row_time_inputs, schedule_of, time_inputs
from .contract import OURS, OpenSide, Task, Work, makers_of, open_package
from .drawing import drawing


def available(task: Task) -> str | None:
    """None if the backend can run here, else the reason."""
    try:
        choose_backend(task.backend)
    except LatentrtError as error:
        return error.found
    return None


def open_pipeline(task: Task) -> Pipeline:
    """As `Pipeline.open`, but prompts are not cached: a user draws another one each time."""
    package = open_package(task)
    loop = open_loop(package, LoopOptions(backend=task.backend, threads=task.threads))
    return Pipeline.over(package, *loop, cache_bytes=0)


def open_side(task: Task) -> OpenSide:
    """The pipeline, with the loop that a user has."""
    return side_over(open_pipeline(task))


def side_over(pipe: Pipeline) -> OpenSide:
    """The side of a pipeline, which is closed with it."""
    if isinstance(pipe.loop, HostLoop):
        return host_side(pipe, pipe.loop)
    from ...runtime.loop.device.loop import DeviceLoop
    from .ours_device import device_side

    assert isinstance(pipe.loop, DeviceLoop)
    return device_side(pipe, pipe.loop)


def host_side(pipe: Pipeline, loop: HostLoop) -> OpenSide:
    """A pipeline on the CPU, whose nets are called with arrays. It is closed with the side."""
    ours, resources = _OnHost(pipe, loop), ExitStack()
    resources.callback(pipe.close)
    layouts = {name: getattr(net, "layout", "plain") for name, net in loop.nets.items()}
    named = ", ".join(f"{name} {layout}" for name, layout in layouts.items() if layout != "plain")
    return OpenSide(
        name=OURS,
        versions={"backend": pipe.backend, "layouts": named or "plain"},
        makers=makers_of(ours),
        resources=resources,
        memory=lambda: {"ledger": {name: vars(net.memory) for name, net in loop.nets.items()}},
    )


class _OnHost:
    """The workloads, by the names of the contract."""

    def __init__(self, pipe: Pipeline, loop: HostLoop) -> None:
        self._pipe, self._loop = pipe, loop
        self._manifest = pipe.package.manifest
        self._dtype = DTYPES[loop.nets["unet"].spec.inputs[0].dtype]

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_net("text_encoder", case)

    def text_encoder_2(self, case: Case, stack: ExitStack) -> Work:
        return self._one_net("text_encoder_2", case)

    def _one_net(self, name: str, case: Case) -> Work:
        inputs, net = inputs_of(self._pipe.package, name, case), self._loop.net(name)
        return Work(call=lambda: net(**inputs))

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        latent = narrow(inputs_of(self._pipe.package, "vae_decoder", case)["latent"], self._dtype)
        return Work(call=lambda: {"image": self._loop.nets["vae_decoder"](latent=latent)["image"]})

    def invariants(self, case: Case, stack: ExitStack) -> Work:
        """Keys and values of the prompts, and the time embeddings of every row of the table."""
        texts = 2 if case.guided else 1  # however many pictures: the loop encodes each text once
        inputs = inputs_of(self._pipe.package, "unet", case)
        context = narrow(inputs["context"][:texts], self._dtype)
        steps = np.linspace(999, 0, case.steps, dtype=np.float32)
        schedule = time_inputs(case, self._manifest, inputs, steps)
        nets = self._loop.nets

        def call() -> Mapping[str, Array]:
            nets["unet_context"](context=context)
            nets["unet_time"](**schedule)
            return {}

        return Work(call=call)

    def unet(self, case: Case, stack: ExitStack) -> Work:
        """One call, with what does not change from step to step computed before."""
        inputs, nets = inputs_of(self._pipe.package, "unet", case), self._loop.nets
        stays = nets["unet_context"](context=narrow(inputs["context"], self._dtype))
        stays |= nets["unet_time"](**row_time_inputs(case, self._manifest, inputs))
        seen = ("latent", "image_latents")
        stays |= {name: narrow(inputs[name], self._dtype) for name in seen if name in inputs}
        return Work(call=lambda: nets["unet"](**stays))

    def update(self, case: Case, stack: ExitStack) -> Work:
        """The loop of `BETWEEN` steps around a UNet that answers at once: all that is not an engine's."""
        table, noise = schedule_of(replace(case, steps=BETWEEN), self._manifest)
        start = noise()
        answer = guided_batch(start, case.guided)

        def predict(latent: Array, row: int) -> Array:
            narrow(guided_batch(latent, case.guided), self._dtype)
            return guide(answer, case.guidance_scale, 0.0, case.guided)

        def call() -> Mapping[str, Array]:
            *_, last = answered(denoise(table, noise, at_once(predict), table.init * start))
            return {"latent": last.latent}

        return Work(call=call, repeats=BETWEEN)

    def picture(self, case: Case, stack: ExitStack) -> Work:
        return drawing(self._pipe, case)
