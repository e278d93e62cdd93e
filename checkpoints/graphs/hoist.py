"""Split a UNet's or a ControlNet's graph by what each node depends on: the latent, the context, or the time.

The loop keeps what depends on the latent. The rest runs once: what depends on the context once per prompt,
what depends on the time once for all timesteps of a schedule. The vectors that condition some families
(`spec.VECTORS`) join the time embedding, so they belong to the time. The values that cross from these two
graphs into the loop are the invariants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import cast

import onnx_ir as ir
import onnx_ir.passes.common as common

from ...engines import spec
from ...engines.errors import CheckpointError
from .weights import is_weight

LATENT, TIMESTEP, CONTEXT = "sample", "timestep", "encoder_hidden_states"
TIME = frozenset([TIMESTEP, *spec.VECTORS])
# What the loop graph has in every step: the latent, and a ControlNet's inputs of its own.
LOOP = frozenset([LATENT, spec.HINT_EMBEDDING, spec.SCALES])
Dependencies = Mapping[ir.Value | None, frozenset[str]]
_LATENT_CHANNELS = 4  # the input's further channels are image latents


def hoist(whole: ir.Model) -> dict[str, tuple[ir.Model, spec.NetSpec]]:
    """Split `whole`, on which `passes.clean` has run.

    Returns:
        "unet" (the loop), "unet_context" and "unet_time" -> graph and contract.

    Raises:
        CheckpointError: a value depends on the context and on the time but not on the latent.
    """
    parts = _Parts.of(whole)
    sample = whole.graph.inputs[0]
    unet = spec.unet(
        channels=_LATENT_CHANNELS,
        float_dtype=_dtype(sample),
        invariants=parts.invariants,
        image_channels=_size(sample, 1) - _LATENT_CHANNELS,
    )
    loop = _loop(whole, parts)
    if _size(loop.graph.inputs[0], 1) > _LATENT_CHANNELS:
        _join_latents(loop.graph)
    loop.graph.inputs[0].name = "latent"
    loop.graph.outputs[0].name = "prediction"
    return {"unet": (_pruned(loop, "unet"), unet), **_once(whole, parts, "unet")}


def hoist_control(whole: ir.Model, contract: spec.NetSpec) -> dict[str, tuple[ir.Model, spec.NetSpec]]:
    """The same for a ControlNet's graph of `spec.controlnet_whole`.

    The loop's contract is that of the whole graph, with the invariants in place of what they are made of.

    Returns:
        "controlnet" (the loop), "controlnet_time" and, unless it has no cross-attention, "controlnet_context"
        -> graph and contract.

    Raises:
        CheckpointError: as `hoist`.
    """
    parts = _Parts.of(whole)
    latent, *own = (item for item in contract.inputs if item.name in LOOP)
    inputs = (replace(latent, name="latent"), *own, *parts.invariants)
    loop = _loop(whole, parts)
    loop.graph.inputs[0].name = "latent"
    return {
        "controlnet": (_pruned(loop, "controlnet"), replace(contract, inputs=inputs)),
        **_once(whole, parts, "controlnet"),
    }


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The values of a whole graph that cross into its loop.

    Attributes:
        context, time: a value's name in the whole graph -> the invariant's, by what it depends on.
        of_context, of_time: their contracts as `unet_context` and `unet_time` give them out.
    """

    context: Mapping[str, str]
    time: Mapping[str, str]
    of_context: tuple[spec.TensorSpec, ...]
    of_time: tuple[spec.TensorSpec, ...]

    @classmethod
    def of(cls, whole: ir.Model) -> _Parts:
        """Raises CheckpointError as `hoist`."""
        crossing = _crossing(whole.graph)
        names = _names(crossing)
        context = {old: new for old, new in names.items() if new.startswith(spec.CONTEXT_INVARIANT)}
        time = {old: new for old, new in names.items() if new.startswith(spec.TIME_INVARIANT)}
        values = {value.name: value for value in crossing}
        return cls(
            context=context,
            time=time,
            of_context=tuple(_invariant(values[old], new, "B") for old, new in context.items()),
            of_time=tuple(_invariant(values[old], new, "S") for old, new in time.items()),
        )

    @property
    def invariants(self) -> tuple[spec.TensorSpec, ...]:
        """Their contracts as the loop takes them."""
        return *self.of_context, *(replace(item, shape=("B", *item.shape[1:])) for item in self.of_time)


def _once(whole: ir.Model, parts: _Parts, name: str) -> dict[str, tuple[ir.Model, spec.NetSpec]]:
    """The graphs beside the loop, called NAME_context and NAME_time; without one that would be empty."""
    inputs = {value.name or "": value for value in whole.graph.inputs}
    vectors = {vector: _size(inputs[vector], 1) for vector in spec.VECTORS if vector in inputs}
    of_context = spec.unet_context(
        width=_size(inputs[CONTEXT], 2), float_dtype=_dtype(inputs[LATENT]), invariants=parts.of_context
    )
    of_time = spec.unet_time(invariants=parts.of_time, vectors=vectors)
    found = {
        f"{name}_time": (_part(whole, parts.time, {name: name for name in (TIMESTEP, *vectors)}), of_time)
    }
    if parts.context:  # a small ControlNet has no cross-attention
        found[f"{name}_context"] = _part(whole, parts.context, {CONTEXT: "context"}), of_context
    return found


