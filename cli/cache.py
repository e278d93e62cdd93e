"""`latentrt cache`: the engines built and the checkpoints opened here; see, check and remove what is kept."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, Typer

from .shown import printable, show

if TYPE_CHECKING:
    from ..checkpoints.entries import OpenedEntry
    from ..engines.store.engine_store import EngineStore, Entry

cache = Typer(
    help="Show, check and remove the engines built and the checkpoints opened on this machine.",
    epilog="The store is LATENTRT_CACHE, or `latentrt` in the user's cache folder.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_STATES = {
    "changed": "has changed since it was opened: it is made ready anew when it is opened",
    "gone": "is gone since it was opened",
}
_UNITS = {None: 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kMGT]?B)?")

Store = Annotated[Path | None, Option("--store", help="Another folder than the user's own store.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object.")]


def _open(path: Path | None) -> EngineStore:
    from ..engines.store.engine_store import EngineStore

    return EngineStore(path)


@cache.command()
def ls(store: Store = None, as_json: AsJson = False) -> None:
    """List the engines, then the opened checkpoints, the most recently used first."""
    from ..checkpoints.entries import entries as opened_entries

    opened = _open(store)
    entries, checkpoints = opened.entries(), opened_entries(opened)
    total = sum(entry.size for entry in (*entries, *checkpoints))
    if as_json:
        listed = [
            {"digest": entry.path.name, "last_used": round(entry.last_used), **entry.to_json()}
            for entry in entries
        ]
        notes = [
            {
                "digest": entry.path.name,
                "size": entry.size,
                "last_used": round(entry.last_used),
                "state": entry.state,
                **entry.note.to_json(),
            }
            for entry in checkpoints
        ]
        found = {"bytes": total, "entries": listed, "checkpoints": notes}
        print(json.dumps({"store": str(opened.root), **found}))
        return
    for entry in entries:
        key = entry.key
        show(
            f"{_head(entry, key.net)}  {key.backend} {key.backend_version}, {key.dtype}, {key.gpu}"
            f" ({key.compute_capability}), {' '.join(key.profiles)}"
        )
    for entry in checkpoints:
        note = entry.note
        show(f"{_head(entry, printable(note.name))}  {note.made_for}, {note.dtype}, {note.path}")
    show(f"{_count(len(entries), len(checkpoints))}, {total / 1e6:.1f} MB in {opened.root}")


def _head(entry: Entry | OpenedEntry, label: str) -> str:
    """What a line says of an entry of either kind."""
    used = datetime.fromtimestamp(entry.last_used)
    return f"{entry.path.name[:12]}  {label:<14}  {entry.size / 1e6:9.1f} MB  used {used:%Y-%m-%d %H:%M}"


@cache.command()
def verify(store: Store = None, as_json: AsJson = False) -> None:
    """Hash every engine, and what is kept of opened checkpoints: not the weights, which are files of yours.

    What is damaged is moved to quarantine, and the exit code is 3. A checkpoint whose file has changed or is
    gone is no damage, and is said; a file with another time is hashed.
    """
    from ..checkpoints import entries
    from ..engines.errors import EngineError

    opened = _open(store)
    verdict, checkpoints = opened.verify(), entries.verify(opened)
    damaged = [*verdict.damaged, *checkpoints.damaged]
    if damaged:
        found = "; ".join(f"{name[:12]}: {why}" for name, why in damaged)
        total = _count(
            len(verdict.damaged) + len(verdict.good), len(checkpoints.damaged) + len(checkpoints.good)
        )
        raise EngineError(
            f"{len(damaged)} of {total} damaged ({found})",
            expected="files as they were written",
            fix=f"They are out of use now, in {opened.quarantine}; latentrt cache prune removes them,"
            " latentrt build PACKAGE --backend BACKEND builds engines again, and a checkpoint is made ready"
            " again when it is opened.",
        )
    states = {entry.path.name: entries.state_by_content(opened, entry) for entry in checkpoints.good}
    if as_json:
        good = [entry.path.name for entry in verdict.good]
        print(json.dumps({"store": str(opened.root), "good": good, "checkpoints": states}))
        return
    for entry in checkpoints.good:
        if words := _STATES.get(states[entry.path.name]):
            show(f"{entry.path.name[:12]}  {entry.note.path} {words}")
    show(f"{_count(len(verdict.good), len(checkpoints.good))} undamaged in {opened.root}")


@cache.command()
def prune(
    names: Annotated[
        list[str] | None,
        Argument(metavar="NAME", help="Remove these: names of `latentrt models`, or digests of `cache ls`."),
    ] = None,
    keep: Annotated[
        str | None, Option("--keep", help="Remove the least recently used until no more is left, e.g. 20GB.")
    ] = None,
    older_than: Annotated[
        float | None, Option("--older-than", min=0.0, help="Remove what was not used for so many days.")
    ] = None,
    everything: Annotated[
        bool, Option("--all", help="Remove every engine and opened checkpoint, and all other caches.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what would go.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Remove engines and opened checkpoints; without options, damaged ones and what killed builds left.

    A checkpoint's own files are yours, and stay where they are; it is made ready again when it is opened.
    What a running process has open stays too.
    """
    from ..checkpoints import entries

    opened, keep_bytes = _open(store), None if keep is None else _bytes(keep)
    before = len(opened.folders(opened.checkpoints))
    pruned = entries.prune(
        opened,
        keep_bytes=keep_bytes,
        older_than_days=older_than,
        everything=everything,
        dry_run=dry_run,
        names=names or (),
    )
    if as_json:
        plain = {"freed_bytes": pruned.freed_bytes, "kept": pruned.kept, "kept_bytes": pruned.kept_bytes}
        print(json.dumps({"dry_run": dry_run, "removed": [vars(item) for item in pruned.removed], **plain}))
        return
    would = "would remove" if dry_run else "removed"
    for item in pruned.removed:
        label = printable(item.label)
        show(f"{would} {item.name[:12]}  {label:<14}  {item.size / 1e6:9.1f} MB  {item.why}")
    gone = sum(item.kind == "checkpoint" for item in pruned.removed)
    freed = f"{pruned.freed_bytes / 1e6:.1f} MB with what killed builds left"
    stay = _count(pruned.kept - (before - gone), before - gone)
    show(
        f"{would} {_count(len(pruned.removed) - gone, gone)}, {freed}; {stay},"
        f" {pruned.kept_bytes / 1e6:.1f} MB stay"
    )


def _count(engines: int, checkpoints: int) -> str:
    """How many there are of each kind; of checkpoints only where there are some."""
    found = f"{engines} engine{'' if engines == 1 else 's'}"
    if checkpoints:
        found += f" and {checkpoints} opened checkpoint{'' if checkpoints == 1 else 's'}"
    return found


def _bytes(text: str) -> int:
    """`20GB` as bytes. Raises UsageError."""
    from ..engines.errors import UsageError

    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"--keep is {text!r}", expected="a size", fix="Write it like 500MB, 20GB or 0.")
    return round(float(match[1]) * _UNITS[match[2]])
