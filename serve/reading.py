"""Bodies of requests as fields: JSON objects, and forms whose files are pictures."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn, cast

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from ..engines.errors import UsageError
from .jobs.job import Once

MOST_PARTS = 64  # of a form: no request has as many fields
LARGEST_TEXT_PART = 2**20  # bytes of a form's field that is no file


async def read_fields(request: Request) -> tuple[dict[str, Any], bytes]:
    """The fields, and bytes that are equal for equal requests.

    Files of a form are bytes; several of one name are a list. Its texts are JSON where they can be, else text
    as it is; a prompt and a model's name are always text.

    Raises:
        UsageError: no object, no JSON, or a damaged form.
    """
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await _form(request)
    body = await request.body()
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise UsageError(
            f"a body with Content-Encoding: {encoding[:40]}",
            expected="JSON as it is",
            fix="Send it unpacked.",
        )
    why = ""
    try:
        sent: Any = json.loads(body or b"{}", parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        sent, why = None, f": {_why(error)}"
    if not isinstance(sent, dict):
        raise UsageError(
            f"a body that is no JSON object{why}", expected='{"prompt": "…"}', fix="Send a JSON object"
        )
    return _whole(cast("dict[str, Any]", sent)), body


def _why(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that is no JSON, without the text."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.lower()} in line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, _NoNumberError):
        return f"{error} is no number of JSON"
    return "a number has too many digits"  # what Python's `int` refuses


def once_of(request: Request, body: bytes) -> Once | None:
    """What makes a request one job however often it is sent; None without an `Idempotency-Key`.

    Raises:
        IdempotencyKeyError: a key that no header can have.
    """
    key = request.headers.get("idempotency-key")
    return None if key is None else Once(key=key, body=hashlib.sha256(body).hexdigest())


def _whole(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, if their texts are characters: JSON can write half of one, which nothing can encode.

    Raises:
        UsageError: an unpaired surrogate, in a name or a value.
    """
    left: list[Any] = [fields]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [*cast("dict[str, Any]", one), *cast("dict[str, Any]", one).values()]
        elif isinstance(one, list):
            left += cast("list[Any]", one)
        elif isinstance(one, str) and not one.isascii() and any("\ud800" <= part <= "\udfff" for part in one):
            raise UsageError(
                "a text with half of a character",
                expected="Unicode without unpaired surrogates",
                fix="Send whole characters.",
            )
    return fields


class _NoNumberError(ValueError):
    """NaN or an infinity, which Python would read."""


def _no_number(text: str) -> NoReturn:
    raise _NoNumberError(text)


async def _form(request: Request) -> tuple[dict[str, Any], bytes]:
    await request.body()  # the form is read from it, and its end looked for
    try:
        form = await request.form(
            max_files=MOST_PARTS, max_fields=MOST_PARTS, max_part_size=LARGEST_TEXT_PART
        )
    except MultiPartException as error:
        raise UsageError("a damaged form", expected="multipart/form-data", fix="Send it again.") from error
    except Exception as error:  # Starlette makes an HTTPException of it where an application is around
        if type(error).__name__ != "HTTPException":
            raise
        raise UsageError("a damaged form", expected="multipart/form-data", fix="Send it again.") from error
    if not await _is_closed(request):
        raise UsageError(
            "a form that breaks off",
            expected="a boundary at its end",
            fix="Send it again.",
        )
    fields: dict[str, Any] = {}
    digest = hashlib.sha256()
    for name, part in form.multi_items():
        value: Any = await part.read() if isinstance(part, UploadFile) else _plain(name, part)
        digest.update(repr((name, value)).encode())
        name = name.removesuffix("[]")
        known = fields.get(name)
        if name not in fields:
            fields[name] = value
        else:
            fields[name] = [*known, value] if isinstance(known, list) else [known, value]
    await form.close()
    return _whole(fields), digest.digest()


async def _is_closed(request: Request) -> bool:
    """Whether a form has its last boundary: its parser takes what there is of a part for the whole."""
    _, options = parse_options_header(request.headers["content-type"])
    return b"--" + options[b"boundary"] + b"--" in await request.body()


_TEXTS = frozenset({"prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "model"})


def _plain(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text
