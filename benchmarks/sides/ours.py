"""latentrt's own runtime as a side: its loop's nets and its whole pipeline, on the host or on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from ...engines.backend import choose_backend
from ...engines.errors import LatentrtError
from ...engines.package import Manifest
from ...engines.spec import DTYPES, Array
from ...runtime.loop import guidance
from ...runtime.loop.denoise import denoise, narrow
from ...runtime.loop.host import HostLoop
from ...runtime.loop.open import LoopOptions
from ...runtime.pipeline import Pipeline
from ...runtime.prompts.tokenizer import ClipTokenizer
from ...runtime.request.request import latent_shape, make_request
from ...runtime.sampling.noise import NoiseSource
from ...runtime.sampling.samplers import make_table
from ...runtime.sampling.table import Table
from ..case import Case, net_inputs, time_inputs
from ..opening import open_pipeline
from .contract import OURS, OpenSide, Prepared, Task, not_available

BETWEEN = 20  # steps of the loop in one run of `update`


def available(task: Task) -> str | None:
    """None if the backend can run here, else the reason."""
    try:
        choose_backend(task.backend)
    except LatentrtError as error:
        return error.found
    return None


def open_side(task: Task) -> OpenSide:
    """The pipeline, with the loop that a user has."""
    pipe = open_pipeline(task.package, LoopOptions(backend=task.backend, threads=task.threads))
    loop = pipe.loop
    if isinstance(loop, HostLoop):
        return HostSide(pipe, loop, task.slow_down)
    from ...runtime.loop.device.loop import DeviceLoop
    from .ours_device import DeviceSide

    assert isinstance(loop, DeviceLoop)
    return DeviceSide(pipe, loop, task.slow_down)


def inputs_of(pipe: Pipeline, workload: str, case: Case) -> dict[str, Array]:
    """`case.net_inputs` with the package's own tokenizer."""
    tokenizer = ClipTokenizer.open(pipe.package.root / "tokenizer")
    return net_inputs(workload, case, pipe.package.manifest, tokenizer)


def schedule_of(case: Case, manifest: Manifest) -> tuple[Table, Callable[[], Array]]:
    """The sampler's table, and what draws unit noise (N, C, H/8, W/8) float32, from the seeds on."""
    request = make_request(manifest, case.prompt, **case.parameters)
    source = NoiseSource(request.seeds, request.rng)
    shape = latent_shape(manifest, case.height, case.width)
    return make_table(request.sampler, request.num_inference_steps), partial(source.draw, shape)


@dataclass(kw_only=True)
class Work:
    """A `Prepared`, and `Repeated`: a call, what it left behind, and what it tells.

    Attributes:
        call: one run; its answer are the outputs.
        told: figures of the last run.
        repeats: how often one run does the workload.
        slow_down: as `Task` has it.
    """

    call: Callable[[], Mapping[str, Array]]
    told: Callable[[], Mapping[str, Any]] = dict[str, Any]
    repeats: int = 1
    slow_down: float = 0.0
    left: Mapping[str, Array] = field(default_factory=dict[str, Array])

    def run(self) -> None:
        """Once, and then idle for as long as it is to be slowed down."""
        began = perf_counter()
        self.left = self.call()
        if self.slow_down:
            until = began + (perf_counter() - began) * (1 + self.slow_down)
            while perf_counter() < until:
                pass

    def outputs(self) -> Mapping[str, Array]:
        """Of the last run."""
        return self.left

    def figures(self) -> Mapping[str, Any]:
        """Of the last run."""
        return self.told()


