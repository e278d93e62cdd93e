"""prompt -> picture. NumPy; knows the nets by their contract alone.

`Pipeline`, `Step` and `Result` are imported when they are first asked for: the command line reads the
declarations of `request/parameters.py`, and must not wait for NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Pipeline, Step
    from .result import Result

__all__ = ["Pipeline", "Result", "Step"]

_HOMES = {"Pipeline": ".pipeline", "Step": ".pipeline", "Result": ".result"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
