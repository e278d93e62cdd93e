"""A package whose UNet is rounded, made of one that is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...checkpoints.graphs.weights import WEIGHTS
from ...checkpoints.stages import OnProgress, stages
from ...engines.errors import NumericError, UsageError
from ...engines.heap import give_back_heap
from ...engines.net_weights import net_tensors, weight_values
from ...engines.onnxruntime.lowering.files import open_as_written, read_graph
from ...engines.package import Package, write_manifest
from ...engines.safetensors_format import TensorRange, write_file
from ...engines.spec import NETS, Array
from ...engines.tolerances import decibels, relative_l2
from ..target import check_target, complete
from .formats import FORMATS, Format
from .graph import RoundedGraph
from .inputs import PROBED_CELLS, PROMPTS, SEEN, STEPS, UNSEEN, Predict, drawn_pictures
from .places import along, find_places
from .ranges import Inputs, measure_ranges
from .rounding import Rounding, plan_rounding, rounded_weight
from .sensitivity import without_sensitive

if TYPE_CHECKING:
    import onnx_ir as ir

_PART = "unet"
# ONNX's number of a type -> safetensors' name, of weights that stay as they are.
_STORED = {1: "F32", 10: "F16", 11: "F64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2"}


Judge = Callable[[Format, float, float], None]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """What came of it.

    Attributes:
        package: the new one.
        rounding: what was done.
        relative_l2: of the UNet's output, over all calls of pictures that nothing was measured on.
        picture_db: of those pictures, the mean.
    """

    package: Package
    rounding: Rounding
    relative_l2: float
    picture_db: float


def check_bars(format_: Format, distance: float, likeness: float) -> None:
    """Raise NumericError for what is further off than the format's bars."""
    if distance <= format_.bar and likeness >= format_.picture_bar:
        return
    raise NumericError(
        f"the UNet in {format_.name} is {distance:.2g} (relative L2) from what it was, and pictures of it"
        f" {likeness:.1f} dB",
        expected=f"at most {format_.bar:.2g}, and at least {format_.picture_bar:g} dB",
        fix="Take another format, or the package as it is.",
    )


def quantise_package(
    package: Package,
    output: Path,
    *,
    format: str,
    overwrite: bool = False,
    progress: OnProgress | None = None,
    judge: Judge = check_bars,
) -> Rounded:
    """Write a package that draws with a rounded UNet; everything else of it is a copy.

    Ranges are measured on a few small pictures that the package draws, and the rounded UNet is compared on
    others: in the arithmetic of the format itself, whatever this processor has instructions for.

    Args:
        package: that `latentrt export` wrote.
        output: the folder to make.
        format: of FORMATS.
        overwrite: replace an existing package, once the new one is complete.
        progress: called with each stage as it begins.
        judge: raises for what is not to be written, from the format, the relative L2 and the dB.

    Raises:
        UsageError: no such format, the package cannot be rounded, or `output` exists.
        NumericError: the rounded UNet, or a picture of it, is further off than the format's bar.
        PackageError: the package's graphs or weights cannot be read.
        StorageError: the disk is full, or the folder cannot be written.
    """
    chosen = _checked(package, format)
    check_target(output, overwrite)
    begin = stages(5, progress)
    begin("draw")
    seen = drawn_pictures(package, SEEN)
    begin("measure")
    rounding = plan(package, chosen, [call for picture in seen for call in picture.calls])
    with complete(output, overwrite) as folder:
        begin("round")
        made = write_rounded(package, folder, rounding)
        begin("compare")
        distance, likeness = compare(package, made)
        judge(chosen, distance, likeness)
        begin("package")
        found = {"relative_l2": distance, "picture_db": likeness}
        drawn = {"drawn": {"prompts": len(PROMPTS), "steps": STEPS}}
        short = {name: float(f"{value:.3g}") for name, value in found.items()}
        facts = {**made.manifest.quantised, **short, **drawn}
        write_manifest(folder, replace(made.manifest, files={}, quantised=facts))
    return Rounded(package=Package.open(output), rounding=rounding, relative_l2=distance, picture_db=likeness)


def write_rounded(package: Package, folder: Path, rounding: Rounding) -> Package:
    """Write a rounded package, not compared yet, into an empty folder. Raises PackageError, StorageError."""
    _Writing(package, folder, rounding).write()
    facts = {
        "format": rounding.format.name,
        "capability": rounding.format.capability,
        "rounded": [place.name for place in rounding.places],
        "left_out": list(rounding.left_out),
    }
    return write_manifest(folder, replace(package.manifest, files={}, quantised=facts))


def _checked(package: Package, name: str) -> Format:
    if name not in FORMATS:
        raise UsageError(
            f"the format is {name!r:.40}", expected=f"one of {', '.join(FORMATS)}", fix="Pass one of these."
        )
    manifest = package.manifest
    if package.elsewhere:
        raise UsageError(
            f"{manifest.name} is a checkpoint, whose weights are in the files it came in",
            expected="a package with weights of its own",
            fix="Export it first: latentrt export CHECKPOINT -o PACKAGE",
        )
    if manifest.quantised or "unet" not in manifest.nets:
        what = f"is in {manifest.quantised['format']} already" if manifest.quantised else "has no UNet"
        raise UsageError(
            f"the package {manifest.name!r} {what}",
            expected="a package of a diffusion model in fp16 or fp32",
            fix="Take the package that it was made of.",
        )
    return FORMATS[name]


