"""Bodies of the three requests for pictures in the OpenAPI document: OpenAI's fields, and the models' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fields import TERMS, body_of, schema_of
from ..pictures.exchange import FORMATS
from ..server import Server
from .fields import EDITS, GENERATIONS, MOST_PARTIAL_IMAGES, VARIATIONS, WITHOUT_USE, Endpoint

_PATHS = {"generations": GENERATIONS, "edits": EDITS, "variations": VARIATIONS}
_TEXT = {"type": "string", "description": "Base64, bare or as a data URL."}
_ONE = {"anyOf": [_TEXT, {"type": "object", "required": ["image_url"], "properties": {"image_url": _TEXT}}]}
_PICTURE = {"anyOf": [*_ONE["anyOf"], {"type": "array", "minItems": 1, "maxItems": 1, "items": _ONE}]}
_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
_JSON, _FORM = "application/json", "multipart/form-data"


def bodies(server: Server) -> Mapping[str, Any]:
    """Path -> the body of its POST, as JSON and, where pictures are sent, as a form."""
    return {f"/v1/images/{name}": _body(endpoint, server) for name, endpoint in _PATHS.items()}


def _body(endpoint: Endpoint, server: Server) -> dict[str, Any]:
    models = [schema_of(worker.pipe, server.bounds) for worker in server.workers.values()]
    body = body_of([_schema(endpoint, model, server, _PICTURE) for model in models], (_JSON,))
    if "image" in endpoint.known:
        form = body_of([_schema(endpoint, model, server, _FILE) for model in models], (_FORM,))
        body["content"] |= form["content"]
    return body


def _schema(
    endpoint: Endpoint, model: Mapping[str, Any], server: Server, picture: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of an endpoint for one model; `picture` is what a picture is in the body."""
    of_model = model["properties"]
    fields: dict[str, Any] = {
        **of_model,
        **TERMS,
        "model": {"type": "string", "description": f"One of {', '.join(server.models)}."},
        "n": of_model["num_images_per_prompt"],
        "size": {"type": "string", "pattern": "^([0-9]{1,5}x[0-9]{1,5}|auto)$", "default": "auto"},
        "response_format": {"type": "string", "enum": ["b64_json", "url"], "default": "b64_json"},
        "output_format": {"type": "string", "enum": list(FORMATS), "default": "png"},
        "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
        "background": {"type": "string", "enum": ["auto", "opaque"], "default": "auto"},
        "stream": {"type": "boolean", "default": False},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": MOST_PARTIAL_IMAGES, "default": 0},
        **dict.fromkeys(("image", "images", "mask"), picture),
        **{name: {"description": "Changes nothing, as a header tells."} for name in sorted(WITHOUT_USE)},
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(endpoint.needed),
        "properties": {name: fields[name] for name in sorted(endpoint.known & fields.keys())},
    }
