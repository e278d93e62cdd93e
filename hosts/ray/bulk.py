"""Prompts of a file become pictures, drawn by the workers of a Ray cluster.

    python -m latentrt.hosts.ray.bulk prompts.jsonl -o pictures --model FILE --workers 8 --num-gpus 1

A row has a `prompt` and perhaps parameters of `Pipeline`. A picture's name is a hash of the model and of the
request, and the same request draws the same bytes: what a worker that died had begun is drawn again, what is
there is not, and each picture is there once. Without a seed the request's own hash is one.

Source: `ray.data.Dataset.map_batches`, Ray 2.60.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...engines import errors
from ...engines.errors import LatentrtError, StorageError, UsageError
from ...runtime.model import check_model, check_opening
from ...runtime.request.parameters import check_integer
from .rows import read_rows

MANIFEST, FAILURES = "manifest.jsonl", "failures.jsonl"
BATCH = 8  # requests that share steps, and what is drawn again where a worker dies


class Draw:
    """A worker: it opens the model once, and draws batches of requests side by side."""

    def __init__(self, model: str, out: str, options: Mapping[str, Any]) -> None:
        from ...runtime.pipeline import Pipeline

        self._out = Path(out)
        self._broken: LatentrtError | None = None
        try:
            self._pipe = Pipeline.open(model, **options)
        except LatentrtError as error:  # Ray would make its text of it
            self._broken = error

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """A column of requests -> a column of what became of each, as JSON; or why the run is over."""
        rows: list[dict[str, Any]] = [json.loads(row) for row in batch["row"]]
        try:
            if self._broken is not None:
                raise self._broken
            told = self._drawn(rows)
        except LatentrtError as error:
            kind = next(one.__name__ for one in type(error).__mro__ if hasattr(errors, one.__name__))
            why = {name: getattr(error, name) for name in ("found", "expected", "fix")}
            return {"result": [json.dumps({"status": "over", "type": kind, "why": why})]}
        return {"result": [json.dumps({**row, **what}) for row, what in zip(rows, told, strict=True)]}

    def _drawn(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        requests = [self._request(row) for row in rows]
        told: dict[int, dict[str, Any]] = {
            number: {"path": name, "status": "kept"}
            for number, (name, _) in enumerate(requests)
            if (self._out / name).exists()
        }
        left = [number for number in range(len(rows)) if number not in told]
        for place, item in self._pipe.stream_many(requests[number][1] for number in left):
            if not isinstance(item, Exception) and not hasattr(item, "images"):
                continue  # a step
            number = left[place]
            told[number] = self._kept(requests[number][0], item)
        return [told[number] for number in range(len(rows))]

    def _request(self, row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        name = name_of(self._pipe.package.manifest.sha256, row)
        seed = int(name[:8], 16) if row.get("seed", -1) == -1 else row["seed"]
        return f"{name[:2]}/{name}.png", {**row, "seed": seed, "output_type": "pil"}

    def _kept(self, name: str, item: Any) -> dict[str, Any]:
        if isinstance(item, Exception):
            return failure(item)
        path = self._out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        item.save(path)  # whole, or not there
        return {"path": name, "status": "drawn"}


def name_of(model: str, row: Mapping[str, Any]) -> str:
    """The hash of a model's hash and a request, whatever the order of its fields."""
    text = json.dumps([model, dict(row)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def failure(error: Exception) -> dict[str, Any]:
    """Why a request has no picture. A full disk ends the run: every other one would fail too."""
    if isinstance(error, StorageError):
        raise error
    kind = type(error).__name__
    return {
        "status": "failed",
        "error": str(error) if isinstance(error, LatentrtError) else kind,
        "type": kind,
    }


def draw_all(
    source: Path,
    out: Path,
    *,
    model: str = "demo",
    workers: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    device: str = "auto",
    backend: str = "auto",
    loras: Path | None = None,
) -> dict[str, Any]:
    """Draw every row of a file; how many were drawn, kept, failed and repeated, and how fast.

    Args:
        source: rows as JSON lines, CSV or Parquet.
        out: a folder that all workers see. Its `manifest.jsonl` and `failures.jsonl` are written at the end.
        model: as `Pipeline.open` takes it.
        workers: processes, each with so many CPUs and GPUs.
        device, backend, loras: as `Pipeline.open` takes them.

    Raises:
        UsageError: a file that cannot be read, or has columns that no request has.
        LatentrtError: as `Pipeline.open`, or a full disk.
    """
    began, out = time.monotonic(), out.absolute()
    rows = read_rows(source)
    options = {"device": device, "backend": backend, "loras": loras}
    _check(out, model, workers, options)
    out.mkdir(parents=True, exist_ok=True)
    told = [{**row, **failure(why)} for row, why in rows.refused]
    if rows.asked:
        told += _by_workers(rows.asked, (model, str(out), options), workers, num_cpus, num_gpus)
    seconds = time.monotonic() - began
    _write(out / MANIFEST, (row for row in told if row["status"] != "failed"))
    _write(out / FAILURES, (row for row in told if row["status"] == "failed"))
    counts = {status: sum(row["status"] == status for row in told) for status in ("drawn", "kept", "failed")}
    speed = {"seconds": seconds, "pictures_per_second": counts["drawn"] / seconds}
    return {**counts, "repeated": rows.repeated, **speed}


def _check(out: Path, model: str, workers: int, options: Mapping[str, Any]) -> None:
    """Raise, before Ray starts anything, what every worker would end with."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is no folder", expected="a folder for pictures", fix="Choose another one.")
    check_integer("workers", workers, 1, 1_000_000)
    check_opening(**options)
    check_model(model)


def _by_workers(
    rows: Sequence[Mapping[str, Any]], arguments: tuple[Any, ...], workers: int, cpus: float, gpus: float
) -> Iterator[dict[str, Any]]:
    """What became of each request. Raises the error that a worker's run is over with."""
    data: Any = import_module("ray.data")
    batches = data.from_items(
        [{"row": json.dumps(row)} for row in rows], override_num_blocks=math.ceil(len(rows) / BATCH)
    )
    results = batches.map_batches(
        Draw,
        fn_constructor_args=arguments,
        batch_size=BATCH,
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=-1,
    )
    for row in results.iter_rows():
        told = json.loads(row["result"])
        if told["status"] == "over":
            raise getattr(errors, told["type"])(**told["why"])
        yield told


def _write(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    """Lines in an order that does not depend on who was first."""
    lines = sorted(
        json.dumps({**row, "status": "failed" if row["status"] == "failed" else "there"}) for row in rows
    )
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    unfinished.replace(path)


def main(words: Sequence[str] | None = None) -> int:
    """The command; 1 where a request has failed."""
    parser = argparse.ArgumentParser(prog="python -m latentrt.hosts.ray.bulk", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", "-m", default="demo")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--num-cpus", type=float, default=1.0)
    parser.add_argument("--num-gpus", type=float, default=0.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--loras", type=Path)
    given = vars(parser.parse_args(words))
    try:
        done = draw_all(given.pop("source"), given.pop("out"), **given)
    except LatentrtError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on\n")
        return 130
    except Exception as error:  # Ray's, with the traceback of a worker in its text
        sys.stderr.write(f"error: {str(error).strip().splitlines()[-1]}\n")
        return 1
    sys.stdout.write(
        f"{done['drawn']} drawn, {done['kept']} there before, {done['failed']} failed,"
        f" {done['repeated']} repeated;"
        f" {done['pictures_per_second']:.2f} pictures a second\n"
    )
    return 1 if done["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