def _size(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _dtype(value: ir.Value) -> str:
    """The contract's spelling of a value's type."""
    return {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}[cast(ir.DataType, value.dtype)]


def _dependencies(graph: ir.Graph) -> Dependencies:
    """Each value -> the names of the graph's inputs that it depends on."""
    found: dict[ir.Value | None, frozenset[str]] = {
        value: frozenset([value.name or ""]) for value in graph.inputs
    }
    for node in graph:
        union = frozenset[str]().union(*(found.get(value, ()) for value in node.inputs))
        found |= dict.fromkeys(node.outputs, union)
    return found


def _crossing(graph: ir.Graph) -> dict[ir.Value, str]:
    """Each value to hoist -> the prefix of the net that computes it, in the order of the loop's use."""
    depends = _dependencies(graph)
    crossing: dict[ir.Value, str] = {}
    for node in graph:
        if not _in_loop(node, depends):
            continue
        for value in node.inputs:
            inputs = depends.get(value, frozenset[str]())
            if value is None or not inputs or inputs & LOOP or _is_view(value.producer(), depends):
                continue
            if CONTEXT in inputs and inputs & TIME:
                raise CheckpointError(
                    f"the UNet computes {value.name!r} from the context and the timestep together",
                    expected="a UNet of Stable Diffusion's kind, where the two meet only in the latent",
                    fix="Report the checkpoint; its graph needs a third part.",
                )
            crossing[value] = spec.CONTEXT_INVARIANT if CONTEXT in inputs else spec.TIME_INVARIANT
    return crossing


def _is_view(node: ir.Node | None, depends: Dependencies) -> bool:
    """Whether a hoistable node only adds axes of size 1 for the loop to broadcast, or casts for an island.

    Such a node costs nothing in the loop and stays there, so that a time invariant is a plain (S, C) table.
    """
    if node is None or not depends[node.outputs[0]] or depends[node.outputs[0]] - TIME:
        return False
    widens = node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT
    if node.op_type != "Unsqueeze" and not widens:
        return False
    return all(_in_loop(use.node, depends) for use in node.outputs[0].uses())


def _in_loop(node: ir.Node, depends: Dependencies) -> bool:
    return bool(depends[node.outputs[0]] & LOOP) or _is_view(node, depends)


def _names(crossing: Mapping[ir.Value, str]) -> dict[str, str]:
    """A value's name in the whole graph -> the invariant's name, after the module whose weights made it."""
    names: dict[str, str] = {}
    for value, prefix in crossing.items():
        base = prefix + _module(value)
        numbered = (f"{base}.{serial}" for serial in count(2))
        names[value.name or ""] = next(name for name in chain([base], numbered) if name not in names.values())
    return names


def _module(value: ir.Value) -> str:
    """The path of the module whose weight is nearest upstream of `value`."""
    queue = [value]
    while queue:
        current = queue.pop(0)
        if is_weight(current):
            return (current.name or "").rsplit(".", 1)[0]
        producer = current.producer()
        # The last input first: a product's weight is its second factor, and its first leads further upstream.
        queue.extend(item for item in reversed(producer.inputs if producer else ()) if item is not None)
    return value.name or "value"


def _invariant(value: ir.Value, name: str, rows: str) -> spec.TensorSpec:
    assert value.shape is not None
    dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape[1:]]
    return spec.TensorSpec(name=name, dtype=_dtype(value), shape=(rows, *dims))


def _part(whole: ir.Model, names: Mapping[str, str], sources: Mapping[str, str]) -> ir.Model:
    """The graph that computes the invariants `names`; `sources` has its inputs' old and new names."""
    model = whole.clone()
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.clear()
    for old, new in names.items():
        values[old].name = new
        graph.outputs.append(values[old])
    _keep_inputs(graph, lambda name: name in sources)
    for value in graph.inputs:
        value.name = sources[value.name or ""]
    if TIMESTEP in sources:
        for value in (*graph.inputs, *graph.outputs):
            value.shape = ir.Shape(["S", *list(value.shape or ())[1:]])
    return _pruned(model, TIMESTEP if TIMESTEP in sources else "context")


def _loop(whole: ir.Model, parts: _Parts) -> ir.Model:
    """The graph of one step, which takes the invariants as inputs. What it does not need is still there."""
    model = whole.clone()
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    olds = {new: old for old, new in (*parts.context.items(), *parts.time.items())}
    for item in parts.invariants:
        old = values[olds[item.name]]
        value = ir.val(item.name, shape=item.shape, type=old.type)
        graph.inputs.append(value)
        ir.convenience.replace_all_uses_with(old, value)
    _keep_inputs(graph, lambda name: name not in TIME and name != CONTEXT)
    return model


def _join_latents(graph: ir.Graph) -> None:
    """Replace the input by two: the latent, and the image latents that stand behind it."""
    whole = graph.inputs[0]
    assert whole.shape is not None
    rows, _, *size = whole.shape
    counts = {LATENT: _LATENT_CHANNELS, "image_latents": _size(whole, 1) - _LATENT_CHANNELS}
    parts = [ir.val(name, whole.dtype, ir.Shape([rows, count, *size])) for name, count in counts.items()]
    joined = ir.val("image_latents/joined", whole.dtype, whole.shape)
    ir.convenience.replace_all_uses_with(whole, joined)
    graph.inputs[0:1] = parts
    concat = ir.node("Concat", parts, {"axis": 1}, name="image_latents/Concat", outputs=[joined])
    graph.insert_before(graph[0], concat)


def _keep_inputs(graph: ir.Graph, keep: Callable[[str], bool]) -> None:
    common.RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
    kept = [value for value in graph.inputs if keep(value.name or "")]
    graph.inputs.clear()
    graph.inputs.extend(kept)


def _pruned(model: ir.Model, name: str) -> ir.Model:
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    model.graph.name = name
    return model
