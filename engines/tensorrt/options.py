"""What a user may decide about a build. All of it is part of the engine's key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from ..errors import BackendError, UsageError
from .flavour import Flavour


class Weights(str, Enum):
    """Where an engine's weights are, and which of them may change afterwards."""

    embedded = "embedded"  # in the engine, for good: what the optimiser likes best
    stripped = "stripped"  # not in the engine, but taken from the package when it is loaded
    streamed = "streamed"  # in the engine; on the device only as far as a budget allows


# Names in `BuilderFlag`. REFIT alone is in no policy: it costs fusions, and TensorRT 11.3 documents wrong
# results with it; REFIT_IDENTICAL does neither.
FLAGS: Mapping[Weights, tuple[str, ...]] = {
    Weights.embedded: (),
    Weights.stripped: ("REFIT_IDENTICAL", "STRIP_PLAN"),
    Weights.streamed: ("WEIGHT_STREAMING",),
}

_COMPATIBILITY = ("", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build an engine.

    Attributes:
        weights: see `Weights`.
        optimization_level: 0 (quick build) to 5 (long search); 3 is the libraries' own default.
        workspace_limit: bytes of scratch memory a tactic may use; 0 for the libraries' own default.
        hardware_compatibility: "" for this GPU alone, `ampere_plus`, or `same_compute_capability`.
    """

    weights: Weights = Weights.embedded
    optimization_level: int = 3
    workspace_limit: int = 0
    hardware_compatibility: str = ""

    def __post_init__(self) -> None:
        """Raise UsageError for values that no library takes."""
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(
                f"the optimization level is {self.optimization_level}",
                expected="0 (quick build) to 5 (long search)",
                fix="Use the default: --optimization-level 3.",
            )
        if self.workspace_limit < 0:
            raise UsageError(
                f"the workspace limit is {self.workspace_limit} bytes",
                expected="0 for no limit, or a number of bytes",
                fix="Leave it out, or give MiB: --workspace 4096.",
            )
        if self.hardware_compatibility not in _COMPATIBILITY:
            raise UsageError(
                f"the hardware compatibility is {self.hardware_compatibility!r}",
                expected=", ".join(name or "none at all" for name in _COMPATIBILITY),
                fix="Leave it out for an engine of this GPU alone.",
            )

    @property
    def flags(self) -> tuple[str, ...]:
        """Names in `BuilderFlag`, in alphabetical order."""
        return FLAGS[self.weights]

    def check(self, row: Flavour, *, has_gpu: bool) -> None:
        """Refuse what a library cannot do here, before minutes of building.

        Raises:
            BackendError: the library, or one of the flags, needs a GPU and there is none; or the option has
                no effect with this library.
        """
        name = f"{row.backend} ({row.module} {row.line})"
        if not (row.builds_without_gpu or has_gpu):
            raise BackendError(
                f"{name} builds engines on the GPU that runs them, and there is none here",
                expected="an NVIDIA GPU and its driver",
                fix="Build on the machine that has it, or here with: latentrt build --backend tensorrt-rtx.",
            )
        needing = [flag for flag in self.flags if flag in row.flags_needing_gpu]
        if needing and not has_gpu:
            raise BackendError(
                f"--weights {self.weights.value} ({', '.join(needing)}) needs a GPU with {name}; none found",
                expected="an NVIDIA GPU, or a policy that builds without one: embedded, streamed",
                fix="Build here with --weights embedded, or with this policy where the GPU is.",
            )
        if self.hardware_compatibility and not row.hardware_compatibility:
            raise BackendError(
                f"{name} ignores the hardware compatibility {self.hardware_compatibility!r}",
                expected=f"none: its engines run on compute capability {', '.join(row.compute_capabilities)}",
                fix="Leave the option out.",
            )

    def to_json(self) -> dict[str, Any]:
        """As the builder's job has it."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**plain, "weights": self.weights.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildOptions:
        """The reverse of `to_json`."""
        values: dict[str, Any] = {item.name: data[item.name] for item in fields(cls)}
        values["weights"] = Weights(values["weights"])
        return cls(**values)
