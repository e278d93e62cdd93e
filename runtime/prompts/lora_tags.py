"""`<lora:name:0.8>` in a prompt: adapters that a picture is drawn with.

Source of the grammar: stable-diffusion-webui's `modules/extra_networks.py` and
`extensions-builtin/Lora/extra_networks_lora.py`: the second part is the strength on text encoders and UNet,
or with a third one on text encoders alone; they may be named `te=` and `unet=`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from ...engines.errors import UsageError

_TAG = re.compile(r"<(?:lora|lyco):([^<>]+)>", re.IGNORECASE)
_LIKE = re.compile(r"<\s*(?:lora|lyco)\b[^<>]{0,40}>?", re.IGNORECASE)  # a tag, or one gone wrong
_WANTED = "<lora:NAME:STRENGTH>, or <lora:NAME:TEXT ENCODERS:UNET>"
Lora = tuple[str, "float | dict[str, float]"]


def without_tags(prompt: str, names: Collection[str] | None = None) -> str:
    """A prompt without its tags, or without those of some adapters."""

    def kept(match: re.Match[str]) -> str:
        return "" if names is None or match[1].split(":")[0].strip() in names else match[0]

    return _TAG.sub(kept, prompt)


def tag_text(name: str, strength: Any) -> str | None:
    """The tag that says an adapter and its strength; None where none could."""
    if re.search("[<>:]", name) or name != name.strip():
        return None
    if not isinstance(strength, Mapping):
        return f"<lora:{name}:{strength}>"
    parts = cast("Mapping[str, Any]", strength)
    unet, first, second = (parts.get(part, 1.0) for part in ("unet", "text_encoder", "text_encoder_2"))
    if isinstance(unet, Mapping) or first != second:
        return None
    return f"<lora:{name}:{first}:{unet}>"


def lora_tags(prompt: str) -> tuple[Lora, ...]:
    """The adapters that a prompt names, with their strengths as `adapters.sets.Strength` takes them.

    Raises:
        UsageError: a tag of another form, or `dyn=`, which nothing here carries out.
    """
    return tuple(_read(match[0], match[1]) for match in _TAG.finditer(prompt))


def tags_drawn_as_text(prompt: str, syntax: str) -> str:
    """A line on what looks like a tag and is drawn as text; "" where nothing does.

    With the syntax "a1111" that is what is not closed or has no name, with others every tag.
    """
    found = _LIKE.search(without_tags(prompt) if syntax == "a1111" else prompt)
    if found is None:
        return ""
    if syntax == "a1111":
        return f"{found[0]!r} in the prompt is no tag of an adapter and is drawn as text: write {_WANTED}"
    return (
        f"{found[0]!r} in the prompt is drawn as text, as the prompt syntax {syntax!r} has no tags:"
        " name adapters by loras=[…] or --lora, or use the syntax 'a1111'"
    )


def _read(tag: str, inside: str) -> Lora:
    name, *parts = (part.strip() for part in inside.split(":"))
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    placed = [part for part in parts if "=" not in part]
    strengths = {**dict(zip(("te", "unet", "dyn"), placed, strict=False)), **named}
    if "dyn" in strengths or len(placed) > 3 or not name:
        found = "a rank (dyn)" if "dyn" in strengths else tag
        raise UsageError(
            f"the prompt has {tag[:80]}: {found[:80]} is not carried out",
            expected=_WANTED,
            fix="Write it so.",
        )
    if unknown := sorted(set(strengths) - {"te", "unet"}):
        raise UsageError(
            f"the prompt has {unknown[0]!r:.40} in {tag[:80]}", expected=_WANTED, fix="Write it so."
        )
    encoders = _number(tag, strengths.get("te", "1"))
    unet = _number(tag, strengths["unet"]) if "unet" in strengths else encoders
    if unet == encoders:
        return name, unet
    return name, {"unet": unet, "text_encoder": encoders, "text_encoder_2": encoders}


def _number(tag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"the prompt has the strength {text!r:.40} in {tag[:80]}",
            expected=_WANTED,
            fix="Write a number; call an adapter with a colon in its name by --lora or loras=[…].",
        ) from None