def plan(package: Package, format_: Format, calls: Sequence[Inputs]) -> Rounding:
    """What to round of a package's UNet: by ranges measured on these calls, and by what its output says."""
    rounding = plan_by_ranges(package, format_, calls)
    if not rounding.data:
        return rounding
    (small,) = drawn_pictures(package, SEEN[:1], cells=PROBED_CELLS)
    rounding = without_sensitive(package, "unet", rounding, small.calls[::2])
    give_back_heap()
    return rounding


def plan_by_ranges(package: Package, format_: Format, calls: Sequence[Inputs]) -> Rounding:
    """What to round of a package's UNet, by ranges measured on these calls alone."""
    model = read_graph(package, "unet")
    places = find_places(model, format_.operators)
    ranges = measure_ranges(package, "unet", places, calls) if format_.rounds_data else {}
    give_back_heap()  # each step opens the UNet anew: 10 GB of SDXL's
    stored, folder = net_tensors(package, "unet"), package.weights_folder("unet")
    weights = {place.weight: weight_values(stored[place.weight], folder) for place in places}
    normalised = {
        str(node.outputs[0].name): len(node.outputs[0].uses())
        for node in model.graph
        if node.op_type == "LayerNormalization"
    }
    return plan_rounding(format_, places, ranges, weights, normalised)


class _Writing:
    """A package's folder while it is filled."""

    def __init__(self, package: Package, folder: Path, rounding: Rounding) -> None:
        self._package, self._folder, self._rounding = package, folder, rounding
        self._format = rounding.format
        self._nets = [net for net in package.manifest.nets if net in NETS and NETS[net].part == _PART]
        self._tensors = {
            name: tensor for net in self._nets for name, tensor in net_tensors(package, net).items()
        }
        self._narrow = {place.weight: place for place in rounding.places}
        self._scales: dict[str, Array] = {}

    def write(self) -> None:
        """Everything but the manifest."""
        own = {name for net in self._nets for name in self._files(net)}
        for name in self._package.manifest.files:
            if name not in own:
                target = self._folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._package.path(name), target)
        (self._folder / _PART).mkdir(exist_ok=True)
        path = self._folder / _PART / WEIGHTS
        places = write_file(path, self._described(), self._content)
        for net in self._nets:
            model = read_graph(self._package, net)
            rounded = RoundedGraph(model, self._rounding)
            rounded.divide()
            self._bind(model, places)
            rounded.round(self._scales)
            import onnx_ir

            cast(Any, onnx_ir).save(model, self._folder / self._package.manifest.nets[net].graph)

    def _files(self, net: str) -> tuple[str, ...]:
        file = self._package.manifest.nets[net]
        return file.graph, *file.weights

    def _described(self) -> Mapping[str, tuple[str, Sequence[int]]]:
        """Type and shape of every weight as it will be stored."""
        format_ = self._format
        return {
            name: (format_.stored, format_.stored_shape(tensor.shape))
            if name in self._narrow
            else (_STORED[tensor.dtype], tensor.shape)
            for name, tensor in self._tensors.items()
        }

    def _content(self, name: str) -> memoryview:
        tensor = self._tensors[name]
        weight = weight_values(tensor, self._package.weights_folder(self._nets[0]))
        if (place := self._narrow.get(name)) is None:
            flat: Any = np.ravel(np.ascontiguousarray(weight))
            return memoryview(flat.view(np.uint8))
        if (factor := self._rounding.divided.get(place.data)) is not None:
            weight = weight.astype(np.float32) * along(place.input_axis, factor, weight.ndim)
        values, self._scales[name] = rounded_weight(self._format, place, weight)
        return memoryview(self._format.narrowed(values))

    def _bind(self, model: ir.Model, places: Mapping[str, TensorRange]) -> None:
        """Have a graph's weights lie in the new file, the narrow ones under their type."""
        import onnx_ir as ir

        narrow = getattr(ir.DataType, self._format.onnx)
        for name, value in model.graph.initializers.items():
            if name not in places:
                continue
            place = places[name]
            if name in self._narrow:
                value.dtype = narrow
            assert value.dtype is not None
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                place.offset,
                place.length,
                value.dtype,
                name=name,
                shape=cast(Any, value.shape),
                base_dir=self._folder / _PART,
            )


def compare(package: Package, rounded: Package) -> tuple[float, float]:
    """How far a rounded package is from what it was: relative L2 of the UNet's calls, and pictures' mean dB.

    They are the pictures of UNSEEN, drawn with either as the graphs say, node by node: nothing is fused, so
    narrow products are not what a processor has. One UNet is in memory at a time.
    """
    wanted: list[Array] = []
    before = drawn_pictures(package, UNSEEN, predict=_kept(_as_it_stands(package), wanted))
    calls = [call for picture in before for call in picture.calls]
    give_back_heap()
    predict = _as_it_stands(rounded)
    found = [predict(feeds) for feeds in calls]
    after = drawn_pictures(rounded, UNSEEN, predict=predict)
    likeness = [decibels(b.image, a.image) for a, b in zip(before, after, strict=True)]
    return relative_l2(np.stack(found), np.stack(wanted)), float(np.mean(likeness))


def _kept(predict: Predict, answers: list[Array]) -> Predict:
    def predict_and_keep(feeds: Inputs) -> Array:
        answers.append(predict(feeds))
        return answers[-1]

    return predict_and_keep


def _as_it_stands(package: Package) -> Predict:
    session = open_as_written(package, "unet")
    return lambda feeds: session.run(["prediction"], dict(feeds))[0].astype(np.float32)
