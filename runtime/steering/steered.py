"""What the kinds of controls have in common: a control with its net and its pictures, and the loop's rows."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...engines.errors import NumericError, UsageError
from ...engines.package import Package
from ...engines.spec import Array
from ..controls.control import Control
from ..controls.hints import HintPictures
from ..loop.job import Loop
from ..request.inputs import describe_pictures


@dataclass(frozen=True, kw_only=True)
class OpenedControl:
    """A control whose nets run: its package, and the loop that calls them."""

    package: Package
    loop: Loop

    @property
    def kind(self) -> str:
        """ "controlnet", "t2i-adapter" or "ip-adapter"."""
        return str(self.package.manifest.control["kind"])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a request's UNet calls.

    Attributes:
        steps: S, the calls.
        schedule: what a control's part of the steps is a share of: S, or more where another model goes on.
        guided: whether the first half of the rows of each is unconditional.
        guided_calls: (S,) bool, the calls in which those count.
        height, width: of the pictures.
        pictures: N.
    """

    steps: int
    schedule: int
    guided: bool
    guided_calls: Array
    height: int
    width: int
    pictures: int

    @property
    def count(self) -> int:
        """B."""
        return self.pictures * (2 if self.guided else 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Steered:
    """A control of a request with its pictures, read and checked."""

    control: Control
    opened: OpenedControl
    pictures: HintPictures

    def record(self) -> dict[str, Any]:
        """As a picture's record has it."""
        control, pictures = self.control, self.pictures
        values = {
            "model": str(control.model),
            "kind": self.opened.kind,
            "sha256": self.opened.package.manifest.sha256,
            "images": describe_pictures(control.image, pictures.pictures),
            "masks": describe_pictures(control.mask_image, pictures.masks),
            "strength": control.strength,
            "start": control.start,
            "end": control.end,
            "mode": control.mode,
            "preparation": control.preparation,
            "settings": dict(pictures.settings),
            "resize_mode": control.resize_mode,
        }
        return {name: value for name, value in values.items() if value not in (None, [], {})}


@contextmanager
def naming_controls(records: Sequence[Mapping[str, Any]]) -> Generator[None]:
    """Name the controls in a NumericError of the block: what one adds may be beyond what fp16 holds.

    Args:
        records: of each control, as `Steered.record` has them.
    """
    try:
        yield
    except NumericError as error:
        if not records:
            raise
        names = ", ".join(f"the {one['kind']} {one['model']!r:.100}" for one in records)
        raise NumericError(
            f"steered by {names}: {error.found}",
            expected=error.expected,
            fix=f"Steer with less strength. {error.fix}",
        ) from error


def read_picture(steered: Steered, rows: Rows) -> Array:
    """The hints at the size that is drawn, (K, 3, H, W) float32.

    Raises:
        UsageError: their number does not divide that of the pictures.
    """
    hint = steered.pictures.at(rows.height, rows.width)
    if rows.pictures % len(hint):
        raise UsageError(
            f"{len(hint)} control pictures for {rows.pictures} pictures",
            expected="one control picture, or one for every prompt",
            fix="Pass one control picture for all of them.",
        )
    return hint


def row_of_each_picture(hints: int, rows: Rows) -> tuple[int, ...]:
    """(B,) which of the hints each row of the UNet has."""
    each = rows.pictures // hints
    return tuple((row % rows.pictures) // each for row in range(rows.count))
