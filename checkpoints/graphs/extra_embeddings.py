"""Give a text encoder rows of embeddings beyond its vocabulary, as an input: for textual inversion.

An id below the vocabulary's size V reads the table of the weights, as before and to the bit; an id V + i
reads row i of `extra_embeddings`. The table stays where it is: two rows are looked up and one is taken, where
joining the two tables would copy 75 to 130 MB in every call.

For all else in the graph an id beyond the vocabulary is 0. Encoders whose config has the old `eos_token_id`
of 2, and that is all of Stable Diffusion's, end a prompt at its largest id (transformers'
`CLIPTextTransformer.forward`). A new id must not become that; nor V - 1, as clipping would make it: in CLIP's
vocabulary that is the token that ends the prompt, and the first of several largest ids counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...engines import spec
from ...engines.errors import CheckpointError
from .weights import is_weight

_IDS = "input_ids"
_SAME_IDS = ("Cast", "Identity", "Reshape")
_BOOL = ir.DataType.BOOL


def add_extra_embeddings(model: ir.Model, contract: spec.NetSpec) -> spec.NetSpec:
    """Give the graph of a text encoder the input `extra_embeddings`, in place; returns its contract with it.

    Raises:
        CheckpointError: the graph does not look up its ids in one table of the weights.
    """
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name == _IDS)
    assert ids.dtype is not None
    lookup = _lookup(graph, ids)
    found = lookup.outputs[0]
    size, width = _table_shape(lookup)
    (float_dtype,) = {item.dtype for item in contract.outputs}
    wider = spec.with_extra_embeddings(contract, width=width, float_dtype=float_dtype)
    extra = ir.val(spec.EXTRA_EMBEDDINGS, graph.outputs[0].dtype, ir.Shape(wider.inputs[-1].shape))
    asking, reading = tuple(ids.uses()), tuple(found.uses())

    before = next(node for node in graph if node in {use.node for use in asking})
    vocabulary = _constant(graph, "vocabulary", np.array(size, ids.dtype.numpy()))
    nothing = _constant(graph, "nothing", np.array(0, ids.dtype.numpy()))
    beyond = _insert(graph, before, "GreaterOrEqual", [ids, vocabulary], "beyond", _BOOL)
    known = _insert(graph, before, "Where", [beyond, nothing, ids], "known_ids", ids.dtype)
    behind = _insert(graph, before, "Sub", [ids, vocabulary], "behind", ids.dtype)
    row = _insert(graph, before, "Max", [behind, nothing], "row", ids.dtype)
    for use in asking:
        use.node.replace_input_with(use.idx, known)

    before = next(node for node in graph if node in {use.node for use in reading})
    mine = _insert(graph, before, "Gather", [extra, row], "embedding", extra.dtype)
    assert found.dtype is not None
    if found.dtype != extra.dtype:  # it lies in an island
        mine = _insert(graph, before, "Cast", [mine], "widened", found.dtype, to=found.dtype)
    last = _constant(graph, "last_axis", np.array([2], np.int64))
    for_each = _insert(graph, before, "Unsqueeze", [beyond, last], "beyond_vocabulary", _BOOL)
    chosen = _insert(graph, before, "Where", [for_each, mine, found], "chosen", found.dtype)
    chosen.shape = found.shape
    for use in reading:
        use.node.replace_input_with(use.idx, chosen)
    graph.inputs.append(extra)
    return wider


def _lookup(graph: ir.Graph, ids: ir.Value) -> ir.Node:
    """The node that looks the ids up in the table of the weights."""
    found = [
        node
        for node in graph
        if node.op_type == "Gather" and _before(node.inputs[1]) is ids and is_weight(_before(node.inputs[0]))
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"the text encoder's graph looks its ids up in {len(found)} tables",
            expected="one table of the embeddings of tokens, as in CLIP",
            fix="Report the checkpoint; its graph cannot take further embeddings.",
        )
    return found[0]


def _before(value: ir.Value | None) -> ir.Value | None:
    """Where ids or a table come from, before casts and the like."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in _SAME_IDS:
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    return value


def _table_shape(lookup: ir.Node) -> tuple[int, int]:
    """The size of the vocabulary, and the width of an embedding."""
    table = _before(lookup.inputs[0])
    assert table is not None
    assert table.shape is not None
    size, width = table.shape
    assert isinstance(size, int)
    assert isinstance(width, int)
    return size, width


def _constant(graph: ir.Graph, part: str, number: spec.Array) -> ir.Value:
    name = f"{spec.EXTRA_EMBEDDINGS}/{part}"
    tensor = ir.tensor(number, name=name)
    value = ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value],
    part: str,
    dtype: ir.DataType | None,
    **attributes: int,
) -> ir.Value:
    """A new node in front of another, with one output."""
    name = f"{spec.EXTRA_EMBEDDINGS}/{part}"
    output = ir.val(name, dtype)
    graph.insert_before(before, ir.node(kind, inputs, attributes, name=f"{name}/{kind}", outputs=[output]))
    return output
