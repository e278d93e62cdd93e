"""Paths of pictures that need no key: nobody can guess one, and it is worth one picture.

A link says whose job it is and which picture, under a seal that this process alone can make. It lasts as long
as the picture is kept.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from dataclasses import dataclass

from ..jobs.refusals import UnknownPictureError

LINKS = "/v1/images/linked/"
_SECRET = secrets.token_bytes(32)
_SEALED = 16  # bytes of a seal


@dataclass(frozen=True, kw_only=True)
class Linked:
    """What a link leads to: arguments of `Jobs.picture`."""

    owner: str
    name: str
    index: int

    @property
    def path(self) -> str:
        """The link, without a file's suffix."""
        told = f"{self.owner} {self.name} {self.index}".encode()
        return LINKS + base64.urlsafe_b64encode(_seal(told) + told).rstrip(b"=").decode("ascii")


def follow(token: str) -> Linked:
    """What stands behind a link's last part, whatever suffix it has.

    Raises:
        UnknownPictureError: none of this process's.
    """
    text = token.partition(".")[0]
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    seal, told = data[:_SEALED], data[_SEALED:]
    if not hmac.compare_digest(seal, _seal(told)):
        raise UnknownPictureError(
            "a link that leads nowhere",
            expected="one of an answer of this server, which has not been started anew since",
            fix="Send the request again; with the same seed it gives the same picture.",
        )
    owner, name, index = told.decode().split(" ")
    return Linked(owner=owner, name=name, index=int(index))


def _seal(told: bytes) -> bytes:
    return hmac.digest(_SECRET, told, "sha256")[:_SEALED]
