"""Bodies of txt2img and img2img for the OpenAPI document: the same fields whatever the models are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..fields import body_of
from ..server import Server
from .fields import (
    API,
    FIELDS,
    Field,
    read_flag,
    read_list,
    read_names,
    read_number,
    read_object,
    read_picture,
    read_text,
    read_whole,
)

# What is read so -> its type. All may be null, which is to leave them out.
_TYPES: Mapping[Callable[[str, Any], Any], str] = {
    read_flag: "boolean",
    read_list: "array",
    read_names: "array",
    read_number: "number",
    read_object: "object",
    read_picture: "string",
    read_text: "string",
    read_whole: "integer",
}
_USES = {
    "used": {},
    "listed": {"description": "Has no effect here, which the answer says."},
    "refused": {"description": "Is not carried out here."},
}


def bodies(_server: Server) -> Mapping[str, Any]:
    """Path -> the body of its POST. Further fields are listed as without effect."""
    return {
        f"{API}/{route}": body_of(
            [{"type": "object", "properties": {name: _schema(field) for name, field in fields.items()}}],
            ("application/json",),
        )
        for route, fields in FIELDS.items()
    }


def _schema(field: Field) -> dict[str, Any]:
    schema: dict[str, Any] = {**_USES[field.use]}
    if field.read in _TYPES:
        schema["type"] = [_TYPES[field.read], "null"]
    if field.default is not None:
        schema["default"] = field.default
    return schema
