"""What does the demo's IP-Adapter draw of a picture? `python -m latentrt.demo.evaluate_ip_adapter`.

Draws with diffusers (the extra `[export]`): pictures of held-out combinations are the prompts, alone or
beside a sentence that says another shape. The checker judges; `ip_adapter.json` and a sheet are written. The
seed of a picture is its place in the list.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from . import shapes
from .checker import check
from .evaluate import FOLDER, Pictures
from .evaluate_adapters import save_sheet
from .likeness import SEEN, Asked, alone, another_shape, asked, with_shape
from .model import RECOMMENDED
from .shapes import Scene
from .train_ip_adapter import WEIGHTS

COUNT = 100

_SHEET = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: how many pictures have each field of the scene, and all but the size."""

    drawn_with: str
    count: int
    colour: int
    shape: int
    background: int
    size: int
    obeyed: int


def opened(adapter: Path) -> StableDiffusionPipeline:
    """Diffusers' pipeline of the demo, with an IP-Adapter."""
    pipe = StableDiffusionPipeline.from_pretrained(
        FOLDER / "checkpoint", torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipe.load_ip_adapter(str(adapter), subfolder="", weight_name=WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shown(requests: Sequence[Asked]) -> Pictures:
    """The pictures that are the prompts."""
    return [shapes.render(one.shown, shapes.generator(f"shown {i}")) for i, one in enumerate(requests)]


def draw(pipe: Any, requests: Sequence[Asked], scale: float = 1.0) -> Pictures:
    """One (128, 128, 3) uint8 picture for each."""
    pipe.set_ip_adapter_scale(scale)
    settings = {name: value for name, value in RECOMMENDED.items() if name != "sampler"}
    pictures: Pictures = []
    # One by one: diffusers gives every prompt of a list the same picture.
    for seed, (one, picture) in enumerate(zip(requests, shown(requests), strict=True)):
        drawn = pipe(
            one.prompt,
            ip_adapter_image=picture,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **settings,
        )
        pictures.append(np.rint(255 * drawn.images[0]).astype(np.uint8))
    return pictures


def judge(drawn_with: str, pictures: Pictures, requests: Sequence[Asked]) -> Row:
    """What the checker finds in pictures of what was asked for."""
    pairs = list(zip(map(check, pictures), requests, strict=True))
    right = {
        name: sum(getattr(verdict, name) == getattr(one.wanted, name) for verdict, one in pairs)
        for name in SEEN
    }
    obeyed = sum(one.obeyed(verdict) for verdict, one in pairs)
    row = Row(drawn_with=drawn_with, count=len(pairs), obeyed=obeyed, **right)
    print("| " + " | ".join(f"{value}" for value in asdict(row).values()) + " |", flush=True)
    return row


def in_words(scenes: list[Scene]) -> list[Asked]:
    """Each picture with a sentence that says another shape."""
    rng, every = shapes.generator("shapes in words"), set(shapes.combos())
    return [with_shape(scene, another_shape(scene, rng, every).shape) for scene in scenes]


def evaluate(pipe: Any, count: int) -> tuple[list[Row], list[Pictures]]:
    """All rows of the table, and the pictures for the sheet."""
    pictured, worded = [alone(scene) for scene in asked(count)], in_words(asked(count))
    rows: list[Row] = []
    sheet: list[Pictures] = [shown(pictured)]
    for name, requests, scale in (
        ("picture", pictured, 1.0),
        ("picture, and a sentence with a shape", worded, 1.0),
        ("neither picture nor sentence", pictured, 0.0),
        ("sentence with a shape", worded, 0.0),
    ):
        pictures = draw(pipe, requests, scale)
        rows.append(judge(name, pictures, requests))
        sheet.append(pictures)
        if scale:  # against what the next one asks for
            rows.append(judge(f"{name}, shuffled", pictures, [*requests[1:], requests[0]]))
    return rows, sheet


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--adapter", type=Path, default=FOLDER / "controls" / "likeness")
    parser.add_argument("--count", type=int, default=COUNT, help="pictures a row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # two would wait for each other whenever something else runs
    print("| drawn with | pictures | colour | shape | background | size | obeyed |\n" + "|---" * 7 + "|")
    rows, sheet = evaluate(opened(arguments.adapter), arguments.count)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"drawn_by": "diffusers", "rows": [asdict(row) for row in rows]}
    (arguments.out / "ip_adapter.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    save_sheet([pictures[:_SHEET] for pictures in sheet], arguments.out / "ip_adapter.png")


if __name__ == "__main__":
    main()