class HostSide:
    """On the CPU: nets are called with arrays."""

    def __init__(self, pipe: Pipeline, loop: HostLoop, slow_down: float = 0.0) -> None:
        self._pipe, self._loop, self._slow_down = pipe, loop, slow_down
        self._manifest = pipe.package.manifest
        self._dtype = DTYPES[loop.nets["unet"].spec.inputs[0].dtype]

    @property
    def versions(self) -> Mapping[str, str]:
        """What executes the nets, and in which layouts."""
        layouts = {name: getattr(net, "layout", "plain") for name, net in self._loop.nets.items()}
        named = ", ".join(f"{name} {layout}" for name, layout in layouts.items() if layout != "plain")
        return {"backend": self._pipe.backend, "layouts": named or "plain"}

    def memory(self) -> Mapping[str, Any]:
        """The nets' ledger."""
        return {"ledger": {name: vars(net.memory) for name, net in self._loop.nets.items()}}

    def close(self) -> None:
        """Free every net."""
        self._pipe.close()

    def prepare(self, workload: str, case: Case) -> Prepared:
        """Raises NotAvailableError."""
        makers = {
            "text_encoder": self._text_encoder,
            "invariants": self._invariants,
            "unet": self._unet,
            "update": self._update,
            "vae_decoder": self._vae_decoder,
            "picture": self._picture,
        }
        if workload not in makers:
            raise not_available(OURS, workload)
        return makers[workload](case)

    def _work(self, call: Callable[[], Mapping[str, Array]], repeats: int = 1) -> Work:
        return Work(call=call, repeats=repeats, slow_down=self._slow_down)

    def _text_encoder(self, case: Case) -> Work:
        inputs = inputs_of(self._pipe, "text_encoder", case)
        return self._work(lambda: self._loop.nets["text_encoder"](**inputs))

    def _vae_decoder(self, case: Case) -> Work:
        latent = narrow(inputs_of(self._pipe, "vae_decoder", case)["latent"], self._dtype)
        return self._work(lambda: {"image": self._loop.nets["vae_decoder"](latent=latent)["image"]})

    def _invariants(self, case: Case) -> Work:
        """Keys and values of the prompts, and the time embeddings of every row of the table."""
        texts = 2 if case.guided else 1  # however many pictures: the loop encodes each text once
        inputs = inputs_of(self._pipe, "unet", case)
        context = narrow(inputs["context"][:texts], self._dtype)
        steps = np.linspace(999, 0, case.steps, dtype=np.float32)
        schedule = time_inputs(case, self._manifest, inputs, steps)
        nets = self._loop.nets

        def call() -> Mapping[str, Array]:
            nets["unet_context"](context=context)
            nets["unet_time"](**schedule)
            return {}

        return self._work(call)

    def _unet(self, case: Case) -> Work:
        """One call, with what does not change from step to step computed before."""
        inputs, nets = inputs_of(self._pipe, "unet", case), self._loop.nets
        stays = nets["unet_context"](context=narrow(inputs["context"], self._dtype))
        stays |= nets["unet_time"](**time_inputs(case, self._manifest, inputs, inputs["timestep"]))
        seen = ("latent", "image_latents")
        stays |= {name: narrow(inputs[name], self._dtype) for name in seen if name in inputs}
        return self._work(lambda: nets["unet"](**stays))

    def _update(self, case: Case) -> Work:
        """The loop of `BETWEEN` steps around a UNet that answers at once: all that is not an engine's."""
        table, noise = schedule_of(replace(case, steps=BETWEEN), self._manifest)
        start = noise()
        answer = guidance.batch(start, case.guided)

        def predict(latent: Array, row: int) -> Array:
            narrow(guidance.batch(latent, case.guided), self._dtype)
            return guidance.combine(answer, case.guidance_scale, 0.0, case.guided)

        def call() -> Mapping[str, Array]:
            *_, last = denoise(table, noise, predict, table.init * start)
            return {"latent": last.latent}

        return self._work(call, repeats=BETWEEN)

    def _picture(self, case: Case) -> Work:
        seconds: dict[str, float] = {}

        def call() -> Mapping[str, Array]:
            result = self._pipe(case.prompt, **case.parameters)
            seconds.clear()
            seconds.update(result.seconds)
            return {"image": np.asarray(result.images)}

        return Work(call=call, told=lambda: {"stages_s": dict(seconds)}, slow_down=self._slow_down)
