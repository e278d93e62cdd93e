"""Several threads draw with one pipeline: progress, previews, and a way to stop one picture.

python examples/threads.py "a red circle on a blue background" "a green square on a white background"
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import latentrt

if TYPE_CHECKING:
    from PIL.Image import Image


class Job:
    """A picture that is being drawn. Other threads may read its attributes and call its methods.

    Attributes:
        progress: from 0 to 1.
        preview: the picture so far; None before the first step.
        result: the finished picture, or the error; `result.result()` waits for it.
    """

    def __init__(self, pool: ThreadPoolExecutor, pipe: latentrt.Pipeline, prompt: str, seed: int) -> None:
        self.progress = 0.0
        self.preview: Image | None = None
        self._pipe = pipe
        self._cancel = Event()
        self.result: Future[bytes] = pool.submit(self._draw, prompt, seed)

    def cancel(self) -> None:
        """Stop before the next step; `result` then holds a CancelledError."""
        self._cancel.set()

    def _draw(self, prompt: str, seed: int) -> bytes:
        return self._pipe(
            prompt, seed=seed, callback_on_step_end=self._look, cancel=self._cancel, timeout=300
        ).to_bytes("WEBP")

    def _look(self, pipe: latentrt.Pipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
        step: latentrt.Step = values["step"]
        self.preview = step.preview("fast")[0]
        self.progress = (step.index + 1) / step.total


def main(prompts: list[str]) -> None:
    """Draw each prompt, two at a time."""
    # One picture uses every core already: more workers share them, and take more memory.
    with latentrt.Pipeline.open("demo") as pipe, ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [Job(pool, pipe, prompt, seed) for seed, prompt in enumerate(prompts)]
        for number, job in enumerate(jobs):
            try:
                data = job.result.result()
            except latentrt.LatentrtError as error:
                print(f"{number}: {error}", file=sys.stderr)
            else:
                with open(f"threads-{number}.webp", "wb") as file:
                    file.write(data)
                print(f"threads-{number}.webp")


if __name__ == "__main__":
    main(sys.argv[1:])
