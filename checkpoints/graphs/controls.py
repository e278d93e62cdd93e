"""Give the loop graph the inputs of controls: residuals of a ControlNet, features of a T2I-Adapter.

They are added where diffusers' `UNet2DConditionModel.forward` adds them (0.42):

    residual_i    to the i-th skip connection, as the up blocks read it; the down path goes on without it
    residual_N    to the output of the middle block, behind the N skip connections
    feature_i     to the output of the last layer of the i-th down block, for the skip connection and the down
                  path alike: before the downsampler in a block with attention, behind it in one without. A
                  feature beyond the down blocks (SDXL has three) goes to the output of the middle block.

The graph is found by the names of its nodes, which are those of their modules (`export/graphs/passes.py`):
`up_blocks.1/Concat` joins a skip connection, its second input, to what the block has so far.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ...engines import spec
from ...engines.errors import CheckpointError

_JOIN = re.compile(r"up_blocks\.\d+/Concat(\.\d+)?")
_DOWN_BLOCK = re.compile(r"down_blocks\.(\d+)\.(\w+)\.")


@dataclass(frozen=True, kw_only=True)
class _Skip:
    """A skip connection.

    Attributes:
        join: the node that reads it.
        block: the number of the down block that makes it; -1 for the first convolution.
        layer: "resnets", "attentions" or "downsamplers", the kind of layer that makes it; "" for the first.
        level: how often the latent has been halved.
    """

    join: ir.Node
    block: int
    layer: str
    level: int

    @property
    def value(self) -> ir.Value:
        """As it is joined, in the type of the up block."""
        return _input(self.join, 1)


def add_controls(loop: ir.Model, contract: spec.NetSpec) -> tuple[ir.Model, spec.NetSpec]:
    """The graph `unet_controlled` of the graph `unet`, which stays as it is, and its contract.

    Args:
        loop: the loop graph, with the shapes of its values.
        contract: its boundary.

    Raises:
        CheckpointError: the graph has no skip connections by these names.
    """
    model = loop.clone()
    skips = _skips(model.graph)
    middle = skips[-1].join  # the first of the up blocks' joins: its other input is the middle block's output
    lowest = skips[-1].level
    targets = [(skip.join, 1, skip.level) for skip in skips] + [(middle, 0, lowest)]
    layers = _last_layers(skips)
    if _origin(_input(middle, 0)).startswith("mid_block."):
        layers.append((_root(_input(middle, 0)), lowest))
    layers = layers[: spec.FEATURES]
    controlled = spec.with_controls(
        contract,
        residuals=[(_channels(_input(join, index)), level) for join, index, level in targets],
        features=[(_channels(value), level) for value, level in layers],
    )
    added = [
        ir.val(item.name, model.graph.inputs[0].dtype, ir.Shape(item.shape))
        for item in controlled.inputs[len(contract.inputs) :]
    ]
    model.graph.inputs.extend(added)
    for (join, index, _), value in zip(targets, added, strict=False):
        join.replace_input_with(index, _sum(model.graph, join, _input(join, index), value))
    for (target, _), value in zip(layers, added[len(targets) :], strict=True):
        _add_for_all(model.graph, target, value)
    model.graph.name = "unet_controlled"
    return model, controlled


def _skips(graph: ir.Graph) -> list[_Skip]:
    """The skip connections in the order in which the down blocks make them: the reverse of the joins."""
    joins = [node for node in graph if node.op_type == "Concat" and _JOIN.fullmatch(node.name or "")]
    skips: list[_Skip] = []
    level = 0
    for join in reversed(joins):
        found = _DOWN_BLOCK.match(_origin(_input(join, 1)))
        block, layer = (int(found[1]), found[2]) if found else (-1, "")
        level += layer == "downsamplers"
        skips.append(_Skip(join=join, block=block, layer=layer, level=level))
    if not skips or [skip.block for skip in skips] != sorted(skip.block for skip in skips):
        raise CheckpointError(
            f"the UNet's graph has {len(skips)} skip connections, not in the order of the down blocks",
            expected="a UNet of Stable Diffusion's kind, with its nodes named after their modules",
            fix="Report the checkpoint; its graph cannot take a ControlNet.",
        )
    return skips


def _last_layers(skips: Sequence[_Skip]) -> list[tuple[ir.Value, int]]:
    """For each down block what a feature is added to, and its level."""
    found: list[tuple[ir.Value, int]] = []
    for block in range(skips[-1].block + 1):
        made = [skip for skip in skips if skip.block == block]
        attending = [skip for skip in made if skip.layer == "attentions"]
        last = (attending or made)[-1]
        found.append((_root(last.value), last.level))
    return found


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _root(value: ir.Value) -> ir.Value:
    """Where a value comes from, before casts into islands and out of them."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Cast":
        value = _input(producer, 0)
        producer = value.producer()
    return value


def _origin(value: ir.Value) -> str:
    """The name of the node that computes a value: its module and operator."""
    producer = _root(value).producer()
    return (producer.name or "") if producer is not None else ""


def _channels(value: ir.Value) -> int:
    shape = _root(value).shape
    assert shape is not None
    channels = shape[1]
    assert isinstance(channels, int)
    return channels


def _sum(graph: ir.Graph, before: ir.Node, value: ir.Value, added: ir.Value) -> ir.Value:
    """`value` + `added`, in front of a node, in the type of `value`: float32 within an island."""
    term = added
    if value.dtype != added.dtype:
        term = ir.val(f"{added.name}/cast", value.dtype, added.shape)
        widen = ir.node("Cast", [added], {"to": value.dtype}, name=f"{added.name}/Cast", outputs=[term])
        graph.insert_before(before, widen)
    total = ir.val(f"{added.name}/sum", value.dtype, value.shape)
    graph.insert_before(before, ir.node("Add", [value, term], name=f"{added.name}/Add", outputs=[total]))
    return total


def _add_for_all(graph: ir.Graph, value: ir.Value, added: ir.Value) -> None:
    """Let everybody who uses `value` use its sum with `added`."""
    uses = tuple(value.uses())
    users = {use.node for use in uses}
    first = next(node for node in graph if node in users)
    total = _sum(graph, first, value, added)
    for use in uses:
        use.node.replace_input_with(use.idx, total)
