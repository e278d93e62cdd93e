"""ControlNets of a request: hints, and what the outputs are multiplied with, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..loop.controls import averages
from ..loop.job import ControlJob
from .steered import Rows, Steered, read_picture, row_of_each_picture
from .unions import union_type


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeredByNet(Steered):
    """A control of a request whose net is called in every step."""

    def job(self, rows: Rows) -> ControlJob:
        """What the loop is given. Raises UsageError for another number of pictures."""
        hint = read_picture(self, rows)
        manifest = self.opened.package.manifest
        if manifest.control.get("channel_order") == "bgr":
            hint = np.ascontiguousarray(hint[:, ::-1])
        scales = self.control.scales(
            steps=rows.schedule,
            rows=rows.count,
            outputs=len(manifest.nets["controlnet"].spec.outputs),
            guided=rows.guided,
            pooled=averages(manifest),
        )[: rows.steps]
        if rows.guided:  # a net that adds to no row of a call's half is not run on it
            scales[~rows.guided_calls, : rows.pictures] = 0
        return ControlJob(
            manifest=manifest,
            loop=self.opened.loop,
            hint=hint,
            hint_of_row=row_of_each_picture(len(hint), rows),
            scales=scales,
        )

    def record(self) -> dict[str, Any]:
        """As a picture's record has it."""
        told = union_type(self.control, self.opened.package.manifest)
        return {**super().record(), **({"control_type": told} if told else {})}
