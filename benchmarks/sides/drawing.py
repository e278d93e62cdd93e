"""Whole pictures of our pipeline, as a user draws them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...engines.spec import Array
from ...runtime.loop.denoise import HostLoop
from ...runtime.pipeline import Pipeline
from ..case import Case
from .contract import Work

# Pictures until a device's loop has chosen whether to replay its rows as a graph: it does at the second's
# beginning.
_SETTLING = 2


def drawing(pipe: Pipeline, case: Case, **steered: Any) -> Work:
    """The work `picture`, whose figures have `stages_s`; `steered` joins the request's parameters."""
    figures: dict[str, Any] = {}

    def draw() -> dict[str, Array]:
        result = pipe(case.prompt, output_type="np", **case.parameters, **steered)
        figures["stages_s"] = result.seconds
        return {"image": np.asarray(result.images)}

    for _ in range(0 if isinstance(pipe.loop, HostLoop) else _SETTLING):
        draw()
    return Work(call=draw, figures=lambda: figures)
