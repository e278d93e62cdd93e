"""Full-size packages in fewer bits, for times and memory: `python -m latentrt.benchmarks.models.rounded`.

Their weights are random. What rounding does to those says nothing of a model's, whose channels are not alike,
so they are not compared with what they were, and ranges are measured on one small picture: the work is the
same. `latentrt quantise` is for models.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...engines.package import Package
from ...export.quantised.formats import FORMATS
from ...export.quantised.inputs import PROMPTS, drawn_pictures
from ...export.quantised.write import plan, write_rounded
from ...export.target import check_target, complete


def round_package(package: Package, output: Path, format_: str) -> None:
    """Write a package in fewer bits, uncompared. Raises UsageError where `output` exists, StorageError."""
    check_target(output, overwrite=False)
    (picture,) = drawn_pictures(package, PROMPTS[:1])
    rounding = plan(package, FORMATS[format_], picture.calls)
    with complete(output, overwrite=False) as folder:
        write_rounded(package, folder, rounding)


def main(arguments: Sequence[str] | None = None) -> None:
    """One package from another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="a package's folder, of random weights")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=list(FORMATS), default="int8")
    asked = parser.parse_args(arguments)
    round_package(Package.open(asked.package), asked.output, asked.to)


if __name__ == "__main__":
    main()
