"""Which data of a net are not rounded, because most of the error of its output would come from them.

How far rounding takes data says nothing of what becomes of that: in the demo most of the error of the UNet
comes from the shortcut of the last block, whose data are rounded as well as others. So data are rounded
inside the graph, a group of them at a time, and the net's output is looked at; groups that matter are halved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engines.onnxruntime.lowering.files import open_changed, read_graph
from ...engines.package import Package
from ...engines.spec import Array
from ...engines.tolerances import relative_l2
from .ranges import Inputs
from .rounding import Rounding

if TYPE_CHECKING:
    import onnx_ir as ir

MOST_SHARE = 0.05  # of the squared error of a net's output, from one tensor


def without_sensitive(package: Package, net: str, rounding: Rounding, calls: Sequence[Inputs]) -> Rounding:
    """A rounding without the places whose data alone make more than `MOST_SHARE` of the squared error.

    Args:
        package: as it is.
        net: of the places.
        rounding: of data too.
        calls: the net's inputs; a few are enough.

    Raises:
        PackageError: the graph cannot be read.
        MemoryLimitError: the net does not fit.
    """
    probe = _Probe(package, net, rounding, calls)
    worst = culprits(list(rounding.data), probe.error, MOST_SHARE)
    left = tuple(place for place in rounding.places if place.data not in worst)
    return replace(
        rounding,
        places=left,
        left_out=(*rounding.left_out, *(place.name for place in rounding.places if place not in left)),
        data={name: scale for name, scale in rounding.data.items() if name not in worst},
        divided={name: factor for name, factor in rounding.divided.items() if name not in worst},
    )


def culprits(
    names: Sequence[str], error_of: Callable[[Collection[str]], float], share: float
) -> frozenset[str]:
    """The names that alone make more than a share of the squared error of all.

    Errors of several are as good as independent, so that their squares add up: a group below the share has
    none in it.
    """
    least = share * error_of(names) ** 2

    def look(group: Sequence[str]) -> frozenset[str]:
        if not least or error_of(group) ** 2 <= least:
            return frozenset()
        return frozenset(group) if len(group) == 1 else halves(group)

    def halves(group: Sequence[str]) -> frozenset[str]:
        middle = len(group) // 2
        return look(group[:middle]) | look(group[middle:])

    return halves(names) if len(names) > 1 else frozenset()


class _Probe:
    """A net whose data are rounded or not, as a number for each says that is one of its inputs."""

    def __init__(self, package: Package, net: str, rounding: Rounding, calls: Sequence[Inputs]) -> None:
        self._calls = calls
        self._off = {_switch(name): np.zeros((), np.float32) for name in rounding.data}
        model = read_graph(package, net)
        _round_by_switches(model, rounding)
        self._session = open_changed(package, net, model)
        self._output = model.graph.outputs[0].name
        self._wanted = self._run({})

    def error(self, names: Collection[str]) -> float:
        """The relative L2 of the net's output where these data are rounded and no others."""
        on: Any = {_switch(name): np.ones((), np.float32) for name in names}
        return relative_l2(self._run(on), self._wanted)

    def _run(self, on: Mapping[str, Any]) -> Any:
        feeds = {**self._off, **on}
        return np.stack([self._session.run([self._output], {**call, **feeds})[0] for call in self._calls])


def _switch(name: str) -> str:
    return f"{name}/rounds"


def _round_by_switches(model: ir.Model, rounding: Rounding) -> None:
    """Have products read x + switch (rounded x - x), in float32."""
    import onnx_ir as ir

    graph, wide = model.graph, ir.DataType.FLOAT
    nodes = {value.name: node for node in graph for value in node.outputs}
    narrow = getattr(ir.DataType, rounding.format.onnx)
    made: dict[str, ir.Value] = {}

    def add(before: ir.Node, operator: str, inputs: Sequence[Any], dtype: Any, **numbers: int) -> ir.Value:
        node = ir.node(operator, inputs, numbers, num_outputs=1)
        node.outputs[0].name, node.outputs[0].dtype = f"probe/{operator}/{len(graph)}", dtype
        graph.insert_before(before, node)
        return node.outputs[0]

    def constant(values: Array, name: str, dtype: Any) -> ir.Value:
        array = values.astype(dtype.numpy())
        tensor = ir.tensor(array, dtype=dtype, name=name)
        shape = ir.Shape(array.shape)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    def mixed(node: ir.Node, name: str) -> ir.Value:
        data = node.inputs[0]
        assert data is not None
        numbers = [
            constant(np.array(rounding.data[name], np.float32), f"{name}/probed", wide),
            constant(np.zeros((), np.float32), f"{name}/zero", narrow),
        ]
        factor: Any = rounding.divided.get(name, np.ones((), np.float32))
        smooth = [constant(one, f"{name}/{i}", wide) for i, one in enumerate((1 / factor, factor))]
        switch = ir.Value(name=_switch(name), shape=ir.Shape([]), type=ir.TensorType(wide))
        graph.inputs.append(switch)
        plain = add(node, "Cast", [data], wide, to=int(wide))
        divided = add(node, "Mul", [plain, smooth[0]], wide)
        small = add(node, "QuantizeLinear", [divided, *numbers], narrow)
        back = add(node, "DequantizeLinear", [small, *numbers], wide)
        rounded = add(node, "Mul", [back, smooth[1]], wide)
        change = add(node, "Mul", [add(node, "Sub", [rounded, plain], wide), switch], wide)
        there = node.outputs[0].dtype or wide
        return add(node, "Cast", [add(node, "Add", [plain, change], wide)], there, to=int(there))

    for place in rounding.places:
        if (node := nodes.get(place.name)) is not None and place.data in rounding.data:
            made[place.data] = made.get(place.data) or mixed(node, place.data)
            node.replace_input_with(0, made[place.data])
