"""How the sources hang together: a table of what imports what, folder by folder (`check.py --imports`).

Every import of a project's file counts, also inside functions and under TYPE_CHECKING; `Import.kind` says
which it is. A folder's entries are its files (without `__init__.py`, which only re-exports) and its
subfolders, the rooms. An arrow joins two entries of a folder, however many imports it stands for; what a
room's files import from each other is counted in the room's own row. A circle is a set of entries, or of
files, that import each other. An arrow runs back if it is one of the fewest that must go for the folder's
circles to be gone. Without those, an entry stands one floor above the highest entry it imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Literal

FOLDERS = (
    "engines",
    "runtime",
    "checkpoints",
    "adapters",
    "export",
    "benchmarks",
    "serve",
    "cli",
    "demo",
    "hosts",
)
Kind = Literal["load", "lazy", "types"]
Arrow = tuple[str, str]


@dataclass(frozen=True)
class Import:
    """One name that a file imports from another. Files are paths below the root, without `.py`."""

    source: str
    target: str
    name: str
    kind: Kind

    def __str__(self) -> str:
        note = "" if self.kind == "load" else f" ({self.kind})"
        return f"{self.source} -> {self.target}: {self.name}{note}"


@dataclass(frozen=True)
class Drawing:
    """What imports what among some entries."""

    entries: Sequence[str]
    arrows: Mapping[Arrow, Sequence[Import]]

    @property
    def circles(self) -> list[set[str]]:
        """Entries that import each other, directly or through others of the same set."""
        targets: dict[str, list[str]] = {}
        for source, target in self.arrows:
            targets.setdefault(source, []).append(target)
        reached = {entry: _reached(entry, targets) for entry in self.entries}
        circles = [{other for other in reached[entry] if entry in reached[other]} for entry in self.entries]
        return [circle for number, circle in enumerate(circles) if circle and circle not in circles[:number]]

    @property
    def back(self) -> list[Arrow]:
        """The fewest arrows without which there is no circle; of several such sets, one of weak imports."""
        return [arrow for circle in self.circles for arrow in self._fewest(circle)]

    @property
    def floors(self) -> int:
        """The longest chain of entries of which each imports the next."""
        back = set(self.back)
        below = {
            entry: [b for a, b in self.arrows if a == entry and (a, b) not in back] for entry in self.entries
        }

        @cache
        def floor(entry: str) -> int:
            return 1 + max(map(floor, below[entry]), default=0)

        return max(map(floor, self.entries), default=0)

    def _fewest(self, circle: set[str]) -> Sequence[Arrow]:
        inside = {arrow: imports for arrow, imports in self.arrows.items() if circle.issuperset(arrow)}
        weak_first = sorted(inside, key=lambda arrow: (_loaded(inside[arrow]), len(inside[arrow])))
        for count in range(1, len(inside)):
            for cut in combinations(weak_first, count):
                if not Drawing(sorted(circle), {a: i for a, i in inside.items() if a not in cut}).circles:
                    return cut
        return weak_first


def sources(root: Path, folders: Iterable[str] = FOLDERS) -> list[Path]:
    """Every Python file in those folders."""
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def read_imports(root: Path) -> list[Import]:
    """Every import of a file of the project by another."""
    files = {path.relative_to(root).with_suffix("").as_posix(): path for path in sources(root)}
    return [
        Import(source, target, name, kind)
        for source, path in files.items()
        for module, name, kind in _imported_names(source, path)
        if (target := _file_of(module, name, files)) and target != source
    ]


def draw_files(imports: Iterable[Import], files: Iterable[str]) -> Drawing:
    """Every file an entry, `__init__.py` included."""
    return _draw(sorted(files), ((one.source, one.target, one) for one in imports))


def draw_folder(folder: str, imports: Iterable[Import], files: Iterable[str]) -> Drawing:
    """The files and rooms directly in a folder (`""`: the project's folders themselves)."""
    entries = {entry for file in files if (entry := entry_of(file, folder))}
    ends = ((entry_of(one.source, folder), entry_of(one.target, folder), one) for one in imports)
    return _draw(sorted(entries), ((a, b, one) for a, b, one in ends if a and b))


def entry_of(file: str, folder: str) -> str | None:
    """What of a folder a file is or lies in; None for other folders' files and the folder's own __init__."""
    prefix = f"{folder}/" if folder else ""
    entry = file.removeprefix(prefix).split("/")[0]
    return entry if file.startswith(prefix) and entry != "__init__" else None


def print_imports(root: Path) -> None:
    """A row for every folder and every room, and below it the circles and the arrows that run back."""
    files = [path.relative_to(root).with_suffix("").as_posix() for path in sources(root)]
    imports = read_imports(root)
    folders = sorted({"", *(parent for file in files if (parent := file.rpartition("/")[0]))})
    print(f"{'folder':32} {'side by side':>12} {'floors':>6} {'arrows':>6} {'back':>4} {'circles':>7}")
    for folder in folders:
        drawing = draw_folder(folder, imports, files)
        counts = [
            len(drawing.entries),
            drawing.floors,
            len(drawing.arrows),
            len(drawing.back),
            len(drawing.circles),
        ]
        print(
            f"{folder or '(all)':32} {counts[0]:12} {counts[1]:6} {counts[2]:6} {counts[3]:4} {counts[4]:7}"
        )
        for circle in drawing.circles:
            print(f"    circle: {', '.join(sorted(circle))}")
        for arrow in drawing.back:
            print(*(f"    back: {one}" for one in drawing.arrows[arrow]), sep="\n")
    whole = draw_files(imports, files)
    print(f"\n{len(files)} files, {len(whole.circles)} circles of files")
    for circle in whole.circles:
        print(f"    {', '.join(sorted(circle))}")


def _draw(entries: Sequence[str], ends: Iterable[tuple[str, str, Import]]) -> Drawing:
    arrows: dict[Arrow, list[Import]] = {}
    for source, target, one in ends:
        if source != target:
            arrows.setdefault((source, target), []).append(one)
    return Drawing(entries, arrows)


def _reached(entry: str, targets: Mapping[str, Iterable[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = [entry]
    while waiting:
        new = set(targets.get(waiting.pop(), ())) - reached
        reached |= new
        waiting += new
    return reached


def _loaded(imports: Sequence[Import]) -> bool:
    return any(one.kind == "load" for one in imports)


def _file_of(module: str, name: str, files: Mapping[str, Path]) -> str | None:
    """The file that holds a name of a module: the name may be a module itself."""
    places = (f"{module}/{name}", f"{module}/{name}/__init__", module, f"{module}/__init__")
    return next((place for place in places if place in files), None)


def _imported_names(source: str, path: Path) -> Iterator[tuple[str, str, Kind]]:
    """(module as a path below the root, name, kind) for all that a file imports from the project."""
    parts = source.split("/")
    for node, kind in _statements(ast.parse(path.read_text(encoding="utf-8")), "load"):
        if isinstance(node, ast.Import):
            modules = [(alias.name, "") for alias in node.names]
        elif node.level:
            above = ["latentrt", *parts[: len(parts) - node.level]]
            modules = [(".".join([*above, *filter(None, [node.module])]), alias.name) for alias in node.names]
        else:
            modules = [(node.module or "", alias.name) for alias in node.names]
        for module, name in modules:
            if f"{module}.".startswith("latentrt."):
                yield module.replace(".", "/").removeprefix("latentrt").lstrip("/"), name, kind


def _statements(node: ast.AST, kind: Kind) -> Iterator[tuple[ast.Import | ast.ImportFrom, Kind]]:
    """The import statements below a node, and whether they run when the file is loaded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, kind
        elif isinstance(child, ast.FunctionDef | ast.Lambda):
            yield from _statements(child, "lazy")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _statements(child, "types")
        else:
            yield from _statements(child, kind)
