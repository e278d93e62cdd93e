"""Write the report, and tell whether the one that is there is current."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ...engines.errors import UsageError
from ..records import write_whole
from .figures import DIGEST, Draw, house_style, plan_ratios, plan_roofline, plan_waterfall
from .reading import Case, Result, cases, read_results
from .step_figures import plan_accuracy, plan_distance
from .tables import full_tables, short_table

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SUMMARY_BEGIN, SUMMARY_END = "<!-- bench-summary:begin -->", "<!-- bench-summary:end -->"
# By verb: a figure's name, and what plans it.
_PLANS: Mapping[str, Mapping[str, Callable[[Result, Case], Draw | None]]] = {
    "latency": {"waterfall": plan_waterfall, "peers": plan_ratios, "roofline": plan_roofline},
    "steps": {"accuracy": plan_accuracy, "distance": plan_distance},
}


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Where the report goes: Markdown with SUMMARY_BEGIN and SUMMARY_END, with BEGIN and END, and a folder.

    The folder is made where it is missing, and no file in it is ever deleted.
    """

    readme: Path | None
    measurements: Path | None
    figures: Path


@dataclass(frozen=True, kw_only=True)
class Report:
    """How many documents were read, every figure, which files changed, and remarks of one sentence each.

    Remarks name JSON that was left out, and figures that no document has any more.
    """

    documents: int
    figures: tuple[Path, ...]
    changed: tuple[Path, ...]
    remarks: tuple[str, ...]


def write_report(results: Path, pages: Pages) -> Report:
    """Draw every figure, and put the tables between the pages' markers. A second time changes nothing.

    Whatever is raised, nothing was written.

    Raises:
        UsageError: no such folder, or a page without its markers.
        PackageError: a document that is damaged, or of a newer schema.
        BackendError: matplotlib is not installed.
    """
    found, remarks = read_results(results)
    new = {path: text.encode() for path, text in _expected(found, pages).items()}
    planned = _planned(found, pages)
    for path, (digest, draw) in planned.items():
        with house_style():
            new[path] = draw().png(digest)
    changed = [path for path in new if not path.is_file() or path.read_bytes() != new[path]]
    for path in changed:
        write_whole(path, new[path])
    remarks += _left_over(planned, pages)
    return Report(
        documents=len(found), figures=tuple(planned), changed=tuple(changed), remarks=tuple(remarks)
    )


def outdated(results: Path, pages: Pages) -> tuple[str, ...]:
    """What `write_report` would change, one sentence each; nothing is drawn, and matplotlib is not needed.

    A figure is current if the digest in its metadata is that of its document. Raises as `write_report` does.
    """
    found, _ = read_results(results)
    old = [
        f"{path.name} does not have the tables of the documents"
        for path, text in _expected(found, pages).items()
        if path.read_text(encoding="utf-8") != text
    ]
    planned = _planned(found, pages)
    old += [
        f"{path.relative_to(pages.figures).as_posix()} is missing, or was drawn from another document"
        for path, (digest, _) in planned.items()
        if _digest(path) != digest
    ]
    return (*old, *_left_over(planned, pages))


def planned_figures(result: Result) -> dict[str, Draw]:
    """How each figure of a document is drawn, by file name; to be called within `figures.house_style`.

    Those of a second case are called `…-2.png`.
    """
    planned: dict[str, Draw] = {}
    for kind, plan in _PLANS.get(result.document.benchmark, {}).items():
        for number, case in enumerate(cases(result.document), start=1):
            if draw := plan(result, case):
                planned[f"{result.name}-{kind}{f'-{number}' if number > 1 else ''}.png"] = draw
    return planned


def _planned(found: Sequence[Result], pages: Pages) -> dict[Path, tuple[str, Draw]]:
    """What each figure is drawn from and how: the digest of its document, and what draws it."""
    every = ((result.digest, planned_figures(result)) for result in found)
    return {pages.figures / name: (digest, draw) for digest, some in every for name, draw in some.items()}


def _expected(found: Sequence[Result], pages: Pages) -> dict[Path, str]:
    """The pages as they should be."""
    texts: dict[Path, str] = {}
    if page := pages.measurements:
        links = {
            result.name: [_relative(pages.figures / name, page) for name in planned_figures(result)]
            for result in found
        }
        texts[page] = _between(page, (BEGIN, END), full_tables(found, links))
    if page := pages.readme:
        link = _relative(pages.measurements, page) if pages.measurements else ""
        texts[page] = _between(page, (SUMMARY_BEGIN, SUMMARY_END), short_table(found, link))
    return texts


def _relative(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def _between(page: Path, markers: tuple[str, str], table: str) -> str:
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    begin, end = (text.find(marker) for marker in markers)
    if [text.count(marker) for marker in markers] != [1, 1] or end < begin:
        raise UsageError(
            f"{page} does not have the markers {markers[0]} and {markers[1]}, once and in this order",
            expected="both, around the place of the tables",
            fix="Add them to the file, each on a line of its own, or leave the page out.",
        )
    return f"{text[:begin]}{markers[0]}\n\n{table}\n\n{text[end:]}"


def _digest(path: Path) -> str | None:
    """That of the document a PNG was drawn from; None for another file, or none."""
    pictures: Any = import_module("PIL.Image")  # its `info` has no type
    try:
        with pictures.open(path) as image:
            return image.info.get(DIGEST)
    except OSError:  # PIL's error for what is no picture is one, too
        return None


def _left_over(planned: Container[Path], pages: Pages) -> list[str]:
    """Figures of ours that no document has any more."""
    there = [path for path in sorted(pages.figures.rglob("*.png")) if path not in planned]
    old = [path.relative_to(pages.figures).as_posix() for path in there if _digest(path) is not None]
    return [f"{name} is of no document any more: delete it" for name in old]
