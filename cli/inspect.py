"""`latentrt inspect` and `latentrt metadata`: what a package, a model's file, a sampler or a picture says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from .shown import show, show_lines

if TYPE_CHECKING:
    from ..checkpoints.files.open import Checkpoint
    from ..checkpoints.files.report import Report
    from ..engines.package import Manifest, Package


def inspect(
    package: Annotated[
        str,
        Argument(
            help="A package folder, the shipped model `demo`, any model's file or folder, or a name of"
            " `latentrt models`."
        ),
    ] = "demo",
    sampler: Annotated[str | None, Option("--sampler", help="Print this sampler's table.")] = None,
    steps: Annotated[int, Option("--steps", help="Number of inference steps of the table.")] = 20,
    samplers: Annotated[bool, Option("--samplers", help="List the samplers.")] = False,
    verify: Annotated[
        bool, Option("--verify", help="Look for NaN in the weights; hash every file of a package.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a package, what another file or folder is, the samplers, or a sampler's table for a package."""
    from ..engines.package import Package
    from ..runtime.model import SHIPPED, is_package

    if samplers:
        return _print_samplers(as_json=as_json)
    found = SHIPPED.get(package) or place(package)
    if not is_package(found):
        return _inspect_other(found, sampler, steps, verify=verify, as_json=as_json)
    opened = Package.open(found)
    if verify:
        opened.verify()
        opened.check_weights()
    if sampler is not None:
        return _print_table(opened.manifest, sampler, steps, as_json=as_json)
    return _print_package(opened, as_json=as_json)


def _inspect_other(path: Path, sampler: str | None, steps: int, *, verify: bool, as_json: bool) -> None:
    """The same for what is no package: a checkpoint, a part of one, or any other file."""
    from ..checkpoints.files.open import Checkpoint
    from ..checkpoints.files.report import check_weights, report

    if verify:
        check_weights(path)
    if sampler is not None:
        return _print_table(Checkpoint.open(path), sampler, steps, as_json=as_json)
    return _print_report(_with_notes(report(path, _check)), as_json=as_json)


def _check(source: Checkpoint) -> None:
    """Raise CheckpointError for a damaged tokenizer, or a net that no shipped graph fits."""
    from ..checkpoints.opening import check_tokenizers
    from ..checkpoints.precision.calibration import components
    from ..checkpoints.templates.find import check_templates
    from ..runtime.prompts.tokenizer import tokenize

    check_tokenizers(source, tokenize)
    check_templates(source, components(source))


def _with_notes(found: Report) -> Report:
    """The report of anything but a checkpoint, with what its file says, or what keeps it from being used."""
    from dataclasses import replace

    from ..adapters.binding import check_alphas
    from ..adapters.embeddings import check_vectors
    from ..adapters.files import read_adapter
    from ..checkpoints.controls.control_file import KINDS
    from ..checkpoints.controls.read import read_control
    from ..engines.errors import AdapterError, CheckpointError

    if found.kind in KINDS:
        try:
            control = read_control(found.path)
        except CheckpointError as error:
            return replace(found, problem=error.found, expected=error.expected, todo=error.fix)
        notes = (*found.notes, *control.lines())
        return replace(found, what=control.title, family=control.family, notes=notes)
    if not found.path.is_file():
        return found
    if found.kind == "embedding":
        try:
            return replace(found, notes=(*found.notes, check_vectors(found.path)))
        except CheckpointError as error:
            return replace(found, problem=error.found, expected=error.expected, todo=error.fix)
    if found.kind != "lora":
        return found
    try:
        adapter = read_adapter(found.path)
        check_alphas(adapter)
        return replace(found, notes=(*found.notes, *adapter.notes()))
    except AdapterError as error:
        return replace(found, problem=error.found, expected=error.expected, todo=error.fix)


def place(model: str) -> Path:
    """The path of what is here, also by the name of a checkpoint that was opened before.

    Raises:
        CheckpointError: there is no such thing; nothing is fetched to be looked at.
    """
    from ..checkpoints.find import here, refuse_link
    from ..engines.errors import CheckpointError

    if path := here(model):
        return path
    refuse_link(model)
    raise CheckpointError(
        f"{model[:200]} does not exist here",
        expected="a file or folder, or a name that `latentrt models` lists",
        fix="Check the path. A model of a hub is fetched when it is opened:"
        " latentrt generate PROMPT -m ORG/NAME",
    )


