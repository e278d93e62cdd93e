"""Lowers a package's graph for ONNX Runtime's CUDA provider: GroupNorm kernels, and images laid out NHWC.

The provider has no kernel for the standard `GroupNormalization`, which therefore falls apart into primitives.
It has one for `com.microsoft.GroupNorm`: NHWC only, gamma and beta in float32, SiLU included on request
(onnxruntime: core/graph/contrib_ops/diffusion_defs.cc, contrib_ops/cuda/diffusion/group_norm.cc). So the
images between two of them may as well stay NHWC, which is what tensor cores want: convolutions become
`com.microsoft.NhwcConv` (contrib_ops/cuda/diffusion/nhwc_conv.cc), whose weight is (M, kH, kW, C / group).

The provider's own option `prefer_nhwc` uses the same convolution, but the optimiser behind it pushes no
transpose through a Resize in a CUDA build, and weighs each one at a Concat. Here one walk over the graph
decides the layout of every image (`lowering/graph_images.py`). Before it transformer blocks are lowered
(`cuda_blocks.py`), and behind it sums go into the norms that follow them (`sums.py`).

Only engines are lowered, never packages. Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...package import Package
from .cuda_blocks import lower_blocks
from .files import read_graph, write_graph
from .graph_images import CONTRIB, FIRST, LAST, GraphImages, Image, is_half_or_float, numbers_of, weight_shape
from .sums import lower_sums

if TYPE_CHECKING:
    import onnx_ir as ir

# Of what becomes of a graph here: raised with every change of it, so that a graph in an engine store is never
# taken for the one that would be made today.
REVISION = 2
_MOST_CHANNELS_PER_GROUP = 512  # kMaxSize in contrib_ops/cuda/diffusion/group_norm_common_base.h
_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Max", "Min", "Clip", "Cast", "Round", "Identity"),
    *("Sigmoid", "Swish", "Gelu", "Relu", "Tanh"),
)


def lower(package: Package, net: str, folder: Path) -> Path:
    """Write the lowered graph of one net as `folder`/`net`.onnx.

    Inputs and outputs keep names, dtypes and shapes. The weights stay in the package: the graph names byte
    ranges of its weights file, and `give_weights` tells a session where that lies.

    Args:
        package: the package, which is only read.
        net: a key of its manifest's nets.
        folder: where to write; made if missing.

    Raises:
        BackendError: onnx-ir is not installed.
        PackageError: onnx-ir cannot read the graph.
    """
    model = read_graph(package, net)
    lower_model(model)
    return write_graph(model, folder / f"{net}.onnx")


def lower_model(model: ir.Model) -> None:
    """The lowering itself, in place; see `lower`. What the CUDA kernels do not take stays as it is."""
    import onnx_ir.passes.common as passes

    lower_blocks(model)
    _Walk(model).run()
    model.opset_imports[CONTRIB] = 1
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)  # a sum goes by who uses its terms
    lower_sums(model)
    passes.RemoveUnusedNodesPass()(model)


class _Walk:
    """One walk over the graph, in topological order. A rule returns whether it has settled its node."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._images = GraphImages(model.graph)
        self._fused: set[ir.Node] = set()
        self._rules: dict[str, Callable[[ir.Node], bool]] = {
            "Conv": self._conv,
            "GroupNormalization": self._group_norm,
            "Concat": self._concat,
            "Resize": self._resize,
            "Reshape": self._reshape,
            "Transpose": self._transpose,
            "Shape": self._shape,
            "ReduceMean": self._reduce_mean,
            **dict.fromkeys(_ELEMENTWISE, self._elementwise),
        }

    def run(self) -> None:
        """Every node that no rule settles, and every output, gets the layout it had."""
        for node in list(self._graph):
            rule = self._rules.get(node.op_type) if node.domain == "" else None
            if node in self._fused or (rule is not None and rule(node)):
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and self._images.is_turned(value):
                    node.replace_input_with(index, self._images.first(node, value))
        self._images.restore_outputs()

    def _conv(self, node: ir.Node) -> bool:
        data, weight = node.inputs[:2]
        shape = weight_shape(weight)
        if data is None or weight is None or shape is None or len(shape) != 4:
            return False
        self._images.learn(data, Image(4))
        self._images.learn(weight, Image(4))
        image = self._images.learn(node.outputs[0], Image(4, shape[0]))
        if not _cudnn_takes(node):
            return False
        # The weight turns like an image, (M, C, kH, kW) to (M, kH, kW, C); ONNX Runtime folds that at load.
        inputs = [self._images.last(node, data), self._images.last(node, weight)]
        node.domain, node.op_type = CONTRIB, "NhwcConv"
        return self._images.turn(node, inputs, image)

    def _group_norm(self, node: ir.Node) -> bool:
        data, gamma, beta = node.inputs[:3]
        image, shape = self._images.image(data), weight_shape(gamma)
        groups = node.attributes.get_int("num_groups", 0)
        if data is None or image is None or shape is None:
            return False
        image = self._images.learn(node.outputs[0], Image(image.rank, shape[0]))
        if not _kernel_takes(data, shape[0], groups):
            return False
        inputs = [self._images.last(node, data), self._float(node, gamma), self._float(node, beta)]
        self._to_contrib(node, groups)
        if image.rank == 4:
            return self._images.turn(node, inputs, image)
        # The kernel wants four dimensions: (B, L, C) as (B, 1, L, C).
        one = self._images.constant(1)
        inputs[0] = self._images.insert(node, "Unsqueeze", [inputs[0], one], f"{node.outputs[0].name}/row")
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        flat = self._images.behind(node, "Squeeze", [one], f"{node.outputs[0].name}/flat")
        squeeze = flat.producer()
        assert squeeze is not None
        return self._images.turn(squeeze, [], image)

    def _to_contrib(self, node: ir.Node, groups: int) -> None:
        """Rename the operator and its attributes; take in the SiLU behind it."""
        import onnx_ir as ir

        silu = _silu_behind(node.outputs[0])
        attributes = (
            ir.AttrFloat32("epsilon", node.attributes.get_float("epsilon", 1e-5)),
            ir.AttrInt64("groups", groups),
            ir.AttrInt64("activation", int(bool(silu))),
            ir.AttrInt64("channels_last", 1),
        )
        node.attributes.clear()
        node.attributes.update((attribute.name, attribute) for attribute in attributes)
        node.domain, node.op_type = CONTRIB, "GroupNorm"
        if silu:
            ir.convenience.replace_all_uses_with(silu[-1].outputs[0], node.outputs[0])
            self._fused.update(silu)
            self._graph.remove(silu, safe=True)

    def _float(self, node: ir.Node, value: ir.Value | None) -> ir.Value:
        import onnx_ir as ir

        assert value is not None
        if value.dtype == ir.DataType.FLOAT:
            return value
        full = self._images.insert(
            node, "Cast", [value], f"{node.outputs[0].name}/{value.name}", to=ir.DataType.FLOAT
        )
        full.dtype = ir.DataType.FLOAT
        return full

    def _elementwise(self, node: ir.Node) -> bool:
        scalars = [value is None or _is_scalar(value) for value in node.inputs]
        images = [
            self._images.image(value)
            for value, scalar in zip(node.inputs, scalars, strict=True)
            if not scalar
        ]
        known = [image for image in images if image is not None]
        if not known or len(known) < len(images) or len({image.rank for image in known}) > 1:
            return False
        wide = max(known, key=lambda image: image.channels or 0)  # the others broadcast to it
        return self._turn_if_any(node, scalars, wide)

    def _turn_if_any(self, node: ir.Node, scalars: Sequence[bool], image: Image) -> bool:
        """Turn a node that works in either layout, if one of its inputs is there channels-last."""
        if not any(self._images.has_last(value) for value in node.inputs):
            self._images.learn(node.outputs[0], image)
            return False
        inputs = [
            value if scalar else self._images.last(node, value)
            for value, scalar in zip(node.inputs, scalars, strict=True)
        ]
        return self._images.turn(node, inputs, image)

    def _concat(self, node: ir.Node) -> bool:
        import onnx_ir as ir

        images = [image for value in node.inputs if (image := self._images.image(value)) is not None]
        ranks = {image.rank for image in images}
        if node.attributes.get_int("axis", 0) != 1 or len(images) < len(node.inputs) or ranks != {4}:
            return False
        channels = [image.channels for image in images if image.channels is not None]
        total = sum(channels) if len(channels) == len(images) else None
        if not self._turn_if_any(node, [False] * len(images), Image(4, total)):
            return False
        node.attributes["axis"] = ir.AttrInt64("axis", 3)
        return True

    def _resize(self, node: ir.Node) -> bool:
        """Nearest only: that CUDA kernel takes any axes, the others just the last two."""
        data, roi, scales, sizes = (*node.inputs, None, None, None)[:4]
        nearest = node.attributes.get_string("mode", "nearest") == "nearest"
        mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        image = self._images.image(data)
        if image is None:
            return False
        self._images.learn(node.outputs[0], image)
        if not self._images.is_turned(data) or not nearest or roi is not None:
            return False
        if mode == "tf_crop_and_resize" or "axes" in node.attributes:
            return False
        inputs: list[ir.Value | None] = [data, None]
        for value, what in ((scales, "scales"), (sizes, "sizes")):
            name, order = f"{node.outputs[0].name}/{what}", self._images.constant(*LAST[4])
            inputs.append(value and self._images.insert(node, "Gather", [value, order], name))
        return self._images.turn(node, inputs[: len(node.inputs)], image)

    def _reshape(self, node: ir.Node) -> bool:
        """Between (B, C, H, W) and (B, C, H * W), as around the attention of a VAE."""
        image = self._images.image(node.inputs[0])
        if image is None or image.channels is None:
            return False
        flat = image.rank == 4 and numbers_of(node.inputs[1]) == (0, image.channels, -1)
        parts = _unflattens(node.inputs[1], image.channels) if image.rank == 3 else ()
        if not flat and not parts:
            return False
        if not self._images.has_last(node.inputs[0]):
            self._images.learn(node.outputs[0], Image(7 - image.rank, image.channels))
            return False
        count = self._images.constant(image.channels)
        shape = (
            self._images.constant(0, -1, image.channels)
            if flat
            else self._images.insert(node, "Concat", [*parts, count], f"{node.outputs[0].name}/shape", axis=0)
        )
        inputs = [self._images.last(node, node.inputs[0]), shape]
        return self._images.turn(node, inputs, Image(7 - image.rank, image.channels))

    def _transpose(self, node: ir.Node) -> bool:
        """A change of layout that the graph itself writes: free, where the other layout is there."""
        data = node.inputs[0]
        perm = tuple(node.attributes.get_ints("perm", ()))
        image = self._images.image(data)
        if data is None or perm not in (*LAST.values(), *FIRST.values()):
            return False
        if image is not None and perm == LAST[image.rank]:
            if not self._images.has_last(data):
                self._images.same(data, node.outputs[0], image)
                return False
            node.replace_input_with(0, self._images.last(node, data))
            node.op_type = "Identity"
            node.attributes.clear()
            return True
        if perm == FIRST[len(perm)] and not self._images.is_turned(data):
            self._images.same(node.outputs[0], data, Image(len(perm), _last_size(data)))
        return False

    def _shape(self, node: ir.Node) -> bool:
        image = self._images.image(node.inputs[0])
        if image is None or not self._images.is_turned(node.inputs[0]):
            return False
        begin, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", image.rank)
        node.attributes.clear()
        places = self._images.constant(*FIRST[image.rank][begin:end])
        self._images.behind(node, "Gather", [places], f"{node.outputs[0].name}/nchw")
        return True

    def _reduce_mean(self, node: ir.Node) -> bool:
        """Over everything but the batch, the layout does not matter."""
        image = self._images.image(node.inputs[0])
        axes = numbers_of(node.inputs[1]) if len(node.inputs) > 1 else None
        whole = image is not None and axes is not None and sorted(axes) == list(range(1, image.rank))
        return whole and self._images.is_turned(node.inputs[0]) and not node.attributes.get_int("keepdims", 1)


