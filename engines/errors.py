"""Every error latentrt raises on purpose.

::

    LatentrtError                 exit code 1
    ├── UsageError                2   a parameter of the request, or an option
    │   └── SamplerError          2   an unknown sampler, or one outside the table form
    ├── ModelError                3   a file that should hold a model does not
    │   ├── CheckpointError       3   what the user downloaded
    │   ├── AdapterError          3   a LoRA or the like, or one that does not fit the model
    │   ├── DownloadError         3   what a hub did not give
    │   ├── PackageError          3   what `latentrt export` wrote
    │   └── EngineError           3   what `latentrt build` wrote
    ├── BackendError              4   no runtime, driver or device to execute a net
    ├── MemoryLimitError          5   not enough memory, with the numbers
    ├── CancelledError            6   the caller asked to stop
    ├── StorageError              7   disk full, or a file that cannot be written
    └── NumericError              8   NaN, infinity or a constant picture
"""

from __future__ import annotations

import shlex
from typing import Any


class LatentrtError(Exception):
    """A message in three parts, each also an attribute.

    Args:
        found: what is wrong, naming the file or the field.
        expected: what would have been accepted.
        fix: the command or the change that mends it.
    """

    exit_code = 1

    def __init__(self, found: str, *, expected: str, fix: str) -> None:
        super().__init__(f"{found}; expected {expected}. {fix}")
        self.found = found
        self.expected = expected
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """What `pickle` and `copy` take: the message, every attribute and the cause.

        `Exception` would call the class with the message alone, which these classes refuse: a process pool
        that cannot read an error breaks, with all jobs that wait in it.
        """
        state = {**self.__dict__, "__suppress_context__": self.__suppress_context__}
        if self.__cause__ is not None:
            state["__cause__"] = _portable(self.__cause__)
        return _remake, (type(self), self.args), state


def _remake(kind: type[LatentrtError], args: tuple[Any, ...]) -> LatentrtError:
    return kind.__new__(kind, *args)  # which sets `args`; attributes and cause follow as the state


def _portable(cause: BaseException) -> BaseException:
    """A cause that every process can read: itself, or its text where it does not pickle."""
    import pickle

    try:
        pickle.loads(pickle.dumps(cause))  # noqa: S301 (of what this process has just written)
    except Exception:  # whatever a foreign class raises
        return RuntimeError(f"{type(cause).__name__}: {cause}")
    return cause


class UsageError(LatentrtError):
    """A parameter of the request, or an option of a command."""

    exit_code = 2


class SamplerError(UsageError):
    """An unknown sampler, or one that no coefficient table can express."""


class ModelError(LatentrtError):
    """A file that should hold a model does not."""

    exit_code = 3


class CheckpointError(ModelError):
    """A checkpoint that is missing, damaged, or of a family not yet supported."""


class AdapterError(ModelError):
    """A LoRA or another file of changes that is damaged, of no known kind, or made for another model."""


class DownloadError(ModelError):
    """A model that a hub did not give: it has none of that name, wants a token, or cannot be reached."""


class PackageError(ModelError):
    """A package that is missing, damaged, newer than this release, or unsafe to open."""


class EngineError(ModelError):
    """An engine in the store that is damaged, or whose folder others could have changed."""


class BackendError(LatentrtError):
    """No runtime library, driver or device to execute a net."""

    exit_code = 4


class MemoryLimitError(LatentrtError):
    """Not enough memory; the message has the numbers. `culprit` is the net that wanted it, where known."""

    exit_code = 5

    def __init__(self, found: str, *, expected: str, fix: str, culprit: str | None = None) -> None:
        super().__init__(found, expected=expected, fix=fix)
        self.culprit = culprit


class CancelledError(LatentrtError):
    """The caller asked to stop."""

    exit_code = 6


class StorageError(LatentrtError):
    """A full disk, or a file that cannot be written."""

    exit_code = 7


class NumericError(LatentrtError):
    """NaN, infinity or a constant picture."""

    exit_code = 8


def command(*words: object) -> str:
    """A command as a shell takes it, for the end of a `fix`: whatever follows it would stick to it."""
    return shlex.join(map(str, words))


# What to do about numbers that fp16 cannot hold, or that are not finite.
EXPORT_IN_FP32 = "Export it in float32: --dtype fp32"
DAMAGED_WEIGHTS = "Download the checkpoint again; its weights may be damaged."


def numeric_fix(dtype: str) -> str:
    """What to do about a NumericError of a package, by the `dtype` in its manifest ("fp16" or "fp32")."""
    if dtype == "fp16":
        return "An fp16 package may overflow: export it again with --dtype fp32"
    return f"{DAMAGED_WEIGHTS} Then export it again."
