"""The loop that a user writes around exported graphs: the UNet as it is, everything between nets in NumPy.

Nothing is hoisted out of the UNet and nothing is lowered; the sampler's table and guidance are latentrt's
own, so that whatever differs from ours is the engine's doing and the graph's. The side here is around plain
ONNX Runtime sessions on the CPU, as anyone would open them; other engines on the host share the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from ...engines.onnxruntime import session as onnxruntime
from ...engines.onnxruntime.nets import CPU
from ...engines.package import Manifest, Package
from ...engines.processors import thread_count
from ...engines.spec import DTYPES, Array
from ...runtime.loop.denoise import denoise, guide, guided_batch, narrow
from ...runtime.loop.job import Clock
from ...runtime.prompts.tokenizer import ClipTokenizer
from ..case import Case, net_inputs, schedule_of, whole_inputs
from .contract import (
    OpenSide,
    Task,
    Work,
    makers_of,
    missing_modules,
    not_available,
    open_plain_package,
    staged,
)

PLAIN_NETS = ("text_encoder", "unet_whole", "vae_decoder")
Net = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # inputs by name -> outputs by name
OpenNet = Callable[[str, Case], Net]  # of PLAIN_NETS, for the shapes of a case


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    del task
    return missing_modules("onnxruntime")


def open_side(task: Task) -> OpenSide:
    """A session for each net: default options but for the threads. Raises NotAvailableError, PackageError."""
    package = open_plain_package(task)
    options = onnxruntime.library().SessionOptions()  # what a user gets: not the settings of our own sessions
    options.log_severity_level = 3
    options.intra_op_num_threads = thread_count(task.threads)
    nets: dict[str, Net] = {}
    for name in PLAIN_NETS:
        file = package.manifest.nets[name]
        session = onnxruntime.open_session(package.path(file.graph), options, [CPU], culprit=name)
        nets[name] = partial(_run, session, [output.name for output in file.spec.outputs])
    resources = ExitStack()
    resources.callback(nets.clear)
    versions = {
        "onnxruntime": str(onnxruntime.library().__version__),
        "provider": CPU,
        "threads": str(options.intra_op_num_threads),
        "graph_optimization": str(options.graph_optimization_level.name),
    }
    return plain_side("onnxruntime", package, lambda name, case: nets[name], versions, resources)


def _run(session: Any, outputs: list[str], feeds: Any) -> dict[str, Any]:
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))


def check_drawable(name: str, manifest: Manifest) -> None:
    """Raise NotAvailableError for a model that needs more than a prompt: these loops do not know how."""
    if manifest.vectors or manifest.image_latents:
        raise not_available(name, "picture")


def plain_side(
    name: str, package: Package, open_net: OpenNet, versions: Mapping[str, str], resources: ExitStack
) -> OpenSide:
    """Nets of an engine on the host, and the loop around them.

    What a net of `open_net` returns must stay as it is at its next call; `resources` are freed at the end.
    """
    plain = _PlainLoop(name, package, open_net)
    return OpenSide(name=name, versions=versions, makers=makers_of(plain), resources=resources)


class _PlainLoop:
    """The workloads, by the names of the contract."""

    def __init__(self, name: str, package: Package, open_net: OpenNet) -> None:
        self._name, self._manifest, self._open_net = name, package.manifest, open_net
        self._tokenizer = ClipTokenizer.open(package.root / "tokenizer")
        self._dtype = DTYPES[package.manifest.nets["unet_whole"].spec.inputs[0].dtype]

    def _inputs(self, workload: str, case: Case) -> dict[str, Array]:
        return net_inputs(workload, case, self._manifest, self._tokenizer)

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        inputs, net = self._inputs("text_encoder", case), self._open_net("text_encoder", case)
        return Work(call=lambda: net(inputs))

    def unet(self, case: Case, stack: ExitStack) -> Work:
        feeds = whole_inputs(case, self._manifest, self._inputs("unet", case))
        for name in ("sample", "encoder_hidden_states"):  # the others stay float32
            feeds[name] = narrow(feeds[name], self._dtype)
        net = self._open_net("unet_whole", case)
        return Work(call=lambda: {"prediction": net(feeds)["out_sample"]})

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        feeds = {"latent": narrow(self._inputs("vae_decoder", case)["latent"], self._dtype)}
        net = self._open_net("vae_decoder", case)
        return Work(call=lambda: {"image": net(feeds)["image"]})

    def picture(self, case: Case, stack: ExitStack) -> Work:
        check_drawable(self._name, self._manifest)
        nets = {name: self._open_net(name, case) for name in PLAIN_NETS}

        def draw() -> tuple[Array, Mapping[str, float]]:
            clock = Clock()
            return self._draw(case, nets, clock), clock.seconds

        return staged(draw)

    def _draw(self, case: Case, nets: Mapping[str, Net], clock: Clock) -> Array:
        """Prompt to (N, H, W, 3) uint8."""
        table, noise = schedule_of(case, self._manifest)
        start = noise()
        with clock.stage("text_encoder"):
            context = nets["text_encoder"](self._inputs("text_encoder", case))["context"]  # (P, T, D)
            context = np.repeat(context, case.pictures, axis=0)  # (B, T, D)

        def predict(latent: Array, row: int) -> Array:
            feeds = {
                "sample": narrow(guided_batch(latent, case.guided), self._dtype),
                "timestep": np.full(case.batch, table.t[row], np.float32),
                "encoder_hidden_states": context,
            }
            with clock.stage("unet"):
                prediction = nets["unet_whole"](feeds)["out_sample"]
            return guide(prediction, case.guidance_scale, 0.0, case.guided)

        *_, last = clock.timed("update", denoise(table, noise, predict, table.init * start))
        with clock.stage("vae_decoder"):
            return nets["vae_decoder"]({"latent": narrow(last.latent, self._dtype)})["image"]
