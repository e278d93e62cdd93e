"""A pipeline over tiny models that opens tiny controls: of architectures that no template ships for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.engines.package import Package
from latentrt.export.architectures import Architecture
from latentrt.runtime import Pipeline
from tests.parity_pair import Pair
from tests.traced_graphs import make_archive

SEEN = 40.0  # dB: a picture that is as far from another is another one


def steerable(plain: Pipeline, architectures: Mapping[str, Architecture], folder: Path) -> Pipeline:
    """The same pipeline, which opens controls of these architectures; templates and cache are in `folder`."""
    archive = folder / "controls.zip"
    make_archive(archive, architectures, dtypes=["fp32"])

    def opened(path: Path, image_encoder: Path | None) -> Package:
        reads = BACKENDS["onnxruntime"].reads
        options = Options(dtype="fp32", reads=reads, templates=archive, image_encoder=image_encoder)
        return open_control(path, options, store=folder / "cache")

    return Pipeline.over(plain.package, plain.loop, plain.backend, open_control=opened)


def controlnet(unet: Any, scale: int, seed: int) -> Any:
    """One of the UNet's weights, its own layers random: those of a new one are zeros at its outputs.

    Of an inpainting model's UNet it is one for the latent alone, of random weights.
    """
    torch.manual_seed(seed)
    if unet.config.in_channels != unet.config.out_channels:
        unet = type(unet).from_config({**unet.config, "in_channels": unet.config.out_channels})
    widths = (8, 12, 16, 20)[: scale.bit_length()]
    net: Any = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(0, 0.2)
        net.controlnet_cond_embedding.conv_out.weight.mul_(50)  # so that another hint is another picture
    return net.eval()


class Steered(Pair):
    """A model with two ControlNets, here and in diffusers."""

    def __init__(self, folder: Path, made: Path, backend: str = "auto") -> None:
        super().__init__(folder, backend)
        self.made, unet = made, self._unet()
        self.nets = [controlnet(unet, self.ours.package.manifest.latent_scale, seed) for seed in (1, 2)]
        for number, net in enumerate(self.nets):
            net.save_pretrained(made / f"control{number}")
        config = {name: value for name, value in self.nets[0].config.items() if not name.startswith("_")}
        self.ours = steerable(self.ours, {"control": Architecture(parts={"controlnet": config})}, made)
        self.names = [self.ours.load_control(made / f"control{number}") for number in (0, 1)]

    def steered(self, kind: str, count: int = 1) -> Any:
        """The diffusers pipeline of that class with the first of the ControlNets."""
        if (kind, count) not in self._references:
            unsafe = {"safety_checker": None, "requires_safety_checker": False}
            pipe = getattr(diffusers, kind).from_pretrained(
                self.checkpoint,
                dtype=torch.float32,
                unet=self._unet(),
                controlnet=self.nets[0] if count == 1 else self.nets[:count],
                **({} if "XL" in kind else unsafe),
            )
            pipe.set_progress_bar_config(disable=True)
            self._references[kind, count] = pipe
        return self._references[kind, count]
