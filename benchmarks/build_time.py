"""How long engines take to build: `python -m latentrt.benchmarks.build_time PACKAGE --backend … --out FILE`.

Builds every net into a store that is thrown away, each in a process of its own, so that each peak memory is
its own. TensorRT-RTX builds without a GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ..engines.build import BuiltEngine, build_package, built_nets
from ..engines.build_options import BuildOptions, Weights
from ..engines.cuda.facts import available, facts
from ..engines.net_weights import engine_bytes
from ..engines.package import Package
from ..engines.profiles import Profile, default_profile
from ..engines.store.engine_store import EngineStore
from ..runtime.pipeline import SHIPPED
from .machine import describe_machine


def describe_engine(package: Package, built: BuiltEngine) -> dict[str, Any]:
    """One row: seconds, peak memory of the builder, and sizes in bytes."""
    told = built.entry.facts
    return {
        "net": built.net,
        "profiles": told["labels"],
        "seconds": built.entry.build_seconds,
        "parse_seconds": told["parse_seconds"],
        "peak_rss_gb": round((told["peak_rss"] or 0) / 1e9, 3),
        "weights_mb": round(engine_bytes(package, built.net) / 1e6, 2),
        "engine_mb": round(built.entry.size / 1e6, 2),
        "layers": told["layers"],
        "library": told["library"],
    }


def measure(
    package: Package, backend: str, profiles: list[Profile], options: BuildOptions, folder: Path
) -> list[dict[str, Any]]:
    """Build every net, one after the other; print a line for each. `folder` holds the store meanwhile."""
    gpu = None if available() else facts()
    rows: list[dict[str, Any]] = []
    for net in built_nets(package):
        (built,) = build_package(
            package, backend, profiles, options, EngineStore(folder / "store"), nets=[net], gpu=gpu
        )
        row = describe_engine(package, built)
        print(
            f"{net:<14} {row['seconds']:7.1f} s  peak {row['peak_rss_gb']:6.2f} GB"
            f"  engine {row['engine_mb']:8.1f} MB  ({', '.join(row['profiles'])})",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    """Measure one package; with `--out`, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", nargs="?", default="demo")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--weights", default="embedded", choices=[policy.value for policy in Weights])
    parser.add_argument("--folder", type=Path, help="where the store lies meanwhile; default: temporary")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    name: str = given.package
    package = Package.open(SHIPPED.get(name, name))
    profiles = [Profile.parse(text, multiple=package.manifest.size_multiple) for text in given.profile]
    profiles = profiles or [default_profile(package.manifest)]
    options = BuildOptions(weights=Weights(given.weights))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = measure(package, given.backend, profiles, options, Path(folder))
    seconds = sum(row["seconds"] for row in rows)
    peak = max(row["peak_rss_gb"] for row in rows)
    print(f"{'together':<14} {seconds:7.1f} s  peak {peak:6.2f} GB")
    if given.out:
        document = {
            "benchmark": "build_time",
            "machine": describe_machine(),
            "package": {"name": package.manifest.name, "dtype": package.manifest.dtype},
            "backend": given.backend,
            "profiles": [str(profile) for profile in profiles],
            "options": options.to_json(),
            "rows": rows,
            "seconds": seconds,
            "peak_rss_gb": peak,
        }
        given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
