"""A matmul as an ONNX model, written in the wire format itself: the lean install has no ONNX library.

The numbers of the fields are those of onnx.proto; "Protocol Buffers: Encoding" has the rest.
"""

from __future__ import annotations

from ...engines.spec import Array

_TYPES = {"float32": 1, "float16": 10}  # TensorProto.DataType
_IR_VERSION, _OPSET = 8, 13


def matmul_graph(left: tuple[int, ...], right: Array) -> bytes:
    """The model `product = left @ right`; `right` is a constant, so that a runtime may lay it out anew.

    Args:
        left: its shape (M, K).
        right: (K, N) float32 or float16; `left` and `product` have its dtype.
    """
    kind = _TYPES[str(right.dtype)]
    weight = _message(*((1, size) for size in right.shape), (2, kind), (8, b"right"), (9, right.tobytes()))
    node = _message((1, b"left"), (1, b"right"), (2, b"product"), (4, b"MatMul"))
    graph = _message(
        (1, node),
        (2, b"gemm"),
        (5, weight),
        (11, _value(b"left", kind, left)),
        (12, _value(b"product", kind, (left[0], right.shape[1]))),
    )
    return _message((1, _IR_VERSION), (7, graph), (8, _message((2, _OPSET))))


def _value(name: bytes, kind: int, shape: tuple[int, ...]) -> bytes:
    dims = _message(*((1, _message((1, size))) for size in shape))
    return _message((1, name), (2, _message((1, _message((1, kind), (2, dims))))))


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    """Fields by number: an integer is a varint, bytes are preceded by their length."""
    parts: list[bytes] = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(_varint(number << 3) + _varint(value))
        else:
            parts += (_varint(number << 3 | 2), _varint(len(value)), value)
    return b"".join(parts)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth bit set."""
    low = bytearray()
    while value > 127:
        low.append(value & 127 | 128)
        value >>= 7
    return bytes([*low, value])
