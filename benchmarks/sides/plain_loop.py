"""The loop that a user writes around exported graphs: the UNet as it is, everything between nets in NumPy.

Nothing is hoisted out of the UNet and nothing is lowered; the sampler's table and guidance are latentrt's
own, so that whatever differs from ours is the engine's doing and the graph's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from ...engines.package import Manifest, Package
from ...engines.spec import DTYPES, Array
from ...runtime.loop import guidance
from ...runtime.loop.clock import Clock
from ...runtime.loop.denoise import denoise, narrow
from ...runtime.prompts.tokenizer import ClipTokenizer
from ..case import Case, net_inputs, whole_inputs
from .contract import Prepared, not_available
from .ours import Work, schedule_of

PLAIN_NETS = ("text_encoder", "unet_whole", "vae_decoder")
Net = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # inputs by name -> outputs by name
OpenNet = Callable[[str, Case], Net]  # of PLAIN_NETS, for the shapes of a case


def check_drawable(name: str, manifest: Manifest) -> None:
    """Raise NotAvailableError for a model that is told more than a prompt: these loops do not know how."""
    if manifest.vectors or manifest.image_latents:
        raise not_available(name, "picture")


class PlainSide:
    """Nets of an engine on the host, and the loop around them.

    Args:
        name: of the side, for errors.
        package: the graphs are from.
        open_net: gives a net, callable with arrays; what it returns must stay as it is at the next call.
        versions: of the engine, and what was set.
        resources: what is freed at the end.
    """

    def __init__(
        self,
        name: str,
        package: Package,
        open_net: OpenNet,
        versions: Mapping[str, str],
        resources: ExitStack,
    ) -> None:
        self._name, self._package, self._open_net = name, package, open_net
        self._versions, self._resources = versions, resources
        self._tokenizer = ClipTokenizer.open(package.root / "tokenizer")
        self._dtype = DTYPES[package.manifest.nets["unet_whole"].spec.inputs[0].dtype]

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the engine, and what was set."""
        return self._versions

    def memory(self) -> Mapping[str, Any]:
        """Nothing: the engine does not say."""
        return {}

    def close(self) -> None:
        """Free the nets. May be called twice."""
        self._resources.close()

    def prepare(self, workload: str, case: Case) -> Prepared:
        """Raises NotAvailableError."""
        makers = {
            "text_encoder": self._text_encoder,
            "unet": self._unet,
            "vae_decoder": self._vae_decoder,
            "picture": self._picture,
        }
        if workload not in makers:
            raise not_available(self._name, workload)
        return makers[workload](case)

    def _inputs(self, workload: str, case: Case) -> dict[str, Array]:
        return net_inputs(workload, case, self._package.manifest, self._tokenizer)

    def _text_encoder(self, case: Case) -> Work:
        inputs, net = self._inputs("text_encoder", case), self._open_net("text_encoder", case)
        return Work(call=lambda: net(inputs))

    def _unet(self, case: Case) -> Work:
        feeds = whole_inputs(case, self._package.manifest, self._inputs("unet", case))
        for name in ("sample", "encoder_hidden_states"):  # the others stay float32
            feeds[name] = narrow(feeds[name], self._dtype)
        net = self._open_net("unet_whole", case)
        return Work(call=lambda: {"prediction": net(feeds)["out_sample"]})

    def _vae_decoder(self, case: Case) -> Work:
        feeds = {"latent": narrow(self._inputs("vae_decoder", case)["latent"], self._dtype)}
        net = self._open_net("vae_decoder", case)
        return Work(call=lambda: {"image": net(feeds)["image"]})

    def _picture(self, case: Case) -> Work:
        check_drawable(self._name, self._package.manifest)
        seconds: dict[str, float] = {}
        nets = {name: self._open_net(name, case) for name in PLAIN_NETS}

        def call() -> Mapping[str, Array]:
            clock = Clock()
            image = self._draw(case, nets, clock)
            seconds.clear()
            seconds.update(clock.seconds)
            return {"image": image}

        return Work(call=call, told=lambda: {"stages_s": dict(seconds)})

    def _draw(self, case: Case, nets: Mapping[str, Net], clock: Clock) -> Array:
        """Prompt to (N, H, W, 3) uint8."""
        table, noise = schedule_of(case, self._package.manifest)
        start = noise()
        with clock.stage("text_encoder"):
            context = nets["text_encoder"](self._inputs("text_encoder", case))["context"]  # (P, T, D)
            context = np.repeat(context, case.pictures, axis=0)  # (B, T, D)

        def predict(latent: Array, row: int) -> Array:
            feeds = {
                "sample": narrow(guidance.batch(latent, case.guided), self._dtype),
                "timestep": np.full(case.batch, table.t[row], np.float32),
                "encoder_hidden_states": context,
            }
            with clock.stage("unet"):
                prediction = nets["unet_whole"](feeds)["out_sample"]
            return guidance.combine(prediction, case.guidance_scale, 0.0, case.guided)

        *_, last = clock.timed("update", denoise(table, noise, predict, table.init * start))
        with clock.stage("vae_decoder"):
            return nets["vae_decoder"]({"latent": narrow(last.latent, self._dtype)})["image"]
