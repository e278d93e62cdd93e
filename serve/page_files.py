"""The page at `/`: a fixed table of files, read once. No folder is ever joined with what a request says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, kw_only=True)
class PageFile:
    """A file of the page, with its type as browsers are told it."""

    content: bytes
    media_type: str

    @cached_property
    def etag(self) -> str:
        """Another one for other content."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


def _read(folder: Path) -> Mapping[str, PageFile]:
    """Path of a request -> file. `index.html` is the page itself."""
    found = {
        path.name: PageFile(content=path.read_bytes(), media_type=_MEDIA_TYPES[path.suffix])
        for path in sorted(folder.iterdir())
        if path.suffix in _MEDIA_TYPES
    }
    return {"/": found.pop("index.html"), **{f"/static/{name}": file for name, file in found.items()}}


PAGE_FILES = _read(Path(__file__).parent / "page")
PAGE_PATHS = frozenset(PAGE_FILES)  # they need no key: it is the page that asks for one

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
@router.api_route("/static/{name}", methods=["GET", "HEAD"])
async def page_file(request: Request) -> Response:
    """A file of the page, or 304 where the browser has it."""
    file = PAGE_FILES.get(request.scope["path"])
    if file is None:
        raise HTTPException(404)
    headers = {"etag": file.etag, "cache-control": "no-cache"}  # kept, and asked for again each time
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
