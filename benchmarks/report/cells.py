"""What the pages' tables are made of: cells, rows and lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from .. import words
from ..records import Document
from .reading import Against


def ratio_cell(item: Against | None, places: int = 2) -> str:
    """How often ours a side's time is, with its interval; a word where there is none."""
    if item is None or item.ratio is None:
        return "FAILED" if item and item.row.status == "FAILED" else words.DASH
    return f"{words.ratio(item.ratio.value, places)}× {words.interval(item.ratio, places)}"


def command_of(document: Document) -> str:
    """As the document says it was called; else its verb with the model and the peers."""
    settings = document.settings
    if document.benchmark == "export":
        model = f"--recipe {settings['recipe']} --dtypes {' '.join(settings['dtypes'])}"
        return f"python -m latentrt.benchmarks.models.full_size FOLDER {model} --out FILE"
    names = settings.get("peers")
    verb = f"latentrt bench {document.benchmark} {document.model.get('name')}"
    return settings.get("command") or verb + (f" --peers {','.join(names)}" if names else "")


def table_line(what: str, found: str, document: Document) -> str:
    """What was found out, and how to find it out again."""
    return table_row([what, found, f"`{command_of(document)}`"])


def table_row(cells: Iterable[str]) -> str:
    """Cells of a row of Markdown."""
    return "| " + " | ".join(safe_text(cell) for cell in cells) + " |"


def safe_text(text: str) -> str:
    """Without what ends a cell of a table or begins an HTML tag or comment."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
