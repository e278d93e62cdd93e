"""The tensors of a control's file, held against those that its class in diffusers has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import CheckpointError
from ..files.component import TensorHeader

ANOTHER_CONTROL = "Download it again, or use another file of the same control."

# The shape of each tensor, by diffusers' names.
Shapes = Mapping[str, tuple[int, ...]]


def layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's weight and of its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def once(path: Path, pairs: Iterable[tuple[str, TensorHeader]]) -> dict[str, TensorHeader]:
    """Tensors by their new names. Raises CheckpointError where two of a file would have one."""
    found: dict[str, TensorHeader] = {}
    for name, header in pairs:
        if name in found:
            raise CheckpointError(
                f"{path} has {found[name].name[:200]!r} and {header.name[:200]!r}, which are one tensor",
                expected="each once",
                fix=ANOTHER_CONTROL,
            )
        found[name] = header
    return found


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a file has.

    Attributes:
        path: the file or folder, for messages.
        what: the kind for people, with an article: "a ControlNet".
        tensors: by diffusers' names; unknown names are those in the file.
    """

    path: Path
    what: str
    tensors: Mapping[str, TensorHeader]

    def count(self, prefix: str) -> int:
        """How many different numbers follow `prefix` in the names."""
        return len(
            {name[len(prefix) :].partition(".")[0] for name in self.tensors if name.startswith(prefix)}
        )

    def has(self, prefix: str) -> bool:
        """Whether a tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.tensors)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor from which the config is derived.

        Raises:
            CheckpointError: it is missing, or has another number of axes than `rank`.
        """
        if name not in self.tensors:
            raise self.refused(f"lacks the tensor {name!r}", f"{self.what}, complete")
        shape = self.tensors[name].shape
        if len(shape) != rank or not all(shape):
            raise self.refused(f"has the tensor {name!r} of the shape {shape}", f"{rank} axes, none empty")
        return shape

    def check(self, wanted: Shapes, may_lack: Callable[[str], bool] = lambda name: False) -> None:
        """Raise CheckpointError for the first tensor that is missing, of another shape, or not known.

        Args:
            wanted: what the class in diffusers has.
            may_lack: which of these come from elsewhere where they are missing.
        """
        lacking = [name for name in wanted if name not in self.tensors and not may_lack(name)]
        if lacking:
            raise self.refused(f"lacks {_some(lacking)}", f"{self.what}, complete")
        for name, shape in wanted.items():
            if name in self.tensors and self.tensors[name].shape != shape:
                found = self.tensors[name].shape
                raise self.refused(f"has the tensor {name!r} of the shape {found}", f"{shape}")
        surplus = [name for name in self.tensors if name not in wanted]
        if surplus:
            raise self.refused(
                f"has {_some(surplus)} that {self.what} has not", f"{self.what} without additions"
            )

    def refused(self, found: str, expected: str) -> CheckpointError:
        """The error for a file that is not what it seems to be."""
        return CheckpointError(f"{self.path} {found}", expected=expected, fix=ANOTHER_CONTROL)


def _some(names: list[str]) -> str:
    """How many tensors there are, and the first of them."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"the tensor {names[0][:200]!r}{more}"
