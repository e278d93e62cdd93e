"""Callers that ask a server for pictures over HTTP, each with a connection that it keeps."""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ...engines.errors import BackendError
from ...engines.spec import Array

ANSWER_S = 300.0  # a caller waits at most


class Caller:
    """One connection to a server; the base of those that speak its language. Not for several threads.

    Args:
        url: of the server: `http://127.0.0.1:7860`.

    Raises:
        BackendError: there is no server, or it answers with an error.
    """

    def __init__(self, url: str) -> None:
        address = urlsplit(url if "//" in url else f"http://{url}")
        self._url = url
        self._connection = http.client.HTTPConnection(
            address.hostname or "", address.port or 80, timeout=ANSWER_S
        )

    def draw(self, fields: Mapping[str, Any]) -> Array:
        """The picture (H, W, 3) uint8 of a request: `prompt`, `seed` and parameters of `Pipeline`."""
        raise NotImplementedError

    def ask(self, path: str, body: Mapping[str, Any]) -> bytes:
        """What the server answers to a POST. A connection that it has let go in the meantime is made anew."""
        try:
            answer = self._sent(path, json.dumps(body))
            found = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self._refused(f"{type(error).__name__}: {error}") from error
        if answer.status != 200:
            raise self._refused(f"{answer.status} {found[:300].decode(errors='replace')}")
        return found

    def _sent(self, path: str, body: str) -> http.client.HTTPResponse:
        kept = self._connection.sock is not None
        try:
            self._connection.request("POST", path, body, {"content-type": "application/json"})
            return self._connection.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected):
            self._connection.close()
            if not kept:
                raise
        self._connection.request("POST", path, body, {"content-type": "application/json"})
        return self._connection.getresponse()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _refused(self, found: str) -> BackendError:
        return BackendError(
            f"{self._url} answers: {found}",
            expected="a server that draws with the same model",
            fix="Start it, and look at its log: docs/scale.md has the commands.",
        )


class OpenAICaller(Caller):
    """Asks `latentrt serve`, or its replicas in Ray Serve, by OpenAI's API, which is one request."""

    def draw(self, fields: Mapping[str, Any]) -> Array:
        """See `Caller.draw`."""
        sent = dict(fields)
        sent["size"] = f"{sent.pop('width')}x{sent.pop('height')}"
        answer = json.loads(self.ask("/v1/images/generations", sent))
        return _pixels(answer["data"][0]["b64_json"])


class TritonCaller(Caller):
    """Asks a repository of `latentrt export-triton` in Triton by `generate_stream`, with its events."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        models = [item["name"] for item in json.loads(self.ask("/v2/repository/index", {"ready": True}))]
        if not models:
            self.close()
            raise self._refused("it has no model that is ready")
        self._path = f"/v2/models/{models[0]}/generate_stream"

    def draw(self, fields: Mapping[str, Any]) -> Array:
        """See `Caller.draw`."""
        for event in self._events(self.ask(self._path, fields)):
            if event["event"] == "image":
                return _pixels(event["b64"])
        raise self._refused("a stream without a picture")

    def _events(self, stream: bytes) -> Iterator[Mapping[str, Any]]:
        for line in stream.splitlines():
            if line.startswith(b"data:"):
                told = json.loads(line[5:])
                if "error" in told:
                    raise self._refused(str(told["error"])[:300])
                yield json.loads(told["event"])


CALLERS: Mapping[str, Callable[[str], Caller]] = {
    "latentrt serve": OpenAICaller,
    "Triton": TritonCaller,
    "Ray Serve": OpenAICaller,
}


def _pixels(text: str) -> Array:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
