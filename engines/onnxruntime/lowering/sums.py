"""Sums that go into the kernel behind them, on ONNX Runtime's CUDA provider: bias and residual into a norm.

A residual block ends in y = (x W + b) + r, and the next one begins with a norm of y. As operators of their
own these are three kernels, each of which reads and writes the whole value. One of these does it all, and
hands y on as a further output (onnxruntime: contrib_ops/cuda/bert/skip_layer_norm.cc,
contrib_ops/cuda/diffusion/):

    SkipLayerNormalization    (x W) + b + r, and its layer normalisation
    SkipGroupNorm             x + b + r, and its group normalisation (group_norm.cc)
    BiasAdd                   (x W) + b + r, where no norm follows (bias_add.cc)

In half precision they add in half precision, bias first, as the operators did that they stand for; the
statistics of the norms are in float32 (1.31.1: group_norm_impl_kernel.cuh, AddSkipBias; and the machine code
of SkipLayerNormKernelSmall for sm_90, whose terms meet in HADD2 and whose sums in FADD).

None of them broadcasts as Add does, so a sum is taken only where its terms provably have one shape
(`shapes.py`). The projected time embedding is a row that is added to all pixels. Rows of the pictures, (B,
C), are what SkipGroupNorm takes in place of r. A row (1, C) for all pictures it takes as b, with zeros for r.

Needs onnx-ir, which is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .graph_images import CONTRIB, GraphImages, is_half_or_float, weight_shape
from .patterns import only_maker
from .shapes import Dim, Dims, shapes_of

if TYPE_CHECKING:
    import onnx_ir as ir


def lower_sums(model: ir.Model) -> None:
    """Move every sum of a graph that `lower_model` has laid out into the kernel behind it, in place."""
    _Sums(model.graph).run()


@dataclass(frozen=True, kw_only=True)
class _Residual:
    """A sum of two values of one shape, (x + bias) + skip.

    Attributes:
        x: of the shape of the sum, but for what `target` makes of it.
        bias: (C,), added along the last axis; None where there is none.
        target: the shape that (x + bias) is given before skip is added; None if that is its own.
        skip: the other term.
    """

    x: ir.Value
    bias: ir.Value | None
    target: ir.Value | None
    skip: ir.Value


class _Sums:
    """The sums of one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._images = GraphImages(graph)
        self._shapes: dict[ir.Value, Dims] = dict(shapes_of(graph))
        self._zeros: dict[tuple[Dim, Dim, object], ir.Value] = {}

    def run(self) -> None:
        """Norms first, as they save more than a sum alone."""
        for node in list(self._graph):
            if node.domain == "" and node.op_type == "LayerNormalization":
                self._layer_norm(node)
            elif node.domain == CONTRIB and node.op_type == "GroupNorm":
                self._group_norm(node)
        for node in list(self._graph):
            if node.domain == "" and node.op_type == "Add":
                self._bias_add(node)
        self._graph.sort()  # a norm may stand behind others that use the sum, which it makes now

    def _layer_norm(self, node: ir.Node) -> None:
        value, gamma, beta = (*node.inputs, None)[:3]
        shape = self._shape(value)
        axis, stash = node.attributes.get_int("axis", -1), node.attributes.get_int("stash_type", 1)
        if len(shape) != 3 or axis not in (-1, 2) or stash != 1 or len(node.outputs) > 1:
            return
        if self._shape(gamma) != shape[2:] or self._shape(beta) != shape[2:]:
            return
        found = self._residual(value)
        if value is None or found is None:
            return
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        inputs = [self._shaped(node, found), found.skip, gamma, beta, found.bias]
        # The outputs between the norm and the sum are for training, and no kernel makes them.
        self._replace(node, value, "SkipLayerNormalization", inputs, 3, epsilon=epsilon)

    def _group_norm(self, node: ir.Node) -> None:
        value, gamma, beta = node.inputs
        assert value is not None
        if (found := self._residual(value)) is not None:
            terms = (self._shaped(node, found), found.skip, found.bias)
        elif (row := self._row(value)) is not None:
            terms = row
        else:
            return
        attributes = {name: item.value for name, item in node.attributes.items()}
        x, skip, bias = terms
        self._replace(node, value, "SkipGroupNorm", [x, gamma, beta, skip, bias], 1, **attributes)

    def _bias_add(self, node: ir.Node) -> None:
        import onnx_ir as ir

        value = node.outputs[0]
        found = self._residual(value)
        if found is None or found.bias is None or len(self._shape(found.x)) != 3:
            return
        name, skip = f"{value.name}/biased", found.skip
        if found.target is not None:
            rows = self._images.constant(0, -1, *_numbers(self._shape(value)[-1:]))
            skip = self._images.insert(node, "Reshape", [skip, rows], f"{name}/rows")
        made = self._images.contrib(node, "BiasAdd", [found.x, found.bias, skip], name)
        if found.target is not None:
            made = self._images.insert(node, "Reshape", [made, found.target], f"{name}/shaped")
        self._shapes[made] = self._shape(value)
        ir.convenience.replace_all_uses_with(value, made)

    def _shape(self, value: ir.Value | None) -> Dims:
        """() where it is unknown, too."""
        return self._shapes.get(value, ()) if value is not None else ()

    def _terms(self, value: ir.Value | None) -> tuple[tuple[ir.Value, ir.Value], ...]:
        """The terms of a value that is a sum nobody outside the graph sees, in both orders; () of others."""
        node = value.producer() if value is not None else None
        if value is None or node is None or node.domain != "" or node.op_type != "Add":
            return ()
        first, second = node.inputs
        if first is None or second is None or value.is_graph_output() or not is_half_or_float(value):
            return ()
        return ((first, second), (second, first))

    def _residual(self, value: ir.Value | None) -> _Residual | None:
        shape = self._shape(value)
        found: _Residual | None = None
        for x, skip in self._terms(value):
            if not shape or self._shape(x) != shape or self._shape(skip) != shape:
                return None
            found = self._biased(x, skip)
            if found.bias is not None:
                break
        return found

    def _biased(self, value: ir.Value, skip: ir.Value) -> _Residual:
        """The product and the bias that a term consists of; the term itself where it has no bias."""
        reshape = only_maker(value, "Reshape")
        added = only_maker(reshape.inputs[0] if reshape is not None else value, "Add")
        columns = self._shape(value)[-1:]
        for x, bias in (added.inputs, reversed(added.inputs)) if added is not None else ():
            if x is not None and weight_shape(bias) == columns == self._shape(x)[-1:]:
                return _Residual(x=x, bias=bias, target=reshape and reshape.inputs[1], skip=skip)
        return _Residual(x=value, bias=None, target=None, skip=skip)

    def _shaped(self, before: ir.Node, found: _Residual) -> ir.Value:
        """x in the shape of the sum."""
        if found.target is None:
            return found.x
        return self._images.insert(before, "Reshape", [found.x, found.target], f"{found.x.name}/shaped")

    def _row(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
        """x, skip and bias of an image to whose pixels a row of its channels is added."""
        shape = self._shape(value)
        for x, row in self._terms(value):
            if len(shape) != 4 or self._shape(x) != shape:
                continue
            if self._shape(row) == (shape[0], 1, 1, shape[3]):
                return x, row, None
            if self._shape(row) == (1, 1, 1, shape[3]) and isinstance(shape[3], int):
                before = value.producer()
                assert before is not None
                flat = self._images.constant(shape[3])
                bias = self._images.insert(before, "Reshape", [row, flat], f"{value.name}/row")
                return x, self._zero_rows(before, x, shape), bias
        return None

    def _zero_rows(self, before: ir.Node, image: ir.Value, shape: Dims) -> ir.Value:
        """Zeros (B, C): a kernel that takes a bias wants rows of the pictures beside it."""
        import onnx_ir as ir

        key = (shape[0], shape[3], image.dtype)
        if key not in self._zeros:
            name = f"{image.name}/zeros"
            pictures = self._images.insert(before, "Shape", [image], f"{name}/pictures", start=0, end=1)
            pictures.type = ir.TensorType(ir.DataType.INT64)
            channels = self._images.constant(*_numbers(shape[3:]))
            size = self._images.insert(before, "Concat", [pictures, channels], f"{name}/size", axis=0)
            assert image.dtype is not None
            zero = ir.tensor(np.zeros(1, image.dtype.numpy()))
            rows = self._images.insert(before, "ConstantOfShape", [size], name, value=zero)
            rows.type = ir.TensorType(image.dtype)
            self._zeros[key] = rows
        return self._zeros[key]

    def _replace(
        self,
        norm: ir.Node,
        value: ir.Value,
        kind: str,
        inputs: Sequence[ir.Value | None],
        sum_at: int,
        **attributes: object,
    ) -> None:
        """Put a kernel in place of a norm; its output `sum_at` is `value`, which the norm is of."""
        import onnx_ir as ir

        others = [use for use in value.uses() if use.node is not norm]
        old, name = norm.outputs[0], f"{norm.outputs[0].name}/{kind}"
        assert value.dtype is not None
        outputs = [ir.Value(name="") for _ in range(sum_at + 1 if others else 1)]
        outputs[0].shape = old.shape
        for output, its_name in ((outputs[-1], f"{value.name}/{kind}"), (outputs[0], name)):
            output.name, output.type = its_name, ir.TensorType(value.dtype)
        given = inputs if inputs[-1] is not None else inputs[:-1]
        made = ir.node(kind, given, attributes, domain=CONTRIB, outputs=outputs, name=name)  # pyright: ignore[reportArgumentType]
        self._graph.insert_before(norm, made)
        for use in others:
            use.node.replace_input_with(use.idx, outputs[-1])
        self._shapes.update(dict.fromkeys((outputs[0], outputs[-1]), self._shape(value)))
        ir.convenience.replace_all_uses_with(old, outputs[0], replace_graph_outputs=True)
        outputs[0].name, old.name = old.name, name
        self._graph.remove(norm, safe=True)


def _numbers(dims: Dims) -> tuple[int, ...]:
    return tuple(size for size in dims if isinstance(size, int))
