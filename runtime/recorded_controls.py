"""The controls of a picture that is drawn again: nets and pictures are given anew, and are the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from ..engines.errors import UsageError, command
from .controls.control import Control
from .controls.image_prompt import ImagePrompt
from .request.parameters import PARAMETERS

if TYPE_CHECKING:
    from .pipeline import Pipeline

_LOG = logging.getLogger(__name__)

Recorded = Mapping[str, Any]  # of one control, as `Steered.record` has it
_PICTURES = ("images", "masks")


def recorded_settings(steered: object, kind: type[Control | ImagePrompt]) -> list[dict[str, Any]]:
    """How each control of a kind counted, by the names of its fields, without its net and pictures.

    Args:
        steered: what a picture's record says; None for nothing.
        kind: `Control` or `ImagePrompt`.

    Raises:
        UsageError: a record that is none.
    """
    names = {item.name for item in fields(kind)} - {"model"}
    return [
        {name: value for name, value in one.items() if name in names}
        for one in _read(steered)
        if _is_prompt(one) == (kind is ImagePrompt)
    ]


def check_recorded_controls(pipe: Pipeline, steered: object, given: Any) -> None:
    """See to it that what steered a picture is given again; values that are others now are logged.

    Args:
        pipe: draws it; the controls are loaded.
        steered: what the picture's record says.
        given: the parameter `controls` of the new picture.

    Raises:
        UsageError: a net or a picture is missing or another one, or a record that is none.
    """
    missing: list[Recorded] = []
    kind = PARAMETERS["controls"].kind
    now = () if given is None else kind.check("controls", given, pipe.package.manifest)
    left: list[Recorded] = list(pipe.controls.records(now))
    recorded = _read(steered)
    for one in recorded:
        same = next((other for other in left if _identity(other) == _identity(one)), None)
        if same is None:
            missing.append(one)
            continue
        left.remove(same)
        _tell_of_changes(one, same)
    if missing:
        others = f", and given is {_named(left)}" if left else ", which its file does not hold"
        raise UsageError(
            f"the picture was steered by {_named(missing)}{others}",
            expected="the same nets and pictures",
            fix="Pass controls=[…], or the options, with FILE for what a picture cannot know: "
            + command("latentrt", "generate", "--from", "PICTURE", *_words(recorded)),
        )


def _read(steered: object) -> list[Recorded]:
    """Each control of a record. Raises UsageError for what is none."""
    try:
        found = cast("list[Recorded]", list(cast(Any, steered) or ()))
        for one in found:
            _identity(one)
            _named([one])
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"the record's controls are {steered!r:.80}",
            expected="controls with their sha256 and that of their pictures: a record that latentrt wrote",
            fix="Pass prompt and parameters instead.",
        ) from error
    return found


def _identity(control: Recorded) -> tuple[Any, ...]:
    """The hashes of the net and of all that it read."""
    return (control["sha256"], *([one["sha256"] for one in control.get(name, ())] for name in _PICTURES))


def _named(controls: Sequence[Recorded]) -> str:
    return "; ".join(
        f"{one['model']} ({one['sha256']:.12}) with"
        f" {', '.join(_picture(each) for name in _PICTURES for each in one.get(name, ()))}"
        for one in controls
    )


def _picture(found: Mapping[str, str]) -> str:
    return f"{found.get('name', 'a picture')} ({found['sha256']:.12})"


def _tell_of_changes(was: Recorded, now: Recorded) -> None:
    now = json.loads(json.dumps(now))  # as the picture's file has it
    names = [name for name in {**was, **now} if name not in ("model", *_PICTURES)]
    changed = [name for name in names if was.get(name) != now.get(name)]
    if changed:
        _LOG.warning(
            "%s steered the picture with %s, and now with %s: it differs",
            was["model"],
            ", ".join(f"{name} {was.get(name)}" for name in changed),
            ", ".join(f"{name} {now.get(name)}" for name in changed),
        )


def _words(recorded: Sequence[Recorded]) -> list[str]:
    """The options that give nets and pictures again; how they count is taken from the picture."""
    words: list[str] = []
    for net, prefix, prompts in (
        ("--control-net", "--control", False),
        ("--ip-adapter", "--ip-adapter", True),
    ):
        controls = [one for one in recorded if _is_prompt(one) == prompts]
        words += [word for _ in controls for word in (net, "FILE")]
        for pictures in _PICTURES:
            option = f"{prefix}-{pictures.removesuffix('s')}"
            files = [one.get("name", "FILE") for control in controls for one in control.get(pictures, ())]
            words += [word for file in files for word in (option, file)]
    return words


def _is_prompt(control: Recorded) -> bool:
    return control.get("kind") == "ip-adapter"
