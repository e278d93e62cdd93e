"""`latentrt inspect` and `latentrt metadata`: what a package, a sampler's table or a picture's file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

if TYPE_CHECKING:
    from ..engines.package import Package


def inspect(
    package: Annotated[str, Argument(help="A package folder, or the shipped model `demo`.")] = "demo",
    sampler: Annotated[str | None, Option("--sampler", help="Print this sampler's table.")] = None,
    steps: Annotated[int, Option("--steps", help="Number of inference steps of the table.")] = 20,
    samplers: Annotated[bool, Option("--samplers", help="List the samplers.")] = False,
    verify: Annotated[
        bool, Option("--verify", help="Hash every file, and look for NaN in the weights.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a package, the list of samplers, or a sampler's table for that package's schedule."""
    from ..engines.package import Package
    from ..runtime.model import SHIPPED

    if samplers:
        return _print_samplers(as_json=as_json)
    opened = Package.open(SHIPPED.get(package, package))
    if verify:
        opened.verify()
        opened.check_weights()
    if sampler is not None:
        return _print_table(opened, sampler, steps, as_json=as_json)
    return _print_package(opened, as_json=as_json)


def _print_samplers(*, as_json: bool) -> None:
    from ..runtime.sampling.samplers import SAMPLERS

    names = {name: sampler.about for name, sampler in SAMPLERS.items()}
    width = max(map(len, names))
    print(json.dumps(names) if as_json else "\n".join(f"{name:<{width}}  {names[name]}" for name in names))


def _print_table(package: Package, sampler: str, steps: int, *, as_json: bool) -> None:
    from ..runtime.sampling.names import resolve
    from ..runtime.sampling.samplers import make_table

    table = make_table(resolve(sampler, package.manifest.scheduler), steps)
    print(json.dumps(table.to_json()) if as_json else table.format())


def _print_package(package: Package, *, as_json: bool) -> None:
    manifest = package.manifest
    if as_json:
        print(json.dumps(manifest.to_json()))
        return
    defaults = manifest.defaults
    print(
        f"{manifest.name}: {manifest.family}, {manifest.dtype}, schema {manifest.schema}, {manifest.producer}"
    )
    print(
        f"defaults: {defaults.width}x{defaults.height}, {defaults.num_inference_steps} steps of"
        f" {defaults.sampler or manifest.scheduler.get('_class_name')}, guidance {defaults.guidance_scale:g}"
    )
    for name, net in manifest.nets.items():
        weights = sum(manifest.files[name].size for name in net.weights) / 1e6
        print(f"\n{name}  {net.graph}, weights {weights:.1f} MB, {len(net.fp32_islands)} fp32 islands")
        _print_tensors("in ", [spec.to_json() for spec in net.spec.inputs])
        _print_tensors("out", [spec.to_json() for spec in net.spec.outputs])


def _print_tensors(kind: str, specs: list[dict[str, Any]]) -> None:
    for spec in specs[:4]:
        print(f"  {kind} {spec['name']}  {spec['dtype']} ({', '.join(map(str, spec['shape']))})")
    if len(specs) > 4:
        print(f"  {kind} … {len(specs) - 4} more (--json has all)")


def metadata(
    picture: Annotated[Path, Argument(help="A .png, .jpg or .webp file.")],
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the parameters stored in a picture (AUTOMATIC1111's text, and our own record)."""
    from ..runtime.pictures.infotext import parse_infotext
    from ..runtime.pictures.write import read_metadata

    found = read_metadata(picture)
    if as_json:
        fields = parse_infotext(found.parameters) if found.parameters else None
        print(json.dumps({"parameters": fields, "record": found.record}))
        return
    print(found.parameters or "no parameters")
    if found.record:
        print(json.dumps(found.record, indent=1))