def _print_samplers(*, as_json: bool) -> None:
    from ..runtime.sampling.samplers import SAMPLERS

    names = {name: sampler.about for name, sampler in SAMPLERS.items()}
    width = max(map(len, names))
    print(json.dumps(names) if as_json else "\n".join(f"{name:<{width}}  {names[name]}" for name in names))


def _print_table(model: Manifest | Checkpoint, sampler: str, steps: int, *, as_json: bool) -> None:
    from ..runtime.sampling.names import resolve
    from ..runtime.sampling.samplers import make_table
    from ..runtime.sampling.step_lists import list_of_model

    step_list = list_of_model(model.vectors, model.time_ids)
    table = make_table(resolve(sampler, model.scheduler, step_list), steps)
    print(json.dumps(table.to_json()) if as_json else table.format())


def _print_report(found: Report, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_json()))
        return
    show(f"{found.path}: {found.what}")
    show(f"  {found.size / 1e6:.1f} MB, {found.tensors} tensors{_stored(found.types)}")
    for name, part in found.parts.items():
        show(f"  {name}: {part.size / 1e6:.1f} MB, {part.tensors} tensors{_stored(part.types)}")
    if found.missing:
        show(f"  missing: {', '.join(found.missing)}")
    if found.predicts:
        zero = ", with zero terminal SNR" if found.zero_terminal_snr else ""
        show(f"  its UNet predicts {found.predicts}{zero}, by {found.predicts_by}")
    if found.channels:
        show(f"  {found.channels} input channels{' (inpainting)' if found.channels == 9 else ''}")
    for kind, fits in found.adapters.items():
        widths = [f"{width} numbers in {name}" for name, width in fits.items()] if kind == "embedding" else []
        show(f"  fits: {kind} for {', '.join(widths) or fits}")
    for note in found.notes:
        show(f"  {note}")
    if found.problem:
        use = "opened" if found.kind == "checkpoint" else "used"
        show(f"  cannot be {use}: {found.problem}; expected {found.expected}")
    show(f"  {found.todo}")


def _stored(types: Mapping[str, int]) -> str:
    """The types that tensors are stored in, and how many in each where there are several."""
    if len(types) < 2:
        return "".join(f" in {name}" for name in types)
    return f" ({', '.join(f'{count} in {name}' for name, count in types.items())})"


def _print_package(package: Package, *, as_json: bool) -> None:
    manifest = package.manifest
    if as_json:
        print(json.dumps(manifest.to_json()))
        return
    defaults = manifest.defaults
    show(
        f"{manifest.name}: {manifest.family}, {manifest.dtype}, schema {manifest.schema}, {manifest.producer}"
    )
    show(
        f"defaults: {defaults.width}x{defaults.height}, {defaults.num_inference_steps} steps of"
        f" {defaults.sampler or manifest.scheduler.get('_class_name')}, guidance {defaults.guidance_scale:g}"
    )
    if rounded := manifest.quantised:
        print(
            f"quantised: the UNet in {rounded['format']}, {len(rounded['rounded'])} products,"
            f" {len(rounded['left_out'])} left out, relative L2 {rounded['relative_l2']:.2g}"
        )
    for one in manifest.fused:
        strength, used = _strength(one.strength), f"{one.applied} of {one.total} keys"
        print(f"fused: {one.name} at strength {strength}, {used}, sha256 {one.sha256[:12]}")
    for name, net in manifest.nets.items():
        weights = sum(manifest.files[name].size for name in net.weights) / 1e6
        print()
        show(f"{name}  {net.graph}, weights {weights:.1f} MB, {len(net.fp32_islands)} fp32 islands")
        _print_tensors("in ", [spec.to_json() for spec in net.spec.inputs])
        _print_tensors("out", [spec.to_json() for spec in net.spec.outputs])


def _strength(value: float | Mapping[str, Any]) -> str:
    return json.dumps(value) if isinstance(value, Mapping) else f"{value:g}"


def _print_tensors(kind: str, specs: list[dict[str, Any]]) -> None:
    for spec in specs[:4]:
        show(f"  {kind} {spec['name']}  {spec['dtype']} ({', '.join(map(str, spec['shape']))})")
    if len(specs) > 4:
        show(f"  {kind} … {len(specs) - 4} more (--json has all)")


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
    show_lines(found.parameters or "no parameters")
    if found.record:
        print(json.dumps(found.record, indent=1))
