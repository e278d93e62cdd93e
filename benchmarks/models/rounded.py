"""Full-size packages in fewer bits, for times and memory: `python -m latentrt.benchmarks.models.rounded`.

Their weights are random. What rounding does to those says little of a model's, whose channels are not alike.
So packages that are below the bars of their format are written, too, and their manifests say what they are.
`latentrt quantise` is for models. `--by-ranges` is for building engines, their times and sizes: nothing is
left out because the output is sensitive to it, and nothing is compared, which takes most of the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...engines.package import Package, write_manifest
from ...export.quantised.formats import FORMATS, Format
from ...export.quantised.inputs import SEEN, drawn_pictures
from ...export.quantised.write import plan_by_ranges, quantise_package, write_rounded
from ...export.target import complete

RANDOM = "random"


def accept(format_: Format, distance: float, likeness: float) -> None:
    """Whatever it is."""


def main(arguments: Sequence[str] | None = None) -> None:
    """One package from another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="a package's folder, of random weights")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=list(FORMATS), default="int8")
    parser.add_argument("--by-ranges", action="store_true", help="leave nothing out, and compare nothing")
    asked = parser.parse_args(arguments)
    package = Package.open(asked.package)
    if asked.by_ranges:
        manifest = _by_ranges(package, asked.output, FORMATS[asked.to]).manifest
    else:
        made = quantise_package(package, asked.output, format=asked.to, judge=accept)
        manifest = made.package.manifest
        print(f"relative L2 {made.relative_l2:.2g}, pictures {made.picture_db:.1f} dB")
    write_manifest(
        asked.output, replace(manifest, files={}, quantised={**manifest.quantised, "weights": RANDOM})
    )


def _by_ranges(package: Package, output: Path, format_: Format) -> Package:
    seen = drawn_pictures(package, SEEN) if format_.rounds_data else ()
    rounding = plan_by_ranges(package, format_, [call for picture in seen for call in picture.calls])
    with complete(output, overwrite=False) as folder:
        write_rounded(package, folder, rounding)
    return Package.open(output)


if __name__ == "__main__":
    main()
