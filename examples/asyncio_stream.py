"""Draw with asyncio: steps arrive while other tasks run, and leaving the loop stops the picture.

python examples/asyncio_stream.py "a red circle on a blue background" "a green square on a white background"
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING

import latentrt

if TYPE_CHECKING:
    from PIL.Image import Image


async def draw(pipe: latentrt.Pipeline, prompt: str, *, seed: int, steps: int = 20) -> Image:
    """The finished picture. Cancelling the task stops it within a step."""
    # aclosing: without it, a loop that is left early would end only when the generator is collected.
    async with aclosing(
        pipe.stream_async(prompt, seed=seed, num_inference_steps=steps, timeout=300)
    ) as stream:
        async for step in stream:
            print(f"{prompt}: {step.index + 1} of {step.total}")
            if step.index + 1 == step.total:
                # Decoding takes as long as a few steps, so it must not hold up the event loop.
                return (await asyncio.to_thread(step.preview))[0]
    raise AssertionError("a stream ends with its last step")


async def main(prompts: list[str]) -> None:
    """Draw each prompt, one beside the other."""
    with latentrt.Pipeline.open("demo") as pipe:
        pictures = await asyncio.gather(*(draw(pipe, prompt, seed=n) for n, prompt in enumerate(prompts)))
    for number, picture in enumerate(pictures):
        picture.save(f"asyncio-{number}.png")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
