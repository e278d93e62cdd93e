"""T2I-Adapters of a request: maps that are added to the UNet's down blocks, made once per picture.

Mou et al. 2023 (arXiv 2302.08453); diffusers' `StableDiffusionAdapterPipeline` and that of XL, whose
`adapter_conditioning_factor` is the control's `end`. Where `denoising_end` stops early, that is a
share of the whole schedule, as of ControlNets in diffusers, which takes this one of the steps that are run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...engines.errors import UsageError
from ..loop.job import FeatureJob
from .steered import Rows, Steered, read_picture, row_of_each_picture

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as Pillow's "L"


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeredByFeatures(Steered):
    """A control of a request whose net is called once."""

    def job(self, rows: Rows) -> FeatureJob:
        """What the loop is given. Raises UsageError for a mode, or for a size that the net does not take."""
        control, manifest = self.control, self.opened.package.manifest
        if control.mode != "balanced":
            raise UsageError(
                f"control_mode is {control.mode!r} for the T2I-Adapter {control.model!r}",
                expected="balanced: what it adds is the same in every step",
                fix="Leave control_mode out, and change control_strength.",
            )
        hint = read_picture(self, rows)  # (K, 3, H, W)
        channels, *_ = manifest.net("t2i_adapter").spec.inputs[0].shape[1:]
        if channels == 1:
            hint = np.einsum("kchw,c->khw", hint, _GRAY)[:, None]
        factor = manifest.size_multiple
        if hint.shape[2] % factor or hint.shape[3] % factor:
            raise UsageError(
                f"the T2I-Adapter {control.model!r} does not take {rows.height}x{rows.width} pixels",
                expected=f"a height and a width that {factor} divides",
                fix="Pass others, such as the next larger ones.",
            )
        return FeatureJob(
            call=self.opened.loop.call,
            hint=hint.astype(np.float32),
            hint_of_row=row_of_each_picture(len(hint), rows),
            strength=control.strength,
            on=control.on(rows.schedule)[: rows.steps],
        )
