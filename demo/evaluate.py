"""Does the demo model do what it is told? `python -m latentrt.demo.evaluate`.

Draws every held-out prompt (combinations that training never saw) with latentrt's own runtime, lets the
checker read the pictures back, and writes `accuracy.json` and a grid of pictures. The seed of a prompt is its
place in the list.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..runtime import Pipeline
from .checker import Score, score
from .shapes import SIZES, Scene, generator, held_out_scenes

FOLDER = Path(__file__).resolve().parent
GUIDANCES = (1.0, 2.0, 4.0, 7.5)
SAMPLERS = ("ddim", "euler_a", "unipc", "dpmpp_2m_sde")

# Defaults were chosen while looking at seeds 0 to 209; these were never looked at before.
OTHER_SEEDS = 1000

_BATCH = 10
_GRID = (6, 10)

Pictures = list[npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    sampler: str
    guidance_scale: float
    num_inference_steps: int


def draw(
    pipe: Pipeline, scenes: list[Scene], setting: Setting, first_seed: int = 0, **further: Any
) -> Pictures:
    """One (128, 128, 3) uint8 picture for each scene, with seeds counting up."""
    pictures: Pictures = []
    for first in range(0, len(scenes), _BATCH):
        part = scenes[first : first + _BATCH]
        result = pipe(
            [scene.prompt() for scene in part],
            seed=first_seed + first,
            height=128,
            width=128,
            output_type="np",
            **asdict(setting),
            **further,
        )
        pictures += list(result.images)
    return pictures


def measure(
    pipe: Pipeline, scenes: list[Scene], setting: Setting, first_seed: int = 0
) -> tuple[dict[str, Any], Pictures]:
    """One row of the table, and its pictures."""
    started = time.perf_counter()
    pictures = draw(pipe, scenes, setting, first_seed)
    seconds = (time.perf_counter() - started) / len(scenes)
    found = score(pictures, scenes)
    row: dict[str, Any] = {**asdict(setting), **asdict(found), "seconds_per_picture": round(seconds, 3)}
    print(as_line(setting, found), flush=True)
    return row, pictures


def as_line(setting: Setting, found: Score) -> str:
    """A Markdown row: sampler, guidance, steps, and percentages."""
    counts = (found.background, found.colour, found.size, found.shape, found.semantic, found.strict)
    percents = (f"{100 * count / found.count:.1f}" for count in counts)
    head = (setting.sampler, f"{setting.guidance_scale:g}", str(setting.num_inference_steps))
    return "| " + " | ".join((*head, *percents)) + " |"


def by_size(pictures: Pictures, scenes: list[Scene]) -> dict[str, dict[str, int]]:
    """The same counts for each size alone."""
    parts = {size: [i for i, scene in enumerate(scenes) if scene.size == size] for size in SIZES}
    return {
        size: asdict(score([pictures[i] for i in chosen], [scenes[i] for i in chosen]))
        for size, chosen in parts.items()
    }


def save_grid(pictures: Pictures, file: Path) -> None:
    """A random sample of the pictures, unchosen, as one PNG."""
    rows, columns = _GRID
    chosen = generator("grid").sample(range(len(pictures)), rows * columns)
    lines = [
        np.concatenate([pictures[i] for i in chosen[row * columns : (row + 1) * columns]], axis=1)
        for row in range(rows)
    ]
    Image.fromarray(np.concatenate(lines, axis=0)).save(file, optimize=True)


def evaluate(pipe: Pipeline, scenes: list[Scene], out: Path, samplers: list[str]) -> None:
    """Print the table and write accuracy.json and grid.png."""
    defaults = pipe.package.manifest.defaults
    steps, guidance = defaults.num_inference_steps, defaults.guidance_scale
    sampler = defaults.sampler or "ddim"
    print("| sampler | guidance | steps | background | colour | size | shape | semantic | strict |")
    print("|" + "---|" * 9)
    settings = [Setting(sampler, guidance, steps)]
    recommended, pictures = measure(pipe, scenes, settings[0])
    settings += [Setting(sampler, value, steps) for value in GUIDANCES if value != guidance]
    settings += [Setting(name, guidance, steps) for name in samplers if name != sampler]
    settings.append(Setting(sampler, guidance, 10))
    rows = [recommended, *(measure(pipe, scenes, setting)[0] for setting in settings[1:])]
    # Pictures against the next picture's prompt: what a blind model would score.
    shuffled = asdict(score(pictures, scenes[1:] + scenes[:1]))
    result = {
        "prompts": len(scenes),
        "backend": pipe.backend,
        "rows": rows,
        "recommended_by_size": by_size(pictures, scenes),
        "shuffled_prompts": shuffled,
        "recommended_other_seeds": measure(pipe, scenes, settings[0], OTHER_SEEDS)[0],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    save_grid(pictures, out / "grid.png")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="the shipped model's name, or a package folder")
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS))
    parser.add_argument("--prompts", type=int, help="only the first N prompts, for a quick look")
    arguments = parser.parse_args()
    with Pipeline.open(arguments.model) as pipe:
        evaluate(pipe, held_out_scenes()[: arguments.prompts], arguments.out, arguments.samplers)


if __name__ == "__main__":
    main()
