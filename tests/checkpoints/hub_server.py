"""A hub on loopback: what Hugging Face's client asks of one, by the client's own sources and documentation.

`/api/models/ORG/NAME/revision/REVISION` lists a repository's files; `/ORG/NAME/resolve/REVISION/FILE` is one.
Large files are linked: the answer leads to another host, which takes ranges and must see no token.
https://huggingface.co/docs/hub/api, https://huggingface.co/docs/huggingface_hub/package_reference/file_download.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LINKED = 100_000  # bytes from which a file is kept as git-lfs does, and named by its sha256


@dataclass
class Repository:
    """A repository with one commit, and who may see it."""

    files: dict[str, bytes]
    commit: str = "c0ffee" * 6 + "cafe"
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    token: str | None = None

    def etag(self, name: str) -> str:
        content = self.files[name]
        if len(content) >= LINKED:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Asked:
    """One request as it came in."""

    method: str
    host: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Hub:
    """Two servers, the hub and where its large files lie, and what they were asked.

    `faults` says how the next requests for a path that ends so are answered: a status, or "cut" for half of
    the content.
    """

    repositories: dict[str, Repository] = field(default_factory=dict[str, Repository])
    asked: list[Asked] = field(default_factory=list[Asked])
    faults: dict[str, list[int | str]] = field(default_factory=dict[str, list[int | str]])
    page: bytes = b""  # answered to everything, as a login page does

    def __post_init__(self) -> None:
        kinds = [type("Handler", (_Handler,), {"hub": self, "kind": kind}) for kind in ("hub", "cdn")]
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in kinds]
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self._servers
        ]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.daemon_threads = True
            thread.start()

    def close(self) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def paths(self, method: str) -> list[str]:
        """The paths that were asked by this method, without queries."""
        return [one.path for one in self.asked if one.method == method]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    kind: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(
            Asked(self.command, self.kind, path, {k.lower(): v for k, v in self.headers.items()})
        )
        waiting = next((faults for end, faults in self.hub.faults.items() if path.endswith(end)), [])
        fault = waiting.pop(0) if waiting else None
        if isinstance(fault, int):
            return self._send(fault, b"")
        if self.hub.page:
            return self._send(200, self.hub.page, {"Content-Type": "text/html"})
        if self.kind == "cdn":
            content = next(
                content
                for repository in self.hub.repositories.values()
                for name, content in repository.files.items()
                if repository.etag(name) == path.strip("/")
            )
            return self._send_range(content, {}, cut=fault == "cut")
        return self._answer_of_hub(path, cut=fault == "cut")

    def _answer_of_hub(self, path: str, *, cut: bool) -> None:
        words = path.strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        org, name, _, *rest = words[2:] if is_api else words
        repository = self.hub.repositories.get(f"{org}/{name}")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token not in (None, given) and not repository.gated):
            return self._refuse(404 if given else 401, "RepoNotFound")
        known = sorted((*repository.revisions, repository.commit), key=len, reverse=True)
        joined = "/".join(rest)
        revision = next((one for one in known if f"{joined}/".startswith(f"{one}/")), None)
        if revision is None:
            return self._refuse(404, "RevisionNotFound")
        if is_api:
            return self._send_list(f"{org}/{name}", repository)
        if repository.gated and given != repository.token:
            return self._refuse(403 if given else 401, "GatedRepo")
        file = joined[len(revision) + 1 :]
        return self._send_file(repository, file, cut=cut)

    def _send_list(self, name: str, repository: Repository) -> None:
        siblings: list[dict[str, Any]] = []
        for file, content in repository.files.items():
            sibling = {"rfilename": file, "size": len(content), "blobId": "0" * 40}
            if len(content) >= LINKED:
                lfs = {"sha256": repository.etag(file), "size": len(content), "pointerSize": 130}
                sibling["lfs"] = lfs
            siblings.append(sibling)
        found = {"id": name, "sha": repository.commit, "gated": repository.gated, "siblings": siblings}
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repository: Repository, name: str, *, cut: bool) -> None:
        headers = {"X-Repo-Commit": repository.commit}
        content = repository.files.get(name)
        if content is None:
            return self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        etag = f'"{repository.etag(name)}"'
        if len(content) < LINKED:
            return self._send_range(content, {**headers, "ETag": etag}, cut=cut)
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        return self._send(302, b"", {**headers, "Location": f"{self.hub.cdn}/{etag[1:-1]}?signed=secret"})

    def _send_range(self, content: bytes, headers: dict[str, str], *, cut: bool) -> None:
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._send(206 if begin else 200, content[begin:], headers, cut=cut)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, content: bytes, headers: Mapping[str, str] | None = None, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut
