"""Passes that rewrite a graph, each with its reason. None of them touches a weight."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from ...checkpoints.graphs.weights import is_weight

_SCOPE = "latentrt.scope"
_SMALL = 1024  # bytes of a constant that may stay in a graph


def clean(model: ir.Model) -> None:
    """Run all passes in order, some twice because others feed them."""
    for run in (infer_types, fold, constant_reshapes, drop_identities, fold, drop_identities):
        run(model)
    for run in (causal_masks, float_maxima, merge_unsqueezes, share, lift, tidy, name_nodes):
        run(model)


def infer_types(model: ir.Model) -> None:
    """Give every value its type: torch leaves it open within the operators it takes apart."""
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None and (found := _type(node)) is not None:
                value.dtype = found


def _type(node: ir.Node) -> ir.DataType | None:
    if node.op_type == "Constant":
        return node.attributes["value"].as_tensor().dtype if "value" in node.attributes else None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    fixed = {"Shape": ir.DataType.INT64, "LessOrEqual": ir.DataType.BOOL}
    like = node.inputs[1 if node.op_type == "CastLike" else 0] if node.inputs else None
    return fixed.get(node.op_type, like.dtype if like is not None else None)


def fold(model: ir.Model) -> None:
    """Compute what depends on constants alone, and replace sequences by Split.

    Weights are not folded: a transposed weight would be a second copy without a name.
    """

    def may_fold(node: ir.Node) -> bool | None:  # None leaves it to onnxscript
        return False if any(map(is_weight, node.inputs)) else None

    fold_constants = cast(Any, optimizer).fold_constants  # onnxscript's own types are incomplete
    fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=_SMALL,
        output_size_limit=_SMALL,
        should_fold=may_fold,
    )
    common.RemoveUnusedNodesPass()(model)


def constant_reshapes(model: ir.Model) -> None:
    """Give Reshape a constant shape wherever zeros (as in the input) and one -1 (the rest) can express it.

    torch computes every shape from the sizes of the first input, which makes the keys and values of
    cross-attention depend on the latent. Constant shapes also halve the number of nodes.
    """
    for node in model.graph:
        source, target = node.inputs[0] if node.inputs else None, node.outputs[0].shape
        if node.op_type != "Reshape" or source is None or source.shape is None or target is None:
            continue
        dims = [_known(dim, source.shape, axis) for axis, dim in enumerate(target)]
        unknown = [axis for axis, dim in enumerate(dims) if dim is None]
        if unknown:
            dims[unknown[-1]] = -1
        if len(unknown) <= 1:
            shape = _constant(model.graph, node, dims)
        else:
            shape = _partial_shape(model.graph, node, dims)
        if shape is not None:
            node.replace_input_with(1, shape)
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _known(dim: int | ir.SymbolicDim, source: ir.Shape, axis: int) -> int | None:
    if isinstance(dim, int):
        return dim
    return 0 if axis < len(source) and dim.value is not None and source[axis] == dim else None


def _partial_shape(graph: ir.Graph, node: ir.Node, dims: Sequence[int | None]) -> ir.Value | None:
    """The shape as a Concat in which only the dimensions that no constant can express are computed."""
    shape = node.inputs[1]
    concat = shape.producer() if shape is not None else None
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != len(dims):
        return None
    parts = [
        _constant(graph, node, [dim]) if dim is not None else part
        for dim, part in zip(dims, concat.inputs, strict=True)
    ]
    joined = ir.val(f"{node.name}/shape", ir.DataType.INT64)
    graph.insert_before(node, ir.node("Concat", parts, {"axis": 0}, name=joined.name, outputs=[joined]))
    return joined


def _constant(graph: ir.Graph, before: ir.Node, numbers: Sequence[int | None]) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, np.int64))
    value = ir.val(None, const_value=tensor)
    graph.insert_before(before, ir.node("Constant", [], {"value": tensor}, outputs=[value]))
    return value


def drop_identities(model: ir.Model) -> None:
    """Remove nodes that return their input: Expand, Slice and Cast to the same, division by one, Identity.

    diffusers expands timesteps to the rows of the latent. With as many timesteps as rows that changes
    nothing, but would tie the time embedding to the latent. Residuals and attention divide by factors that
    are one.
    """
    for node in list(model.graph):
        keeps = node.op_type in ("Expand", "Cast", "Slice")
        if node.op_type == "Div":
            divisor = _array(node.inputs[1])
            keeps = divisor is not None and divisor.size == 1 and float(divisor.item()) == 1.0
        source, target = node.inputs[0] if keeps else None, node.outputs[0]
        if source is not None and not target.is_graph_output() and _same(source, target):
            ir.convenience.replace_all_uses_with(target, source)
            model.graph.remove(node, safe=True)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """A constant's numbers; None for weights and computed values."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None and not is_weight(value) else None
    return None if tensor is None else tensor.numpy()


