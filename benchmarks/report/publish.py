"""Write the report, and tell whether the one that is there is current."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ...engines.errors import UsageError
from .figures import draw_figures, planned_figures
from .results import Results, read_results
from .sheet import DIGEST
from .tables import markdown

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written.

    Attributes:
        documents: how many were read.
        figures: every figure, whether it changed or not.
        changed: files that are not what they were before.
        remarks: JSON that was left out, and figures no document has any more, one sentence each.
    """

    documents: int
    figures: tuple[Path, ...]
    changed: tuple[Path, ...]
    remarks: tuple[str, ...]


def write_report(results: Path, readme: Path | None, figures: Path) -> Report:
    """Draw every figure, and put the tables between the README's markers. A second time changes nothing.

    Args:
        results: a folder of documents; nothing else is read.
        readme: a Markdown file with the markers BEGIN and END; None writes figures only.
        figures: a folder for PNGs, made where it is missing; no file in it is ever deleted.

    Raises:
        UsageError: no such folder, or a README without the markers.
        PackageError: a document that is damaged, or of a newer schema.
        BackendError: matplotlib is not installed.

    Whatever is raised, nothing was written.
    """
    read = read_results(results)
    text = _expected(read, readme, figures) if readme else ""
    drawn = {figures / name: png for result in read.found for name, png in draw_figures(result)}
    changed = [path for path, png in drawn.items() if _write(path, png)]
    if readme and _write(readme, text.encode()):
        changed.append(readme)
    return Report(
        documents=len(read.found),
        figures=tuple(drawn),
        changed=tuple(changed),
        remarks=(*read.remarks, *_left_over(read, figures)),
    )


def outdated(results: Path, readme: Path | None, figures: Path) -> tuple[str, ...]:
    """What `write_report` would change, one sentence each; nothing is drawn, and matplotlib is not needed.

    A figure is current if the digest in its metadata is that of its document. Raises as `write_report` does.
    """
    read = read_results(results)
    found: list[str] = []
    if readme and _expected(read, readme, figures) != readme.read_text(encoding="utf-8"):
        found.append(f"{readme.name} does not have the tables of the documents")
    for result in read.found:
        for name in planned_figures(result):
            if _digest(figures / name) != result.digest:
                found.append(f"{name} is missing, or was drawn from another document")
    return (*found, *_left_over(read, figures))


def report_is_current(results: Path, readme: Path | None, figures: Path) -> bool:
    """Whether `write_report` would change nothing (see `outdated`)."""
    return not outdated(results, readme, figures)


def _expected(read: Results, readme: Path, figures: Path) -> str:
    """The README as it should be."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    begin, end = text.find(BEGIN), text.find(END)
    if (text.count(BEGIN), text.count(END)) != (1, 1) or end < begin:
        raise UsageError(
            f"{readme} does not have the markers {BEGIN} and {END}, once and in this order",
            expected="both, around the place of the tables",
            fix="Add them to the file, each on a line of its own, or leave out --readme.",
        )
    folder = Path(os.path.relpath(figures, readme.parent)).as_posix()
    links = {result.name: [f"{folder}/{name}" for name in planned_figures(result)] for result in read.found}
    return f"{text[:begin]}{BEGIN}\n\n{markdown(read.found, links)}\n\n{text[end:]}"


def _write(path: Path, content: bytes) -> bool:
    """Whether the file was not that before. A reader never sees half of it."""
    if path.is_file() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return True


def _digest(path: Path) -> str | None:
    """Of the document a PNG was drawn from; None for another file, or none."""
    pictures: Any = import_module("PIL.Image")  # its `info` has no type
    try:
        with pictures.open(path) as image:
            digest = image.info.get(DIGEST)
    except OSError:  # PIL's error for what is no picture is one, too
        return None
    return digest if isinstance(digest, str) else None


def _left_over(read: Results, figures: Path) -> list[str]:
    """Figures of ours that no document has any more."""
    planned = {figures / name for result in read.found for name in planned_figures(result)}
    paths = sorted(figures.rglob("*.png")) if figures.is_dir() else []
    return [
        f"{path.relative_to(figures).as_posix()} is of no document any more: delete it"
        for path in paths
        if path not in planned and _digest(path) is not None
    ]
