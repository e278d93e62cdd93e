"""What do the demo's controls do? `python -m latentrt.demo.evaluate_controls`.

Draws held-out combinations at places that training never saw with latentrt's own runtime, lets the checker
judge, and writes `controls.json` and a sheet of pictures. The seed of a picture is its place in the list.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime import Pipeline
from ..runtime.controls.control import Control
from . import shapes
from .checker import Verdict, check, seen_mask
from .evaluate import FOLDER, Pictures
from .evaluate_adapters import save_sheet
from .placed import FOLLOWED_IOU, Placed, asked

COUNT = 100
EDGES = "edges"

_OTHERS = "edges 1, other drawings"
_BATCH = 10
_SHEET = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: how many pictures follow their hints, and have their colours of the prompt."""

    drawn_with: str
    count: int
    followed: int
    mean_iou: float
    colour: int
    background: int


def judge(drawn_with: str, pictures: Pictures, wanted: list[Placed]) -> Row:
    """What the checker finds in pictures, each (128, 128, 3) uint8, of what was asked for."""
    found = [one.likeness(seen_mask(picture)) for picture, one in zip(pictures, wanted, strict=True)]
    verdicts: list[tuple[Verdict, Placed]] = list(zip(map(check, pictures), wanted, strict=True))
    row = Row(
        drawn_with=drawn_with,
        count=len(pictures),
        followed=sum(iou > FOLLOWED_IOU for iou in found),
        mean_iou=round(float(np.mean(found)), 3),
        colour=sum(verdict.colour == one.scene.colour for verdict, one in verdicts),
        background=sum(verdict.background == one.scene.background for verdict, one in verdicts),
    )
    print("| " + " | ".join(f"{value}" for value in asdict(row).values()) + " |", flush=True)
    return row


def draw(pipe: Pipeline, prompts: list[str], hints: list[npt.NDArray[np.uint8]], **control: Any) -> Pictures:
    """One (128, 128, 3) uint8 picture for each prompt, after the edges of drawings if `control`."""
    pictures: Pictures = []
    for first in range(0, len(prompts), _BATCH):
        part = slice(first, first + _BATCH)
        controls = [Control(model=EDGES, image=hints[part], preparation="canny", **control)]
        result = pipe(prompts[part], seed=first, output_type="np", controls=controls if control else [])
        pictures += list(result.images)
    return pictures


def said(placed: Placed, shape: str) -> str:
    """A prompt that says another shape than the drawing."""
    return replace(placed, scene=replace(placed.scene, shape=shape)).prompt()


def next_shape(placed: Placed) -> str:
    """Another shape that the model knows."""
    return shapes.SHAPES[(shapes.SHAPES.index(placed.scene.shape) + 1) % len(shapes.SHAPES)]


def trials(count: int) -> list[tuple[str, list[str], list[Placed], dict[str, Any]]]:
    """Each row's name, prompts, what is wanted, and how strongly."""
    both = asked(2 * count)
    known, others, crosses = both[:count], both[count:], asked(count, "cross")
    prompts = [one.prompt() for one in known]
    return [
        ("edges 1", prompts, known, {"strength": 1.0}),
        # The cycles of the training were added while looking at the first ones; at these nobody looked.
        (_OTHERS, [one.prompt() for one in others], others, {"strength": 1.0}),
        (
            "edges 1, the prompt says another shape",
            [said(one, next_shape(one)) for one in known],
            known,
            {"strength": 1.0},
        ),
        # For crosses the model has no word.
        (
            "edges 1 of crosses, the prompt says square",
            [said(one, "square") for one in crosses],
            crosses,
            {"strength": 1.0},
        ),
        ("edges 0.5", prompts, known, {"strength": 0.5}),
        ("no control", prompts, known, {}),
    ]


def evaluate(pipe: Pipeline, count: int) -> tuple[list[Row], list[Pictures]]:
    """All rows of the table, and the pictures for the sheet."""
    rows: list[Row] = []
    drawn: list[Pictures] = []
    for name, prompts, wanted, control in trials(count):
        pictures = draw(pipe, prompts, [one.drawing() for one in wanted], **control)
        rows.append(judge(name, pictures, wanted))
        if name != _OTHERS:  # whose drawings are not in the sheet
            drawn.append(pictures)
        if name == "edges 1":  # against the next one's drawing: what a net that is blind would score
            rows.append(judge(f"{name}, hints shuffled", pictures, wanted[1:] + wanted[:1]))
    return rows, drawn


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--count", type=int, default=COUNT, help="pictures a row")
    parser.add_argument("--net", default=EDGES, help="the ControlNet: the shipped one, or a folder")
    arguments = parser.parse_args()
    print("| drawn with | pictures | followed | mean IoU | colour | background |\n" + "|---" * 6 + "|")
    with Pipeline.open("demo", threads=1) as pipe:
        pipe.load_control(arguments.net, EDGES)
        rows, drawn = evaluate(pipe, arguments.count)
        backend = pipe.backend
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"backend": backend, "edges": [asdict(row) for row in rows]}
    (arguments.out / "controls.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    drawings = [one.drawing() for one in asked(_SHEET)]
    save_sheet([drawings, *(pictures[:_SHEET] for pictures in drawn)], arguments.out / "controls.png")


if __name__ == "__main__":
    main()
