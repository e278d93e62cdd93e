"""A graph becomes a TensorRT network that keeps the net contract, ready to be optimised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import BackendError, PackageError
from ..spec import NetSpec, TensorSpec
from .contract import TYPES, shape_fits
from .flavour import Flavour, Trt

_EXPORT_AGAIN = "Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE"
_SHOWN = 5  # of a parser's errors: later ones follow from the first


def parse_graph(
    trt: Trt, row: Flavour, builder: Trt, logger: Trt, path: Path, weights: Path | None = None
) -> tuple[Trt, Trt]:
    """Parse an ONNX graph, whose weights lie in the folder `weights`, beside it where None is given.

    Returns:
        The network, and the parser, which must live as long: the network's weights are its memory.

    Raises:
        PackageError: the parser refuses the graph, with its reasons.
    """
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed if row.needs_strongly_typed_flag else 0)
    parser = trt.OnnxParser(network, logger)
    # From memory, because the file may be in another folder than its weights: external data is looked for
    # beside the path that is given.
    if not parser.parse(path.read_bytes(), str((weights or path.parent) / path.name)):
        errors = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
        more = f" (and {len(errors) - _SHOWN} more)" if len(errors) > _SHOWN else ""
        raise PackageError(
            f"{row.module} cannot read {path}: {'; '.join(errors[:_SHOWN]) or 'it does not say why'}{more}",
            expected="a graph of this release's export",
            fix=_EXPORT_AGAIN,
        )
    # Not among the names of 10.13, which our calls are checked against.
    if "ATTENTION_INPUT" in trt.LayerType.__members__:
        _allow_decomposition(trt, network)
    return network, parser


def _describe(error: Trt) -> str:
    node = " ".join(filter(None, (error.node_operator(), error.node_name())))
    text = " ".join(str(error.desc()).split())
    return f"{node}: {text}" if node else text


def _allow_decomposition(trt: Trt, network: Trt) -> None:
    """Let attention fall apart where no fused kernel exists, instead of refusing the graph.

    Without this the builder refuses every fp32 attention, and the one head of 512 in the VAE. Measured on the
    fp16 UNet of SD 1.5: the engine has the same size to the byte, so fused kernels stay where they exist.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # The bindings hand out the base class; its memory is that of the derived one.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def mark_weights(row: Flavour, network: Trt, names: Iterable[str], *, graph: Path) -> None:
    """Mark weights, by their names in the graph, as those that may be replaced in the engine.

    Raises:
        BackendError: the library does not know one of them.
    """
    if refused := [name for name in names if not network.mark_weights_refittable(name)]:
        raise BackendError(
            f"{row.module} has {len(refused)} weights of {graph} not in its network, first {refused[0]!r}",
            expected="every weight under the name that the graph has for it",
            fix="Build without: --weights embedded, and report it with the package's manifest.",
        )


def check_contract(trt: Trt, network: Trt, spec: NetSpec, *, graph: Path) -> None:
    """Compare every input and output of a network with the net's spec.

    Raises:
        PackageError: names, dtypes, ranks or fixed dimensions differ; all differences are in the message.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    wrong = [
        *_differences("input", inputs, spec.inputs),
        *_differences("output", outputs, spec.outputs),
    ]
    if wrong:
        raise PackageError(
            f"{graph} does not keep its net's contract: {'; '.join(wrong[:_SHOWN])}",
            expected="the inputs and outputs that the package's manifest names",
            fix=_EXPORT_AGAIN,
        )


def _differences(kind: str, tensors: Sequence[Trt], specs: Sequence[TensorSpec]) -> list[str]:
    found = {str(tensor.name): tensor for tensor in tensors}
    wanted = {spec.name: spec for spec in specs}
    wrong = [f"{kind} {name!r} is not in the contract" for name in found if name not in wanted]
    for name, spec in wanted.items():
        tensor = found.get(name)
        if tensor is None:
            wrong.append(f"{kind} {name!r} is missing")
            continue
        shape = tuple(int(size) for size in tensor.shape)
        if TYPES.get(tensor.dtype.name) != spec.dtype:
            wrong.append(f"{kind} {name!r} is {tensor.dtype}, not {spec.dtype}")
        if not shape_fits(shape, spec.shape, inferred=kind == "output"):
            wrong.append(f"{kind} {name!r} has the shape {shape}, not ({', '.join(map(str, spec.shape))})")
    return wrong
