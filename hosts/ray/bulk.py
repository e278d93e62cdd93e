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
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...engines.errors import LatentrtError, StorageError, UsageError

READERS = {".jsonl": "read_json", ".json": "read_json", ".csv": "read_csv", ".parquet": "read_parquet"}
MANIFEST, FAILURES = "manifest.jsonl", "failures.jsonl"
_TEXTS = frozenset({"prompt", "negative_prompt", "prompt_2", "negative_prompt_2"})  # numbers, too
BATCH = 8  # requests that share steps, and what is drawn again where a worker dies


class Draw:
    """A worker: it opens the model once, and draws batches of requests side by side."""

    def __init__(self, model: str, out: str, options: Mapping[str, Any]) -> None:
        from ...runtime.pipeline import Pipeline

        self._pipe = Pipeline.open(model, **options)
        self._out = Path(out)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Columns of rows -> one column of what became of each, as JSON."""
        rows = rows_of(batch)
        requests = [self._request(row) for row in rows]
        told: dict[int, dict[str, Any]] = {
            number: failure(error) for number, row in enumerate(rows) if (error := odd(row)) is not None
        }
        told |= {
            number: {"path": name, "status": "kept"}
            for number, (name, _) in enumerate(requests)
            if number not in told and (self._out / name).exists()
        }
        left = [number for number in range(len(rows)) if number not in told]
        for place, item in self._pipe.stream_many(requests[number][1] for number in left):
            if not isinstance(item, Exception) and not hasattr(item, "images"):
                continue  # a step
            number = left[place]
            told[number] = self._kept(requests[number][0], item)
        return {"result": [json.dumps({**rows[number], **told[number]}) for number in range(len(rows))]}

    def _request(self, row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        name = name_of(self._pipe.package.manifest.sha256, row)
        seed = int(name[:8], 16) if row.get("seed") is None else row["seed"]
        return f"{name[:2]}/{name}.png", {**row, "seed": seed, "output_type": "pil"}

    def _kept(self, name: str, item: Any) -> dict[str, Any]:
        if isinstance(item, Exception):
            return failure(item)
        path = self._out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        unfinished.write_bytes(item.to_bytes("png"))
        unfinished.replace(path)  # whole, or not there
        return {"path": name, "status": "drawn"}


def rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of columns, without what is null in them."""
    columns = {name: list(values) for name, values in batch.items()}
    count = max((len(values) for values in columns.values()), default=0)
    rows = [{name: _plain(values[number]) for name, values in columns.items()} for number in range(count)]
    told = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return [{name: str(value) if name in _TEXTS else value for name, value in row.items()} for row in told]


def odd(row: Mapping[str, Any]) -> UsageError | None:
    """Why a row is no picture of this run; a pipeline says what else is wrong with it."""
    if "prompt" not in row:
        return UsageError("a row without a prompt", expected="the column prompt", fix="Fill it in.")
    if row.get("num_images_per_prompt", 1) != 1:
        return UsageError(
            f"num_images_per_prompt is {row['num_images_per_prompt']}",
            expected="a row for each picture",
            fix="Write as many rows, each with its seed.",
        )
    return None


def _plain(value: Any) -> Any:
    """A value of JSON; None for what a table has in place of nothing."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float) and value != value:
        return None
    return (
        int(value) if isinstance(value, float) and value.is_integer() else value
    )  # beside nothing it is a float


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
    **options: Any,
) -> dict[str, Any]:
    """Draw every row of a file; how many were drawn, kept and failed, and how fast.

    Args:
        source: rows as JSON lines, CSV or Parquet.
        out: a folder that all workers see. Its `manifest.jsonl` and `failures.jsonl` are written at the end.
        model: as `Pipeline.open` takes it.
        workers: processes, each with so many CPUs and GPUs.
        options: of `Pipeline.open`.

    Raises:
        UsageError: a file of another kind, or none.
    """
    if source.suffix not in READERS or not source.exists():
        raise UsageError(
            f"{source} is no file of rows that is there",
            expected=f"one that ends in {', '.join(READERS)}",
            fix="Check the path.",
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is no folder", expected="a folder for pictures", fix="Choose another one.")
    data: Any = import_module("ray.data")
    began, out = time.monotonic(), out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows = getattr(data, READERS[source.suffix])(str(source.absolute()))
    # Before the workers start: they may take every CPU, and reading would wait for one for ever.
    batches = rows.repartition(target_num_rows_per_block=BATCH).materialize()
    results = batches.map_batches(
        Draw,
        fn_constructor_args=(model, str(out), options),
        batch_size=BATCH,
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_restarts=-1,
        max_task_retries=-1,
    )
    told = [json.loads(row["result"]) for row in results.iter_rows()]
    seconds = time.monotonic() - began
    _write(out / MANIFEST, (row for row in told if row["status"] != "failed"))
    _write(out / FAILURES, (row for row in told if row["status"] == "failed"))
    counts = {status: sum(row["status"] == status for row in told) for status in ("drawn", "kept", "failed")}
    return {**counts, "seconds": seconds, "pictures_per_second": counts["drawn"] / seconds}


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
        f"{done['drawn']} drawn, {done['kept']} there before, {done['failed']} failed;"
        f" {done['pictures_per_second']:.2f} pictures a second\n"
    )
    return 1 if done["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
