"""Full-size packages in fewer bits, for times and memory: `python -m latentrt.benchmarks.models.rounded`.

Their weights are random. What rounding does to those says little of a model's, whose channels are not alike.
So packages that are below the bars of their format are written, too, and their manifests say what they are.
`latentrt quantise` is for models.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...engines.package import Package, write_manifest
from ...export.quantised.formats import FORMATS, Format
from ...export.quantised.write import quantise_package

RANDOM = "random"


def accept(format_: Format, distance: float, likeness: float) -> None:
    """Whatever it is."""


def main(arguments: Sequence[str] | None = None) -> None:
    """One package from another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="a package's folder, of random weights")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=list(FORMATS), default="int8")
    asked = parser.parse_args(arguments)
    made = quantise_package(Package.open(asked.package), asked.output, format=asked.to, judge=accept)
    manifest = made.package.manifest
    write_manifest(
        asked.output, replace(manifest, files={}, quantised={**manifest.quantised, "weights": RANDOM})
    )
    print(f"relative L2 {made.relative_l2:.2g}, pictures {made.picture_db:.1f} dB")


if __name__ == "__main__":
    main()
