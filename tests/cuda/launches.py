"""How many kernels of its own the library launches in one run: `python -m tests.cuda.launches [PACKAGE...]`.

That writes `launches.json` anew for these packages, for all of them unless some are named. What cuBLAS and
cuDNN launch comes on top.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.cuda import environment

TABLE = Path(__file__).with_name("launches.json")
PACKAGES = ("demo", "sd15-fp16", "sd21-fp16", "sdxl-fp16")
COMMAND = "python -m tests.cuda.launches"


def recorded() -> dict[str, dict[str, int]]:
    """The committed table: launches by package, and by `net/layout`."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def changes(package: str, counted: Mapping[str, int], known: Mapping[str, int]) -> list[str]:
    """A line for every number that is not the recorded one, also for one that is better."""
    lines: list[str] = []
    for name in sorted({*counted, *known}):
        now, before = counted.get(name), known.get(name)
        if now != before:
            lines.append(f"{package} {name}: {before} launches are recorded, {now} were counted")
    return lines


def print_launches(root: Path) -> None:
    """Print the table of a checkout."""
    table = json.loads((root / TABLE.relative_to(environment.ROOT)).read_text(encoding="utf-8"))
    names = sorted({name for counts in table.values() for name in counts})
    print(f"{'launches in one run':28}" + "".join(f"{package:>12}" for package in table))
    for name in names:
        print(f"{name:28}" + "".join(f"{counts.get(name, ''):>12}" for counts in table.values()))


def main(packages: list[str]) -> None:
    """Count and write."""
    table = recorded() if TABLE.exists() else {}
    with TemporaryDirectory() as folder:
        built = environment.build(Path(folder))
        for package in packages or PACKAGES:
            table[package] = environment.ask(built, "launches", package)
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
