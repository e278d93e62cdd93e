"""`latentrt models`: checkpoints and controls that were opened before, whose names are enough for `-m`."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..runtime.request.parameters import lora_text
from .shown import printable, show

if TYPE_CHECKING:
    from ..checkpoints.entries import OpenedModel

_STATES = {
    "there": "",
    "changed": "  (changed since: it is made ready anew when it is opened)",
    "gone": "  (gone)",
}


def models(
    store: Annotated[Path | None, Option("--store", help="Another folder than the user's own store.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the checkpoints and controls that were opened before, the last one first.

    Commands that take a model take its name from this list, if no other model has it; it is then opened as
    it was the last time, with the same options, adapters in its weights among them, unless others are
    given. Its path opens it with its own.
    """
    from ..checkpoints.entries import models as opened_models
    from ..engines.store.folder import StoreFolder

    folder = StoreFolder(store)
    found = opened_models(folder)
    if as_json:
        print(json.dumps({"store": str(folder.root), "models": [model.to_json() for model in found]}))
        return
    for line in _table([_row(model) for model in found]):
        show(line)
    if not found:
        print("no checkpoint was opened yet: latentrt generate PROMPT -m CHECKPOINT opens one")


def _row(model: OpenedModel) -> list[str]:
    note, latest = model.note, model.entries[0]
    used = datetime.fromtimestamp(latest.last_used)
    options = [
        *((name, getattr(note, name)) for name in ("vae", "tiny_vae", "prediction_type", "few_steps")),
        *(("fused", lora_text(path, strength)) for path, strength in note.fused),
    ]
    place = printable(f"{note.hub}: {note.path}" if note.hub else note.path)
    given = "".join(f", with {name} {printable(value)}" for name, value in options if value)
    return [
        printable(note.name),
        note.made_for,
        ",".join(model.dtypes),
        f"{note.weights_bytes / 1e6:.1f} MB",
        f"{model.size / 1e6:.1f} MB in the cache",
        f"used {used:%Y-%m-%d %H:%M}",
        f"{place}{given}{_STATES[latest.state]}",
    ]


def _table(rows: list[list[str]]) -> list[str]:
    """Rows whose columns begin below each other; sizes end so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if text.endswith(("MB", "cache")) else text.ljust(width)
            for text, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
