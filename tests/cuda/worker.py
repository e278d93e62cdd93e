"""What ONNX Runtime's CUDA provider does with our nets on the stand-in, as JSON: run in a process of its own.

    LD_LIBRARY_PATH=LIBRARIES .venv-cuda/bin/python -m tests.cuda.worker nets demo [NET...] [--layout NAME]

LIBRARIES is what `python -m tests.cuda.libraries LIBRARIES` has built. A package is `demo`, a folder, or the
name of a skeleton, whose weights are zeros that take no room.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from latentrt.engines.errors import LatentrtError
from latentrt.engines.onnxruntime.tuning.cuda_layouts import CUDA_LAYOUTS, LOWERED_NETS
from latentrt.engines.package import Package
from latentrt.runtime.model import SHIPPED
from tests.cuda import mutations, pictures
from tests.cuda.bench import Bench, Facts, changed, net_facts
from tests.cuda.runtime import StandIn
from tests.cuda.skeleton import zero_package

NOT_RUN = ("unet_whole",)  # for other tools: no backend opens it


@contextmanager
def package_of(name: str) -> Iterator[Package]:
    """The package that the command line names."""
    if name == "demo" or Path(name).is_dir():
        yield Package.open(SHIPPED["demo"] if name == "demo" else Path(name))
        return
    with TemporaryDirectory() as folder:
        yield zero_package(name, Path(folder) / name)


def nets(package: Package, runtime: StandIn, names: Sequence[str], layouts: Sequence[str]) -> Facts:
    """The facts of nets by `net/layout`; an error is a fact too."""
    facts: Facts = {}
    bench = Bench(runtime, package)
    for name in names or [name for name in package.manifest.nets if name not in NOT_RUN]:
        for layout in CUDA_LAYOUTS if name in LOWERED_NETS else CUDA_LAYOUTS[:1]:
            if layouts and layout not in layouts:
                continue
            try:
                facts[f"{name}/{layout}"] = net_facts(bench, name, layout)
            except LatentrtError as error:
                facts[f"{name}/{layout}"] = {"error": error.found}
    bench.close()
    return facts


def launches(facts: Mapping[str, Facts]) -> dict[str, int]:
    """The library's own launches in a run of a known shape, by `net/layout`."""
    return {name: item["runs"][-1]["launches"] for name, item in facts.items() if "runs" in item}


def main() -> None:
    """Print the facts as one line of JSON: the last one."""
    every = ("nets", "launches", "pictures", "alternating", "memory", "failures", "mutations")
    every += ("changed", "adapted", "steered")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=every)
    parser.add_argument("package")
    parser.add_argument("nets", nargs="*")
    parser.add_argument("--layout", action="append", default=[])
    options = parser.parse_args()
    runtime = StandIn()
    runtime.install()
    with package_of(options.package) as package:
        measure = partial(nets, package, runtime, options.nets, options.layout)
        facts = {
            "nets": measure,
            "changed": lambda: nets(changed(package), runtime, options.nets, options.layout),
            "adapted": lambda: pictures.adapted(package, runtime),
            "steered": lambda: pictures.steered(package, runtime),
            "launches": lambda: launches(measure()),
            "pictures": lambda: pictures.pictures(package, runtime),
            "alternating": lambda: pictures.alternating(package, runtime),
            "memory": lambda: pictures.memory(package, runtime),
            "failures": lambda: pictures.failures(package, runtime),
            "mutations": lambda: mutations.every(Bench(runtime, package)),
        }[options.what]()
    print(json.dumps(facts))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
