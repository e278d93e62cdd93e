"""Tables in files: what `latentrt inspect --sampler NAME --json` prints, read back and checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...engines.errors import SamplerError
from .table import COLUMNS, Table

_MOST_BYTES = 2**24  # a table of 1000 rows prints less than 0.3 MB
_MOST_ROWS = 1000
_SHARES = ("alpha_bar", "last_alpha_bar")
_FIX = "Print one with `latentrt inspect --sampler euler --steps 20 --json`, and change its numbers."


def read_table(source: Any) -> Table:
    """The table of a file; a `Table` is taken as it is.

    Raises:
        SamplerError: there is no such file, or it holds no table.
    """
    if isinstance(source, Table):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise SamplerError(f"table is {source!r:.80}", expected="a file's name, or a Table", fix=_FIX)
    path = Path(cast("str | os.PathLike[str]", source))
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _fault(path.name, f"has {path.stat().st_size} bytes", f"at most {_MOST_BYTES}")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise _fault(str(path), f"cannot be read: {error.strerror or error}", "a file of JSON") from error
    except (ValueError, RecursionError) as error:
        raise _fault(path.name, f"holds no JSON: {error}", "one object") from error
    return parse_table(values, path.name)


def parse_table(values: Any, where: str) -> Table:
    """The table of an object with the names of `Table.to_json`; `where` it lies, for errors.

    Raises:
        SamplerError: it lacks a column, has another one, or a number is none or out of range.
    """
    if not isinstance(values, dict):
        raise _fault(where, f"holds a {type(values).__name__}", "an object of columns")
    given: dict[str, Any] = {"last_alpha_bar": 1.0, **cast("dict[str, Any]", values)}
    known = {"name", "prediction_type", "init", "last_alpha_bar", *COLUMNS}
    for name in sorted(known - given.keys()):
        raise _fault(where, f"has no {name}", ", ".join(sorted(known)))
    for name in sorted(given.keys() - known):
        raise _fault(where, f"has {name[:80]!r}", f"only {', '.join(sorted(known))}")
    for name in ("name", "prediction_type"):
        if not isinstance(given[name], str) or not 0 < len(given[name]) <= 200:
            raise _fault(where, f"has {name} {given[name]!r:.80}", "a text of at most 200 characters")
    columns = {name: _numbers(name, given[name], where) for name in COLUMNS}
    ends = {name: float(_numbers(name, [given[name]], where)[0]) for name in ("init", "last_alpha_bar")}
    _check_ranges({**columns, **ends}, where)
    try:
        texts: dict[str, Any] = {name: given[name] for name in ("name", "prediction_type")}
        return Table(**texts, **columns, **cast("dict[str, Any]", ends))
    except SamplerError as error:
        raise _fault(where, f"holds no table: {error.found}", error.expected) from error


def table_sha256(table: Table) -> str:
    """The sha256 (hex) of a table's numbers: equal for tables that draw the same."""
    return hashlib.sha256(json.dumps(table.to_json(), sort_keys=True).encode()).hexdigest()


def check_fits(table: Table, prediction_type: str, last_timestep: int, *, continuous: bool) -> None:
    """Refuse a table that was made for another kind of model.

    Args:
        table: that is to be run.
        prediction_type: what the model predicts.
        last_timestep: the highest that it was trained with.
        continuous: whether it is told log(sigma) / 4 in place of a timestep.

    Raises:
        SamplerError: it predicts something else, or was not trained with these timesteps.
    """
    if table.prediction_type != prediction_type:
        raise SamplerError(
            f"the table {table.name!r} is for models that predict {table.prediction_type!r}",
            expected=repr(prediction_type),
            fix="Print one of this model: `latentrt inspect MODEL --sampler NAME --json`.",
        )
    if not continuous and not (table.t.min() >= 0 and table.t.max() <= last_timestep):
        raise SamplerError(
            f"the table {table.name!r} has timesteps from {table.t.min():g} to {table.t.max():g}",
            expected=f"0 to {last_timestep}",
            fix="Print one of this model: `latentrt inspect MODEL --sampler NAME --json`.",
        )


def _numbers(name: str, values: Any, where: str) -> Any:
    """A column as an array of its own type: float64, `draws` bool; `b` in two dimensions."""
    kind = bool if name == "draws" else (int, float)
    rows = cast("list[Any]", values) if isinstance(values, list) else []
    if not 0 < len(rows) <= _MOST_ROWS:
        raise _fault(where, f"has {len(rows)} rows of {name}", f"a list of 1 to {_MOST_ROWS}")
    lists = [cast("list[Any]", row) for row in rows if isinstance(row, list)] if name == "b" else [rows]
    widths = {len(row) for row in lists}
    found = [number for row in lists for number in row]
    odd = [one for one in found if not isinstance(one, kind) or (name != "draws" and isinstance(one, bool))]
    if odd or (name == "b" and (len(lists) != len(rows) or len(widths) != 1)):
        shown = repr(odd[0])[:40] if odd else "rows of several lengths"
        raise _fault(where, f"has {shown} in {name}", "true or false" if kind is bool else "numbers")
    try:
        return np.array(rows, np.bool_ if kind is bool else np.float64)
    except OverflowError as error:
        raise _fault(where, f"has a number in {name} that is too large", "finite numbers") from error


def _check_ranges(values: Mapping[str, Any], where: str) -> None:
    for name in _SHARES:
        share = np.asarray(values[name])
        if not ((share >= 0) & (share <= 1)).all():
            raise _fault(where, f"has {name} outside 0 to 1", "shares of signal")


def _fault(where: str, found: str, expected: str) -> SamplerError:
    return SamplerError(f"the table {where[:100]!r} {found}", expected=expected, fix=_FIX)
