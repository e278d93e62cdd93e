"""An application as a stranger writes it, for type checkers: strict, and without an error."""

import asyncio
import io
from contextlib import aclosing, closing
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.Image import Image

import latentrt


def pictures(pipe: latentrt.Pipeline, prompts: list[str]) -> list[Image]:
    result = pipe(prompts, seed=[1, 2], sampler="Euler a", rng="torch-cuda", guidance_scale=4, timeout=60.0)
    return result.images


def one(pipe: latentrt.Pipeline, size: tuple[int, int]) -> Image:
    settings: latentrt.Parameters = {"num_inference_steps": 4, "height": size[0], "width": size[1]}
    return pipe("a red circle", output_type="pil", **settings).images[0]


def arrays(pipe: latentrt.Pipeline) -> tuple[int, ...]:
    pixels = pipe("a red circle", output_type="np", seed=1).images
    shades: npt.NDArray[np.float32] = pipe("a red circle", output_type="float").images
    latent = pipe("a red circle", output_type="latent", denoising_end=0.5).images
    pipe("a red circle", image=latent, denoising_start=0.5)
    pipe("a red circle", image=Path("start.png"), mask_image=pixels[0, :, :, 0], strength=0.5)
    return pixels.shape + shades.shape


def look(
    pipe: latentrt.Pipeline, index: int, timestep: float, values: dict[str, Any]
) -> dict[str, Any] | None:
    step: latentrt.Step = values["step"]
    step.preview("fast")[0].save("so-far.png")
    return {"latents": step.latent * 0.5} if step.index == 0 else None


def first_steps(pipe: latentrt.Pipeline, cancel: Event) -> float:
    with closing(pipe.stream("a red circle", seed=1, cancel=cancel)) as steps:
        for step in steps:
            if step.index + 1 == step.total // 2:
                return step.timestep
    return 0.0


async def first_step(pipe: latentrt.Pipeline) -> npt.NDArray[np.float32]:
    async with aclosing(pipe.stream_async("a red circle", seed=1)) as steps:
        async for step in steps:
            return step.denoised
    raise LookupError


def files(pipe: latentrt.Pipeline, path: Path) -> bytes:
    result = pipe("a red circle", callback_on_step_end=look)
    result.save(path)
    result.save(io.BytesIO(), format="JPEG", quality=80, metadata=False)
    seconds: float = sum(result.seconds.values())
    print(result.record()["seed"], result.infotext(0), result.request.seeds, seconds)
    metadata: latentrt.PictureMetadata = latentrt.read_metadata(path)
    if metadata.parameters is not None:
        print(latentrt.parse_infotext(metadata.parameters)["prompt"].title())
    again: latentrt.Result[Any] = latentrt.redraw(pipe, path, seed=2)
    return again.to_bytes("WEBP", quality=80)


def main() -> int:
    package = latentrt.Package.open(Path("package"))
    package.verify(["manifest.json"])
    print(
        latentrt.__version__,
        package.manifest.name,
        package.path("manifest.json").name,
        list(latentrt.SAMPLERS),
    )
    try:
        with latentrt.Pipeline.open("demo", backend="auto", threads=2) as pipe:
            pipe.warmup(height=64, width=64)
            asyncio.run(first_step(pipe))
            print(latentrt.refine(pipe, pipe, "a red circle", at=0.5).seconds)
    except latentrt.MemoryLimitError as error:
        print(error.culprit or "")
    except latentrt.LatentrtError as error:
        print(error.found.upper(), error.expected.upper(), error.fix.upper())
        return error.exit_code
    latentrt.export_package(Path("checkpoint"), Path("package"), dtype="fp32")
    return 0