def _last_size(value: ir.Value) -> int | None:
    """The size of the last dimension, where a bias is added to it."""
    maker = value.producer()
    shapes = map(weight_shape, maker.inputs) if maker is not None and maker.op_type == "Add" else ()
    return next((shape[0] for shape in shapes if shape is not None and len(shape) == 1), None)


def _unflattens(target: ir.Value | None, channels: int) -> Sequence[ir.Value | None]:
    """The sizes B, H and W of a computed shape (B, C, H, W); empty if it is none."""
    maker = target.producer() if target is not None else None
    parts = maker.inputs if maker is not None and maker.op_type == "Concat" else ()
    if len(parts) != 4 or numbers_of(parts[1]) != (channels,):
        return ()
    # A 0 copies the size at its own place, which is another one in the other layout.
    return () if (0,) in map(numbers_of, parts[2:]) else (parts[0], *parts[2:])


def _kernel_takes(data: ir.Value, channels: int, groups: int) -> bool:
    """The limits of LaunchGroupNormKernel in contrib_ops/cuda/diffusion/group_norm_impl.cu.

    A thread works on two channels of one group, a block on whole groups of up to 512 channels together.
    Before opset 21 gamma had one number per group: `channels`, its size, is `groups` then, an odd share of 1.
    """
    if groups < 1 or channels % groups or not is_half_or_float(data):
        return False
    share = channels // groups
    return share % 2 == 0 and share <= _MOST_CHANNELS_PER_GROUP


