"""AUTOMATIC1111's ``parameters`` text: what other programs read from a picture to make it again.

::

    the prompt, over any number of lines
    Negative prompt: the negative prompt, likewise
    Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1, Size: 512x512, Model: "a, b", Version: latentrt 0.1.0

The rules are those of its ``modules/infotext_utils.py``, which is the format's only specification:

- values with ``,``, ``:`` or a line break are JSON strings;
- a last line with fewer than three ``key: value`` pairs belongs to the prompt;
- no ``RNG`` means GPU ("torch-cuda" in `noise.py`), no ``Clip skip`` means 1, the text encoder's last layer.

Prompts are not escaped. Spaces around their lines and empty lines before them are lost, and a line of the
prompt that begins with "Negative prompt:" starts the negative prompt. The exact prompts are in the picture's
own record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from ...engines.errors import UsageError

PROMPT, NEGATIVE_PROMPT = "prompt", "negative_prompt"

# what a missing parameter means, and so need not be written
DEFAULTS = {"RNG": "GPU", "Clip skip": "1"}

_NEGATIVE = "Negative prompt:"
_FEWEST_PAIRS = 3
_NAME = re.compile(r"\w[-/ \w]+")
_PAIR = re.compile(
    r"""
    (?<! [-/\ \w] ) [-/\ ]*              # from the start of a run, for a linear search
    (\w [-/\ \w]+) : \s*
    ( " (?: [^"\\] | \\. )+ " (?= ,|$ )   # a JSON string, or
    | [^,]* ) ,?                        # whatever stands before the next comma
    """,
    re.VERBOSE,
)

Value = str | int | float | None


def format_infotext(fields: Mapping[str, Value]) -> str:
    """Write the text.

    Args:
        fields: ``"prompt"`` and ``"negative_prompt"``, and the parameters under AUTOMATIC1111's names,
            written in the order given: ``Steps``, ``Sampler`` (its display name), ``Schedule type``,
            ``CFG scale``, ``Seed``, ``Size`` ("512x768"), ``Model hash``, ``Model``, ``RNG`` ("CPU", "GPU"),
            ``Clip skip`` (1: the last layer), ``Version``. None leaves a field out.

    Raises:
        UsageError: a name the format cannot hold, or fewer than three parameters, which would be read as
            prompt.
    """
    prompt, negative = (str(fields.get(name) or "") for name in (PROMPT, NEGATIVE_PROMPT))
    parameters = {
        name: _text(value)
        for name, value in fields.items()
        if value is not None and name not in (PROMPT, NEGATIVE_PROMPT)
    }
    wrong = [name for name in parameters if not _NAME.fullmatch(name) or name != name.strip()]
    if wrong:
        raise UsageError(
            f"parameters named {wrong}",
            expected="two or more letters, digits, spaces, - or /, and no space at an end",
            fix="Rename them.",
        )
    parameters = {name: value for name, value in parameters.items() if DEFAULTS.get(name) != value}
    if len(parameters) < _FEWEST_PAIRS:
        raise UsageError(
            f"{len(parameters)} parameters besides the prompts and the defaults {DEFAULTS}",
            expected="three or more: a shorter last line is read as prompt",
            fix="Pass Steps, Sampler and Seed.",
        )
    lines = [prompt, f"{_NEGATIVE} {negative}"] if negative else [prompt]
    pairs = ", ".join(f"{name}: {_quote(value)}" for name, value in parameters.items())
    return "\n".join([*lines, pairs]).strip()


def parse_infotext(text: str) -> dict[str, str]:
    """Read the text, whoever wrote it; never raises. Fooocus and SwarmUI write JSON in its place.

    Returns:
        ``"prompt"`` and ``"negative_prompt"``, always; every parameter under its own name, as text; and
        `DEFAULTS` for what is missing.
    """
    if (values := _json_object(text)) is not None:
        return _fields_of_json(values)
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < _FEWEST_PAIRS:
        lines, pairs = [*lines, last], []
    prompts: dict[str, list[str]] = {PROMPT: [], NEGATIVE_PROMPT: []}
    reading = PROMPT
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            reading, line = NEGATIVE_PROMPT, line[len(_NEGATIVE) :].strip()
        if line or prompts[reading]:
            prompts[reading].append(line)
    fields = {name: "\n".join(part) for name, part in prompts.items()}
    return {**DEFAULTS, **{name: _unquote(value) for name, value in pairs}, **fields}


# Fooocus' and SwarmUI's names; both draw with ComfyUI, whose noise is the CPU's.
_OTHER_NAMES = {
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE_PROMPT,
    "negativeprompt": NEGATIVE_PROMPT,
    "steps": "Steps",
    "guidance_scale": "CFG scale",
    "cfgscale": "CFG scale",
    "sampler": "Sampler",
    "scheduler": "Schedule type",
    "seed": "Seed",
    "resolution": "Size",
    "base_model": "Model",
    "model": "Model",
    "version": "Version",
}
_RESOLUTION = re.compile(r"\D*(\d+)\D+(\d+)\D*")  # "(1152, 896)"


def _json_object(text: str) -> Mapping[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", values) if isinstance(values, dict) else None


def _fields_of_json(values: Mapping[str, Any]) -> dict[str, str]:
    nested = values.get("sui_image_params")
    if isinstance(nested, dict):
        values = cast("dict[str, Any]", nested)
    fields = {_OTHER_NAMES.get(name, name): _plain(value) for name, value in values.items()}
    if "width" in fields and "height" in fields:
        fields["Size"] = f"{fields.pop('width')}x{fields.pop('height')}"
    if size := _RESOLUTION.fullmatch(fields.get("Size", "")):
        fields["Size"] = f"{size[1]}x{size[2]}"
    return {**DEFAULTS, "RNG": "CPU", PROMPT: "", NEGATIVE_PROMPT: "", **fields}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: str | int | float) -> str:
    # a guidance scale of 7.0 is "7" in AUTOMATIC1111's files
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _quote(value: str) -> str:
    """Quote as AUTOMATIC1111 does, and also what it would write plainly but not read back."""
    plain = value == value.strip() and value != "" and not value.startswith('"') and value.isprintable()
    return value if plain and not set(",:") & set(value) else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if not (value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
