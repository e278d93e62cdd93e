"""The options of `latentrt generate`. Those that share a parameter's name are handed on as that parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option


def _numbers(text: str, separator: str) -> list[int]:
    parts = text.split(separator)
    if not all(part.strip().lstrip("-").isdigit() for part in parts):
        raise ValueError(text)
    return [int(part) for part in parts]


def read_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT -> (height, width)."""
    width, height = _numbers(text, "x")
    return height, width


def read_offset(text: str) -> tuple[int, int]:
    """LEFT,TOP -> (top, left)."""
    left, top = _numbers(text, ",")
    return top, left


def read_seeds(text: str) -> int | list[int]:
    """One number, or one for every picture with commas between."""
    found = _numbers(text, ",")
    return found[0] if len(found) == 1 else found


def read_latents(text: str) -> Any:
    """An array that NumPy saved; a pickle is not read."""
    from math import prod

    import numpy as np

    try:
        with open(text, "rb") as stream:
            versions = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, _, dtype = versions[np.lib.format.read_magic(stream)](stream)
            left = Path(text).stat().st_size - stream.tell()
        if dtype.hasobject or prod(shape) * dtype.itemsize != left:
            raise ValueError(f"{left} bytes for {dtype} {shape}")
        return np.load(text, allow_pickle=False)
    except Exception as error:  # the header is Python, and its reader raises whatever that may raise
        raise ValueError(str(error)) from error


def read_image(text: str) -> Any:
    """A picture's path as it is, or latents."""
    return read_latents(text) if text.endswith(".npy") else text


Prompts = Annotated[list[str], Argument(help="What to draw; several prompts are one batch.")]
Output = Annotated[
    Path | None,
    Option(
        "--output",
        "-o",
        help="File to write (.png, .jpg, .webp; .npy for the latents). Default: prompt and seed.",
    ),
]
Model = Annotated[str, Option("--model", "-m", help="The shipped model `demo`, or a package folder.")]
NegativePrompt = Annotated[str | None, Option("--negative-prompt", "-n", help="What to avoid.")]
Prompt2 = Annotated[
    str | None, Option("--prompt-2", help="For the second text encoder. Default: the prompt.")
]
NegativePrompt2 = Annotated[str | None, Option("--negative-prompt-2", help="Likewise.")]
PromptSyntax = Annotated[
    str | None, Option(help="How prompts are weighted: a1111 (the default), comfyui, plain.")
]
ClipSkip = Annotated[int | None, Option(help="Leave out so many of the text encoder's last layers.")]
Height = Annotated[
    int | None, Option("--height", "-H", help="Pixels. Default: the picture's or the model's.")
]
Width = Annotated[int | None, Option("--width", "-W", help="Pixels. Default: the picture's or the model's.")]
Steps = Annotated[int | None, Option("--steps", help="Number of inference steps. Default: the model's.")]
GuidanceScale = Annotated[
    float | None, Option("--guidance-scale", "--cfg-scale", help="1 or less is off. Default: the model's.")
]
GuidanceRescale = Annotated[float | None, Option(help="0 (off) to 1, against overexposure.")]
Sampler = Annotated[
    str | None, Option("--sampler", help="`latentrt inspect --samplers` lists them. Default: the model's.")
]
Eta = Annotated[float | None, Option(help="DDIM's noise: 0 is deterministic, 1 is DDPM.")]
Seed = Annotated[
    str | None,
    Option(
        "--seed", "-s", parser=read_seeds, metavar="N[,N…]", help="One, or one a picture. Default: random."
    ),
]
Rng = Annotated[str | None, Option(help="Whose noise the seed means: torch-cpu (default), torch-cuda.")]
Count = Annotated[
    int, Option("--count", "-b", help="Pictures to draw of every prompt, with seeds counting up.")
]
Latents = Annotated[
    str | None, Option(parser=read_latents, metavar="FILE.npy", help="Unit noise, in place of the seed's.")
]
Image = Annotated[
    str | None,
    Option("--image", "-i", parser=read_image, metavar="FILE", help="Picture to start from, or to vary."),
]
Mask = Annotated[
    str | None, Option("--mask", metavar="FILE", help="White is repainted, the rest stays as it is.")
]
Strength = Annotated[float | None, Option(help="0 to 1: how much of the schedule runs on the picture.")]
PaddingMaskCrop = Annotated[
    int | None, Option(metavar="PIXELS", help="Draw only the mask and so much around it, at full size.")
]
MaskBlur = Annotated[float | None, Option(metavar="PIXELS", help="Soften the edge of what is repainted.")]
ResizeMode = Annotated[str | None, Option(help="Of the picture: default (stretch), fill, crop.")]
NoiseLevel = Annotated[int | None, Option(help="0 to 999: how far a variation departs from its picture.")]
DenoisingStart = Annotated[
    float | None, Option(help="Go on from a latent (--image FILE.npy) at this share of the schedule.")
]
DenoisingEnd = Annotated[
    float | None, Option(help="Stop at this share of the schedule; with -o FILE.npy, for another model.")
]
Refiner = Annotated[str | None, Option(help="A second package, which ends what --model begins.")]
RefinerAt = Annotated[
    float | None, Option(help="The share of the schedule at which the refiner takes over. Default: 0.8.")
]
_SIZE: dict[str, Any] = {"parser": read_size, "metavar": "WIDTHxHEIGHT"}
_OFFSET: dict[str, Any] = {"parser": read_offset, "metavar": "LEFT,TOP"}
OriginalSize = Annotated[str | None, Option(**_SIZE, help="SDXL: the size that the picture once had.")]
Crop = Annotated[str | None, Option("--crop", **_OFFSET, help="SDXL: where it was cut off.")]
TargetSize = Annotated[str | None, Option(**_SIZE, help="SDXL: the size that it is to have.")]
NegativeOriginalSize = Annotated[str | None, Option(**_SIZE, help="SDXL: the same, to avoid.")]
NegativeCrop = Annotated[str | None, Option("--negative-crop", **_OFFSET, help="SDXL: the same, to avoid.")]
NegativeTargetSize = Annotated[str | None, Option(**_SIZE, help="SDXL: the same, to avoid.")]
AestheticScore = Annotated[float | None, Option(help="SDXL refiner: how beautiful. Default: 6.")]
NegativeAestheticScore = Annotated[float | None, Option(help="SDXL refiner: to avoid. Default: 2.5.")]
Tile = Annotated[
    int | None, Option(metavar="PIXELS", help="Encode and decode in tiles of this side, for less memory.")
]
Grid = Annotated[bool, Option("--grid", help="Write one file with all pictures side by side.")]
Preview = Annotated[
    Path | None, Option(metavar="FILE", help="Write what can be seen so far to this file, after every step.")
]
Backend = Annotated[str, Option(help="auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx.")]
Threads = Annotated[int | None, Option(help="CPU threads. Default: all.")]
NoMetadata = Annotated[bool, Option("--no-metadata", help="Leave prompt and parameters out of the file.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object.")]