def _same(source: ir.Value, target: ir.Value) -> bool:
    if source.shape is None or source.dtype != target.dtype:
        return False
    known = all(isinstance(dim, int) or dim.value is not None for dim in source.shape)
    return known and source.shape == target.shape


def causal_masks(model: ir.Model) -> None:
    """Replace causal masks by the attribute `is_causal`: fused kernels know the attribute, not the mask."""
    for node in model.graph:
        if node.op_type != "Attention" or len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        mask = _mask(node.inputs[3])
        if mask is not None and np.array_equal(mask, np.tril(np.ones_like(mask))):
            node.replace_input_with(3, None)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    common.RemoveUnusedNodesPass()(model)


def _mask(value: ir.Value) -> npt.NDArray[np.bool_] | None:
    """The constant boolean mask (rows, columns) that `value` is, or is expanded from."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Expand":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    if producer is None or producer.op_type != "LessOrEqual":
        return None
    left, right = map(_array, producer.inputs)
    if left is None or right is None:
        return None
    mask: npt.NDArray[np.bool_] = np.less_equal(left, right)
    return np.reshape(mask, mask.shape[-2:]) if mask.size == mask.shape[-1] * mask.shape[-2] else None


def float_maxima(model: ir.Model) -> None:
    """Look for the largest of booleans, such as where the prompt ends, among floats and not among integers.

    ONNX Runtime's CUDA provider has no ArgMax of integers, and would copy them to the CPU and back.
    """
    for node in model.graph:
        cast = node.inputs[0].producer() if node.op_type == "ArgMax" and node.inputs[0] is not None else None
        if cast is None or cast.op_type != "Cast" or len(list(cast.outputs[0].uses())) > 1:
            continue
        source = cast.inputs[0]
        if source is not None and source.dtype == ir.DataType.BOOL:
            cast.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            cast.outputs[0].dtype = ir.DataType.FLOAT


def merge_unsqueezes(model: ir.Model) -> None:
    """Replace a chain of Unsqueezes, as behind each projection of the time embedding, by one."""
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Unsqueeze" else None
        before = source.producer() if source is not None else None
        if before is None or before.op_type != "Unsqueeze" or node.outputs[0].shape is None:
            continue
        inner, outer = _array(before.inputs[1]), _array(node.inputs[1])
        if inner is None or outer is None or before.outputs[0].shape is None:
            continue
        rank = len(node.outputs[0].shape)
        second = [int(axis) % rank for axis in np.atleast_1d(outer)]
        kept = [axis for axis in range(rank) if axis not in second]
        first = [kept[int(axis) % (rank - len(second))] for axis in np.atleast_1d(inner)]
        node.replace_input_with(0, before.inputs[0])
        node.replace_input_with(1, _constant(model.graph, node, sorted(first + second)))
    common.RemoveUnusedNodesPass()(model)


def share(model: ir.Model) -> None:
    """Compute equal things once: every block computes the activation of the time embedding anew."""
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def lift(model: ir.Model) -> None:
    """Make small constants initializers, one for equal values: engines expect them there."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    # Not onnx-ir's own pass: it would also merge weights that happen to be equal, and a name would be lost.
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in model.graph.initializers.values():
        array = _array(value)
        if array is None or array.nbytes > _SMALL:
            continue
        same = first.setdefault((value.dtype, array.shape, array.tobytes()), value)
        if same is not value:
            ir.convenience.replace_all_uses_with(value, same)
    common.RemoveUnusedNodesPass()(model)


def name_nodes(model: ir.Model) -> None:
    """Name nodes after their module and operator, as `mid_block.resnets.0.conv1/Conv`.

    fp32 islands are lists of node names, so names must not depend on the release of torch.
    """
    taken: Counter[str] = Counter()
    for node in model.graph:
        scope = str(cast(dict[str, str], node.meta).get(_SCOPE, ""))
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}.{taken[name]}"


def tidy(model: ir.Model) -> None:
    """Drop torch's metadata: each node's origin, which is most of the file, and the producer's name."""
    for node in model.graph:
        node.meta[_SCOPE] = _scope(node)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "latentrt", ""
    common.NameFixPass()(model)
    common.TopologicalSortPass()(model)


def _scope(node: ir.Node) -> str:
    """The path of a node's module, from torch's list of nested modules, without the wrapper's own name."""
    written = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    scopes = [str(scope) for scope in ast.literal_eval(written)][:-1]
    path = re.sub(r"__dict__\['_modules'\]\['(\w+)'\]", r"\1", scopes[-1] if scopes else "")
    return re.sub(r"^(net$|net\.|_empty_nn.*)", "", path)
