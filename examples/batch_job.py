r"""Prompts from a file to pictures in a folder; a job that was killed goes on where it stopped.

printf 'prompt,seed\na red circle on a blue background,1\na green square on a white background,2\n' > jobs.csv
python examples/batch_job.py jobs.csv pictures

A line of a CSV file (with a header) or a JSONL file has `prompt` and whatever else `Pipeline` takes. Every
line gets an entry in manifest.jsonl: its picture, or its error. A picture is written whole or not at all,
under a name that follows from its line, and says itself how it was made: so the folder shows what is done,
and nothing else must be kept.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

import latentrt


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The parameters of each line. A CSV cell is read as JSON where it is JSON; an empty one is left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            yield from (json.loads(line) for line in file if line.strip())
            return
        for row in csv.DictReader(file):
            yield {
                name: cell if name.endswith("prompt") else _value(cell) for name, cell in row.items() if cell
            }


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def picture_name(number: int, parameters: dict[str, Any]) -> str:
    """Another line at the same place is another picture."""
    content = json.dumps(parameters, sort_keys=True).encode()
    return f"{number:05d}-{hashlib.sha256(content).hexdigest()[:8]}.png"


def run(jobs: Path, folder: Path, model: str = "demo") -> int:
    """Draw what is not there yet; how many lines failed."""
    lines = list(read_lines(jobs))  # a file that cannot be read ends it before anything is drawn
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    manifest = folder / "manifest.jsonl"
    # A second job on this folder would draw the same lines. The lock of a killed process is free.
    with FileLock(folder / ".lock", timeout=0), latentrt.Pipeline.open(model) as pipe:
        for stray in folder.glob(".latentrt-*.tmp"):  # a picture that was being written when it was killed
            stray.unlink()
        with manifest.with_suffix(".new").open("w", encoding="utf-8") as entries:
            for number, parameters in enumerate(lines, start=1):
                entry = {"line": number, **_draw(pipe, number, parameters, folder)}
                failed += "error" in entry
                print(json.dumps(entry), file=entries, flush=True)
        os.replace(entries.name, manifest)
    return failed


def _draw(pipe: latentrt.Pipeline, number: int, parameters: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / picture_name(number, parameters)
    if not path.exists():
        try:
            # The seed is fixed before the picture is drawn, so that another run of the job draws the same.
            chosen: dict[str, Any] = {"seed": number, **parameters}
            pipe(output_type="pil", **chosen).save(path)
        except (latentrt.UsageError, TypeError) as error:  # of this line; other errors would end every line
            print(f"line {number}: {error}", file=sys.stderr)
            return {"error": str(error)}
        print(path, flush=True)
    record = latentrt.read_metadata(path).record or {}
    return {"picture": path.name, "prompt": record["prompt"], "seed": record["seed"]}


if __name__ == "__main__":
    raise SystemExit(1 if run(Path(sys.argv[1]), Path(sys.argv[2])) else 0)
