"""Rows of a file, each a request: JSON lines, CSV or Parquet, read with the types that parameters have.

What is wrong with a file as a whole, such as a column that no request has, is an error before anything is
drawn. What is wrong with one row is that row's own.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from ...engines.errors import UsageError
from ...runtime.request.parameters import IMAGE, PARAMETERS, SEEDS, Kind, nearest

# What a row has no form for: arrays, what is loaded beforehand, and pictures are PNG.
_FORMLESS = frozenset({"controls", "latents", "denoising_start", "output_type"})
NAMES = ("prompt", *(name for name in PARAMETERS if name not in _FORMLESS))
_EXACT = 2**53  # up to here a float is one whole number
_Row = dict[str, Any] | UsageError


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a file asks for.

    Attributes:
        asked: requests, each once, without what is empty in them.
        refused: (what is known of a row, why it is no request).
        repeated: how many rows ask for what another one has asked for.
    """

    asked: Sequence[Mapping[str, Any]]
    refused: Sequence[tuple[Mapping[str, Any], UsageError]]
    repeated: int


def read_rows(source: Path) -> Rows:
    """Read a file of rows, by the ending of its name.

    Raises:
        UsageError: no such file, one that cannot be read, or a column that no request has.
    """
    if source.suffix not in _READERS or not source.exists():
        raise UsageError(
            f"{source} is no file of rows that is there",
            expected=f"one that ends in {', '.join(_READERS)}",
            fix="Check the path.",
        )
    try:
        columns, found = _READERS[source.suffix](source)
        rows = list(found)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UsageError(
            f"{source} cannot be read: {error!s:.200}",
            expected=f"rows as {source.suffix[1:]} has them, text in UTF-8",
            fix="Write it again.",
        ) from error
    _check(columns)
    asked, refused = dict[str, Mapping[str, Any]](), list[tuple[Mapping[str, Any], UsageError]]()
    for number, given in enumerate(rows, start=1):
        row = given if isinstance(given, UsageError) else _without_nothing(given)
        why = row if isinstance(row, UsageError) else odd(row)
        if why is None:
            asked.setdefault(json.dumps(row, sort_keys=True), cast("dict[str, Any]", row))
        else:
            refused.append(({"row": number, **({} if isinstance(row, UsageError) else row)}, why))
    return Rows(asked=list(asked.values()), refused=refused, repeated=len(rows) - len(asked) - len(refused))


def odd(row: Mapping[str, Any]) -> UsageError | None:
    """Why a row is no picture of this run; a pipeline says what else is wrong with it."""
    prompt, count = row.get("prompt"), row.get("num_images_per_prompt", 1)
    if not isinstance(prompt, str):
        found = "a row without a prompt" if prompt is None else f"the prompt is {prompt!r:.80}"
        return UsageError(found, expected="a text in the column prompt", fix="Fill it in.")
    if count != 1:
        return UsageError(
            f"num_images_per_prompt is {count!r:.80}",
            expected="a row for each picture",
            fix="Write as many rows, each with its seed.",
        )
    return None


def _check(columns: Sequence[str]) -> None:
    """Raise UsageError for columns that would make every row fail."""
    for name in columns:
        if name not in NAMES or columns.count(name) > 1:
            near = nearest(name, NAMES)
            raise UsageError(
                f"a second column {name!r:.80}" if name in NAMES else f"the column {name!r:.80}",
                expected=f"{near!r}, or another parameter" if near else f"some of {', '.join(NAMES)}",
                fix=f"Rename or remove the column {name:.80}.",
            )


def _without_nothing(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it, without what is null. A column of whole numbers beside nothing has floats."""

    def plain(value: Any) -> Any:
        whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
        return int(value) if whole else value

    told = {name: plain(value) for name, value in row.items() if value is not None and value == value}
    return json.loads(json.dumps(told, default=str))


# ── kinds of files: the names that all rows have, and the rows ─────────────────────────────────────


def _json(source: Path) -> tuple[Sequence[str], Iterable[_Row]]:
    text = source.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        several: list[Any] = json.loads(text)
        rows = [_object(one) for one in several]
    else:
        rows = [_object(line) for line in text.split("\n") if line.strip()]
    objects = [row for row in rows if isinstance(row, dict)]
    shared = [name for name in objects[0] if all(name in row for row in objects)] if objects else []
    return shared, rows


def _object(given: Any) -> _Row:
    """A line of JSON, or what an array has."""
    try:
        row = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        return cast("dict[str, Any]", row)
    return UsageError(f"the row {given!r:.80}", expected='{"prompt": "…"}', fix="Write an object of JSON.")


def _csv(source: Path) -> tuple[Sequence[str], Iterable[_Row]]:
    with source.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, strict=True)) or [[]]
    if "prompt" not in rows[0]:
        raise ValueError("its first line names no column prompt")
    return rows[0], _cells(rows[0], rows[1:])


def _cells(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[_Row]:
    for row in filter(None, rows):
        if len(row) > len(header):
            yield UsageError(
                f"{len(row)} cells in {len(header)} columns: {row[0]!r:.80}",
                expected="quotes around a text with commas",
                fix='Write it so: "a, b"',
            )
            continue
        try:
            yield {name: _value(name, cell) for name, cell in zip(header, row, strict=False) if cell}
        except UsageError as error:
            yield error


def _value(name: str, cell: str) -> Any:
    """The text of a cell as the parameter's own type; as on the command line where that is more than one."""
    kind = PARAMETERS[name].kind if name in PARAMETERS else Kind()
    readers: list[Callable[[str], Any]] = [str if kind is IMAGE else kind.read or kind.text]
    if kind.text in (int, float) or kind is SEEDS:
        readers = [int, float, *readers]
    for read in readers:
        try:
            return [read(cell)] if kind.several else read(cell)
        except ValueError:
            continue
    raise UsageError(
        f"{name} is {cell!r:.80}", expected=kind.metavar or kind.text.__name__, fix=f"Change {name}."
    )


def _parquet(source: Path) -> tuple[Sequence[str], Iterable[_Row]]:
    table: Any = import_module("pyarrow.parquet").read_table(source)
    if "prompt" not in table.column_names:
        raise ValueError("it has no column prompt")
    return table.column_names, table.to_pylist()


_READERS = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet}
