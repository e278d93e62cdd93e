"""Give the loop graph the inputs of image prompts: a second attention beside each cross-attention.

IP-Adapter (Ye et al. 2023, arXiv 2308.06721, eq. 5), as diffusers' `IPAdapterAttnProcessor2_0` has it (0.42):
the queries that attend to the text attend to a picture's tokens too, with keys and values of their own, and
what comes of it is added before the output's projection.

    total = attention(q, k, v) + sum over groups g of mask_g * softmax(q image_keys_g) image_values_g

A group is what one softmax goes over: all the pictures of an adapter, or of those with masks each one. The
queries' usual factor 1 / sqrt(width) is in the keys, and the strength in the values or in the mask, so that
a group of zeros adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...engines import spec
from ...engines.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class _CrossAttention:
    """A cross-attention of the graph.

    Attributes:
        name: of its module.
        queries: (B, heads, L, width), before a scale and before casts.
        result: (B, heads, L, width), what the text gives.
        heads, width: of its keys.
        level: how often the latent has been halved.
    """

    name: str
    queries: ir.Value
    result: ir.Value
    heads: int
    width: int
    level: int


def add_image_prompts(loop: ir.Model, contract: spec.NetSpec) -> tuple[ir.Model, spec.NetSpec]:
    """The graph `unet_image_prompt` of `unet_controlled`, which stays as it is, and its contract.

    Args:
        loop: the loop graph.
        contract: its boundary.

    Raises:
        CheckpointError: the graph has no cross-attention by its name.
    """
    model = loop.clone()
    graph = model.graph
    attentions = _cross_attentions(graph, contract)
    prompted = spec.with_image_prompt(
        contract,
        attentions=[(item.heads, item.width) for item in attentions],
        levels=sorted({item.level for item in attentions}),
    )
    own = prompted.inputs[len(contract.inputs) :]
    added = {item.name: ir.val(item.name, graph.inputs[0].dtype, ir.Shape(item.shape)) for item in own}
    graph.inputs.extend(added.values())
    axis = _numbers(graph, "axis", [1])
    flat = _numbers(graph, "flat", [0, 0, 1, -1, 1])  # (B, G, 1, L, 1)
    masks = {
        name: _add(graph, graph[0], "Reshape", [value, flat], f"{name}/flat")
        for name, value in added.items()
        if name.startswith(spec.IMAGE_MASK)
    }
    for number, item in enumerate(attentions):
        keys, values = added[f"{spec.IMAGE_KEYS}{number}"], added[f"{spec.IMAGE_VALUES}{number}"]
        _attend(graph, item, keys, values, masks[f"{spec.IMAGE_MASK}{item.level}"], axis)
    graph.name = "unet_image_prompt"
    return model, prompted


def _attend(
    graph: ir.Graph, item: _CrossAttention, keys: ir.Value, values: ir.Value, mask: ir.Value, axis: ir.Value
) -> None:
    """Add to the result of an attention what its queries find in pictures."""
    uses = tuple(item.result.uses())
    users = {use.node for use in uses}
    before = next(node for node in graph if node in users)

    def make(part: str, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return _add(graph, before, operator, inputs, f"{item.name}/image/{part}", attributes)

    queries = make("queries", "Unsqueeze", item.queries, axis)  # (B, 1, heads, L, width)
    if keys.dtype == ir.DataType.FLOAT:
        shares = make("shares", "Softmax", make("scores", "MatMul", queries, keys), axis=-1)
    else:  # scores may be beyond fp16; those of so few tokens cost nothing in float32
        wide = make("wide_queries", "Cast", queries, to=ir.DataType.FLOAT)
        scores = make("scores", "MatMul", wide, make("wide_keys", "Cast", keys, to=ir.DataType.FLOAT))
        shares = make("shares", "Cast", make("wide_shares", "Softmax", scores, axis=-1), to=keys.dtype)
    found = make("masked", "Mul", make("values", "MatMul", shares, values), mask)  # (B, G, heads, L, width)
    total = make("total", "Add", item.result, make("sum", "ReduceSum", found, axis, keepdims=0))
    for use in uses:
        use.node.replace_input_with(use.idx, total)


def _add(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value],
    name: str,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """The result of an operator, in front of a node: in the type of its first input, or what it casts to."""
    output = ir.val(f"{name}.out", (attributes or {}).get("to", inputs[0].dtype))
    graph.insert_before(before, ir.node(operator, inputs, attributes, name=name, outputs=[output]))
    return output


def _numbers(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    """A constant of int64."""
    name = f"image_prompt/{name}"
    constant = ir.val(name, const_value=ir.tensor(np.array(values, np.int64), name=name))
    graph.register_initializer(constant)
    return constant


def _cross_attentions(graph: ir.Graph, contract: spec.NetSpec) -> list[_CrossAttention]:
    """Those of a graph, in the order of an IP-Adapter's layers."""
    nodes = {node.name or "": node for node in graph}
    numbers = [int(name.split(".")[1]) for name in nodes if name.startswith("down_blocks.")]
    levels = 1 + max(numbers, default=0)
    keys = {item.name: item.shape for item in contract.inputs}
    found: list[_CrossAttention] = []
    for name in spec.cross_attentions(contract):
        shape = keys[f"{spec.CONTEXT_INVARIANT}{name}.to_k"]  # turned where its scores are in float32
        heads, width = (size for size in shape if isinstance(size, int))
        queries, result = _ends(nodes, name)
        found.append(
            _CrossAttention(
                name=name,
                queries=queries,
                result=result,
                heads=heads,
                width=width,
                level=spec.attention_level(name, levels),
            )
        )
    return found


def _ends(nodes: Mapping[str, ir.Node], name: str) -> tuple[ir.Value, ir.Value]:
    """The queries of an attention and its result; it is written out where its scores are in float32."""
    whole = nodes.get(f"{name}/Attention")
    first = whole or nodes.get(f"{name}/Attention/scaled")
    last = whole or nodes.get(f"{name}/Attention/values")
    if first is None or last is None:
        raise CheckpointError(
            f"the UNet's graph has keys of {name}, and no attention of that name",
            expected="a UNet of Stable Diffusion's kind, with its nodes named after their modules",
            fix="Report the checkpoint; its graph cannot take an IP-Adapter.",
        )
    return _before_casts(first.inputs[0]), last.outputs[0]


def _before_casts(value: ir.Value | None) -> ir.Value:
    assert value is not None
    producer = value.producer()
    while producer is not None and producer.op_type == "Cast":
        inner = producer.inputs[0]
        assert inner is not None
        value, producer = inner, inner.producer()
    return value
