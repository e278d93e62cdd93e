"""Do the demo's adapters teach what they should? `python -m latentrt.demo.evaluate_adapters`.

Draws held-out scenes with latentrt's own runtime, with each adapter, at half its strength and without, lets
the checker read the pictures back, and writes `adapters.json` and a sheet of pictures. The seed of a picture
is its place in the list.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ..runtime import Pipeline
from .checker import SEMANTIC_IOU, check
from .evaluate import FOLDER, Pictures, Setting, draw
from .lessons import LESSONS, LORAS, SHAPE, Lesson
from .shapes import SIZES, Scene

COUNT = 50

_SHEET = 8
_SHRUNK = 64
_COLOURS = 128  # of the sheet's palette


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: how many pictures show what is taught, and obey in everything else too."""

    drawn_with: str
    looked_for: str
    count: int
    seen: int
    semantic: int
    median_amount: float


def judge(drawn_with: str, lesson: Lesson, pictures: Pictures, scenes: list[Scene]) -> Row:
    """What the checker finds of a lesson in pictures, each (128, 128, 3) uint8."""
    verdicts = [check(picture) for picture in pictures]
    row = Row(
        drawn_with=drawn_with,
        looked_for=lesson.name,
        count=len(pictures),
        seen=sum(lesson.seen(verdict) for verdict in verdicts),
        semantic=sum(v.obeys(s, SEMANTIC_IOU) for v, s in zip(verdicts, scenes, strict=True)),
        median_amount=round(median(lesson.amount(verdict) for verdict in verdicts), 3),
    )
    print("| " + " | ".join(f"{value}" for value in asdict(row).values()) + " |", flush=True)
    return row


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Scenes to draw, with what parameters, and what is looked for in the pictures."""

    drawn_with: str
    scenes: list[Scene]
    lessons: tuple[Lesson, ...]
    parameters: dict[str, Any]


def trials(count: int) -> list[Trial]:
    """What is drawn, `count` pictures each."""
    striped, cross, shape = LESSONS["striped"], LESSONS["cross"], LESSONS[SHAPE]
    smaller = [size for size in SIZES if size not in shape.sizes]
    # With the syntax "plain" the files of a folder are no words.
    rows: list[tuple[str, list[Scene], tuple[Lesson, ...], dict[str, Any]]] = [
        *(
            (f"{name} {strength:g}", LESSONS[name].tests(count), (LESSONS[name],), _loras(strength, name))
            for name in LORAS
            for strength in (0.0, 0.5, 1.0)
        ),
        ("striped 1, cross 1", striped_scenes(cross, count), (striped, cross), _loras(1.0, *LORAS)),
        (f"no {shape.name}", shape.tests(count), (shape,), {"prompt_syntax": "plain"}),
        (shape.name, shape.tests(count), (shape,), {}),
        ("cross 1, smaller", cross.tests(count, smaller), (cross,), _loras(1.0, "cross")),
        (f"{shape.name}, smaller", shape.tests(count, smaller), (shape,), {}),
        (f"{shape.name}, striped 1", striped_scenes(shape, count), (striped, shape), _loras(1.0, "striped")),
    ]
    return [
        Trial(drawn_with=name, scenes=scenes, lessons=lessons, parameters=parameters)
        for name, scenes, lessons, parameters in rows
    ]


def _loras(strength: float, *names: str) -> dict[str, Any]:
    return {"loras": [(name, strength) for name in names]}


def run(pipe: Pipeline, trial: Trial) -> tuple[list[Row], Pictures]:
    """The rows of the table that a trial gives, and its pictures."""
    defaults = pipe.package.manifest.defaults
    setting = Setting(defaults.sampler or "ddim", defaults.guidance_scale, defaults.num_inference_steps)
    pictures = draw(pipe, trial.scenes, setting, **trial.parameters)
    return [judge(trial.drawn_with, lesson, pictures, trial.scenes) for lesson in trial.lessons], pictures


def striped_scenes(lesson: Lesson, count: int) -> list[Scene]:
    """A lesson's tests, with stripes as well."""
    return [replace(scene, texture="striped") for scene in lesson.tests(count)]


def save_sheet(rows: list[Pictures], file: Path) -> None:
    """The first pictures of each row, half as large, as one PNG with a palette."""
    whole = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0))
    smaller = whole.reduce(whole.width // (_SHEET * _SHRUNK))
    smaller.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


def write(out: Path, backend: str, done: list[tuple[list[Row], Pictures]]) -> None:
    """Write `adapters.json` and `adapters.png`."""
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "backend": backend,
        "rows": [asdict(row) for rows, _ in done for row in rows],
    }
    (out / "adapters.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    save_sheet([pictures[:_SHEET] for _, pictures in done], out / "adapters.png")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--count", type=int, default=COUNT, help="pictures a row")
    arguments = parser.parse_args()
    print("| drawn with | looked for | pictures | seen | semantic | median amount |\n" + "|---" * 6 + "|")
    with Pipeline.open("demo") as pipe:
        done = [run(pipe, trial) for trial in trials(arguments.count)]
        write(arguments.out, pipe.backend, done)


if __name__ == "__main__":
    main()
