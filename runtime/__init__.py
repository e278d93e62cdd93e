"""prompt -> picture. NumPy; knows the nets by their contract alone."""

from .pipeline import Pipeline, Step
from .result import Result

__all__ = ["Pipeline", "Result", "Step"]