def _cudnn_takes(node: ir.Node) -> bool:
    """Whether NhwcConv runs on the GPU: the CUDA provider hands asymmetric padding to the CPU."""
    pads = tuple(node.attributes.get_ints("pads", (0, 0, 0, 0)))
    explicit = (
        node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET" and "kernel_shape" in node.attributes
    )
    return explicit and pads[:2] == pads[2:] and is_half_or_float(node.outputs[0])


def _silu_behind(value: ir.Value) -> list[ir.Node]:
    """The nodes of x * sigmoid(x) where nobody else sees x; empty if there are none such."""
    users = [use.node for use in value.uses()]
    kinds = sorted(user.op_type for user in users)
    if value.is_graph_output() or (kinds != ["Mul", "Sigmoid"] and kinds != ["Swish"]):
        return []
    last = next(user for user in users if user.op_type != "Sigmoid")
    if last.outputs[0].is_graph_output() or last.attributes.get_float("alpha", 1.0) != 1.0:
        return []
    if kinds == ["Swish"]:
        return [last]
    sigmoid = next(user for user in users if user.op_type == "Sigmoid")
    gate = sigmoid.outputs[0]
    alone = not gate.is_graph_output() and [use.node for use in gate.uses()] == [last]
    return [sigmoid, last] if alone else []


def _is_scalar(value: ir.Value) -> bool:
    """One number, of no rank above an image's: it broadcasts alike in both layouts."""
    shape = value.shape
    return shape is not None and len(shape) <= 3 and all(size == 1 for size in shape)
