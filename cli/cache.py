"""`latentrt cache`: the engines built on this machine; see them, check them, remove them."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option, Typer

if TYPE_CHECKING:
    from ..engines.store.engine_store import EngineStore

cache = Typer(
    help="Show, check and remove the engines built on this machine.",
    epilog="The store is LATENTRT_CACHE, or `latentrt` in the user's cache folder.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_UNITS = {None: 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kMGT]?B)?")

Store = Annotated[Path | None, Option("--store", help="Another folder than the user's own store.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object.")]


def _open(path: Path | None) -> EngineStore:
    from ..engines.store.engine_store import EngineStore

    return EngineStore(path)


@cache.command()
def ls(store: Store = None, as_json: AsJson = False) -> None:
    """List the engines, the most recently used first."""
    opened = _open(store)
    entries = opened.entries()
    total = sum(entry.size for entry in entries)
    if as_json:
        listed = [
            {"digest": entry.path.name, "last_used": round(entry.last_used), **entry.to_json()}
            for entry in entries
        ]
        print(json.dumps({"store": str(opened.root), "bytes": total, "entries": listed}))
        return
    for entry in entries:
        key, used = entry.key, datetime.fromtimestamp(entry.last_used)
        print(
            f"{entry.path.name[:12]}  {key.net:<14}  {entry.size / 1e6:9.1f} MB  used {used:%Y-%m-%d %H:%M}"
            f"  {key.backend} {key.backend_version}, {key.dtype}, {key.gpu} ({key.compute_capability}),"
            f" {' '.join(key.profiles)}"
        )
    print(f"{_count(len(entries))}, {total / 1e6:.1f} MB in {opened.root}")


@cache.command()
def verify(store: Store = None, as_json: AsJson = False) -> None:
    """Hash every engine; damaged ones are moved to quarantine, and the exit code is 3."""
    from ..engines.errors import EngineError

    opened = _open(store)
    verdict = opened.verify()
    if verdict.damaged:
        found = "; ".join(f"{name[:12]}: {why}" for name, why in verdict.damaged)
        raise EngineError(
            f"{len(verdict.damaged)} of {_count(len(verdict.damaged) + len(verdict.good))} damaged ({found})",
            expected="files as they were written",
            fix=f"They are out of use now, in {opened.quarantine}; latentrt cache prune removes them, and"
            " latentrt build PACKAGE --backend BACKEND builds them again.",
        )
    if as_json:
        print(json.dumps({"store": str(opened.root), "good": [entry.path.name for entry in verdict.good]}))
        return
    print(f"{_count(len(verdict.good))} good in {opened.root}")


@cache.command()
def prune(
    keep: Annotated[
        str | None, Option("--keep", help="Remove the least recently used until no more is left, e.g. 20GB.")
    ] = None,
    older_than: Annotated[
        float | None, Option("--older-than", min=0.0, help="Remove what was not used for so many days.")
    ] = None,
    everything: Annotated[
        bool, Option("--all", help="Remove every engine, and the timing and runtime caches.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what would go.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Remove engines; without options, only damaged ones and what killed builds left."""
    keep_bytes = None if keep is None else _bytes(keep)
    pruned = _open(store).prune(
        keep_bytes=keep_bytes, older_than_days=older_than, everything=everything, dry_run=dry_run
    )
    if as_json:
        plain = {"freed_bytes": pruned.freed_bytes, "kept": pruned.kept, "kept_bytes": pruned.kept_bytes}
        print(json.dumps({"dry_run": dry_run, "removed": [vars(item) for item in pruned.removed], **plain}))
        return
    would = "would remove" if dry_run else "removed"
    for item in pruned.removed:
        print(f"{would} {item.name[:12]}  {item.net:<14}  {item.size / 1e6:9.1f} MB  {item.why}")
    freed = f"{pruned.freed_bytes / 1e6:.1f} MB with what killed builds left"
    stay = f"{_count(pruned.kept)}, {pruned.kept_bytes / 1e6:.1f} MB stay"
    print(f"{would} {_count(len(pruned.removed))}, {freed}; {stay}")


def _count(number: int) -> str:
    return f"{number} engine{'' if number == 1 else 's'}"


def _bytes(text: str) -> int:
    """`20GB` as bytes. Raises UsageError."""
    from ..engines.errors import UsageError

    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"--keep is {text!r}", expected="a size", fix="Write it like 500MB, 20GB or 0.")
    return round(float(match[1]) * _UNITS[match[2]])
