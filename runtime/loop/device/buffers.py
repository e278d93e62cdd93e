"""Blocks of device memory that hold several tensors at named, aligned places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....engines.device import ALIGNMENT, Device
from ....engines.spec import DTYPES, Array, Dim, TensorSpec, tensor_bytes

Sizes = Mapping[str, int]  # symbol of the net contract -> number


def aligned(size: int) -> int:
    """`size` in bytes, rounded up to a multiple of the device's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def shape_of(dims: Sequence[Dim], sizes: Sizes) -> tuple[int, ...]:
    """A shape of the contract with its symbols replaced by numbers."""
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims)


@dataclass(frozen=True, kw_only=True)
class Place:
    """One tensor of a block: `offset` in bytes from the block's start."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return tensor_bytes(self.dtype, self.shape)


class BlockLayout:
    """Places of tensors one after the other, in the order they were added; allocates nothing."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.size = 0

    def add(self, name: str, dtype: str, shape: Sequence[int]) -> Place:
        """Add a tensor at the next free place."""
        assert name not in self.places
        place = Place(offset=self.size, dtype=dtype, shape=tuple(shape))
        self.places[name] = place
        self.size += aligned(place.size)
        return place

    def add_tensors(self, tensors: Iterable[TensorSpec], sizes: Sizes, prefix: str = "") -> None:
        """Add tensors of the contract under `prefix` + their names."""
        for tensor in tensors:
            self.add(prefix + tensor.name, tensor.dtype, shape_of(tensor.shape, sizes))


class Block:
    """Memory on a device for all tensors of a layout. `close` frees it."""

    def __init__(self, device: Device, layout: BlockLayout) -> None:
        self._device = device
        self._places = dict(layout.places)
        self.size = layout.size
        self._start: int | None = device.allocate(max(layout.size, ALIGNMENT))

    def address(self, name: str) -> int:
        """The device address of a tensor."""
        assert self._start is not None, "the block is freed"
        return self._start + self._places[name].offset

    def place(self, name: str) -> Place:
        """Shape, dtype and size of a tensor."""
        return self._places[name]

    def upload(self, name: str, array: Array) -> None:
        """Fill a tensor from the host, converted to its dtype; what fp16 cannot hold becomes infinity."""
        place = self._places[name]
        assert array.shape == place.shape, (name, array.shape, place.shape)
        with np.errstate(over="ignore"):
            content = np.ascontiguousarray(array, DTYPES[place.dtype])
        self._device.upload(self.address(name), content)

    def download(self, name: str, count: int | None = None) -> Array:
        """Copy a tensor, or its first `count` rows, to a host array that the next `synchronize` fills."""
        place = self._places[name]
        shape = place.shape if count is None else (count, *place.shape[1:])
        array = np.empty(shape, DTYPES[place.dtype])
        self._device.download(self.address(name), array)
        return array

    def close(self) -> None:
        """Free the memory. May be called twice."""
        if self._start is not None:
            start, self._start = self._start, None
            self._device.free(start)


class Scratch:
    """The one block of activations that all nets share: they run one after the other on one stream."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self.size = size
        self.users = 0
        self.address = device.allocate(aligned(size)) if size else 0

    def close(self) -> None:
        """Free the memory, once nobody uses it."""
        assert self.users == 0
        if self.address:
            address, self.address = self.address, 0
            self._device.free(address)
