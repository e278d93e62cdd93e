"""Draws by a `latentrt serve` of this machine, over its own API. Nothing but Python's library is needed."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
WAIT_S = 60  # of one request; a job that takes longer is asked for again


def check_url(address: str) -> str | None:
    """Why an address is none of a server on this machine; None if it is one."""
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname in LOOPBACK and parts.path in ("", "/") and not parts.query:
        return None
    return f"{address!r} is no http://127.0.0.1:PORT: pictures are drawn by servers of this machine alone"


class Remote:
    """A server. Redirects are not followed: it sends none."""

    def __init__(self, address: str, key: str = "") -> None:
        if why := check_url(address):
            raise ValueError(why)
        self._address, self._key = address.rstrip("/"), key
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def draw(self, prompt: str, values: dict[str, Any], model: Any) -> tuple[Any, str]:
        """(N, H, W, 3) uint8, and the first one's parameters as text. Raises ValueError, in its words."""
        sent = {"prompt": prompt, **values}
        if model.path:
            sent["model"] = model.path
        for name in ("image", "mask_image"):
            if name in sent:
                sent[name] = _as_base64(sent[name])
        if model.loras:
            sent["loras"] = [{"name": name, "strength": strength} for name, strength in model.loras]
        if model.controls:
            sent["controls"] = [_control(one) for one in model.controls]
        job = self._json("/v1/jobs", sent)
        while job["status"] in ("queued", "running"):
            self._events(job["id"])
            job = self._json(f"/v1/jobs/{job['id']}")
        if job["status"] != "completed":
            error = job["error"] or {"found": job["status"], "expected": "a picture", "fix": ""}
            raise ValueError(f"{error['found']}; expected {error['expected']}. {error['fix']}")
        pictures = sorted(job["images"], key=lambda one: one["index"])
        files = [self._open(one["href"]) for one in pictures]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        return pixels, pictures[0]["infotext"]

    def _events(self, name: str) -> None:
        """Wait for the job's end."""
        with self._opener.open(self._request(f"/v1/jobs/{name}/events"), timeout=WAIT_S) as events:
            for _ in events:
                pass

    def _json(self, path: str, sent: Any = None) -> Any:
        return json.loads(self._open(path, None if sent is None else json.dumps(sent).encode()))

    def _open(self, path: str, body: bytes | None = None) -> bytes:
        try:
            with self._opener.open(self._request(path, body), timeout=WAIT_S) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            told = json.loads(error.read() or b"{}").get("error", {})
            text = told.get("found", f"status {error.code}") if isinstance(told, dict) else str(told)
            raise ValueError(f"the server says: {text}") from error

    def _request(self, path: str, body: bytes | None = None) -> urllib.request.Request:
        headers = {"content-type": "application/json"} if body is not None else {}
        if self._key:
            headers["x-api-key"] = self._key
        return urllib.request.Request(self._address + path, data=body, headers=headers)  # noqa: S310 (checked)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _as_base64(pixels: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _control(one: Any) -> dict[str, Any]:
    pixels = (one.image[0].cpu().numpy() * 255.0).round().clip(0, 255).astype(np.uint8)
    told = {
        "model": one.name,
        "image": _as_base64(pixels),
        "strength": one.strength,
        "start": one.start,
        "end": one.end,
    }
    return told if one.preparation is None else {**told, "preparation": one.preparation}
