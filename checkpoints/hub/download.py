"""Fetch a model from a hub into Hugging Face's cache, with Hugging Face's client.

The client keeps the cache, the tokens and the addresses. One thing it does not do in every release: go on
with a file that an earlier run was interrupted in. So large files are written here, by the client's own
function for that, where its older releases leave unfinished files (`blobs/ETAG.incomplete`); the client then
finds them complete. That is also how their bytes are counted.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from ...engines.errors import DownloadError, ModelError
from ...engines.hub import COMMIT_OR_BLOB, repository_folder, snapshot_of
from ...engines.installed import latentrt_version
from ..files.component import read_json
from .ids import HubModel
from .needed import Needed, needed
from .refusals import hub_name, is_clients, is_overloaded, is_passing, no_room, refusal

_LOG = logging.getLogger(__name__)
_WAITS = (1.0, 2.0, 4.0)  # seconds between attempts
_LARGE = 2**20  # bytes from which a file is worth going on with
_TIMEOUT = 10.0  # seconds, as the client has it for the other requests
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class DownloadProgress:
    """How far a download is.

    Attributes:
        file: the file that is being fetched, by its name in the repository.
        done, total: bytes, over all files that are needed; what was there already counts as done.
    """

    file: str
    done: int
    total: int


Progress = Callable[[DownloadProgress], None]


def download(model: HubModel, *, progress: Progress | None = None) -> Path:
    """Fetch what is needed of a model, and return its folder in the cache, or its file.

    A branch or tag costs one request where all is in the cache, a commit none. Without a connection, the
    model is opened as it was last fetched, and a line is logged. Where the cache holds a whole set of weights
    already (fp32, say), it is used and no other is fetched. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
    are those of the client.

    Args:
        model: from `parse`.
        progress: is called in this thread as bytes arrive.

    Raises:
        DownloadError: no such repository or revision, no access to it, or no connection.
        CheckpointError: the repository has no model that can be opened (`needed`).
        PackageError: the repository's package is not complete.
        StorageError: a full disk, or a cache that cannot be written.
    """
    cache = Path(_client(".constants").HF_HUB_CACHE)
    root = repository_folder(cache, model.repository)
    if COMMIT_OR_BLOB.fullmatch(model.revision):
        with suppress(ModelError):
            return _cached(model, root)
    try:
        listing = _list(model, cache)
    except DownloadError as error:
        return _without_hub(model, root, error)
    fetching = _Fetching(model=model, cache=cache, listing=listing, progress=progress)
    with _quiet_client():
        return fetching.run()


def _client(module: str = "") -> Any:
    """huggingface_hub, or a module of it. It does not tell hubs which libraries are here, unless asked to."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the client is imported
    return import_module(f"huggingface_hub{module}")


@contextmanager
def _quiet_client() -> Generator[None]:
    """Without the client's own bars, one per file; the user's setting is as before afterwards."""
    bars = _client(".utils")
    before = bool(bars.are_progress_bars_disabled())
    if not before:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            bars.enable_progress_bars()


def _patiently(
    call: Callable[[], _Result], model: HubModel, cache: Path, *, passes: Callable[[Exception], bool]
) -> _Result:
    """The result of `call`, tried again for errors that may pass. Raises what `refusal` makes of others."""
    waits = iter(_WAITS)
    while True:
        try:
            return call()
        except Exception as error:  # whatever class the release of the client has for it
            if not is_clients(error):
                raise
            refused, wait = refusal(error, model, cache), next(waits, None)
            if wait is None or not passes(error):
                raise refused from None  # not from what may quote headers, and a token in them
            _LOG.info("%s; it is tried again", refused.found)
        time.sleep(wait)


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """A revision of a repository: its commit, and its files' sizes in bytes (0 where a hub does not say)."""

    commit: str
    sizes: Mapping[str, int]


def _list(model: HubModel, cache: Path) -> _Listing:
    _check_token()
    api = _client().HfApi(**_library())

    def ask() -> _Listing:
        try:
            found = api.model_info(
                model.repository, revision=model.revision, files_metadata=True, timeout=_TIMEOUT
            )
        except (KeyError, TypeError, AttributeError) as error:  # the client takes its keys for granted
            raise ValueError("JSON of another kind") from error
        if not COMMIT_OR_BLOB.fullmatch(found.sha or ""):
            raise ValueError("no commit")
        return _Listing(
            commit=str(found.sha), sizes={one.rfilename: one.size or 0 for one in found.siblings or ()}
        )

    return _patiently(ask, model, cache, passes=is_overloaded)


def _check_token() -> None:
    """Raise DownloadError for a token that cannot be sent, before a library quotes it in an error."""
    token = str(_client().get_token() or "")
    if not (token.isascii() and token.isprintable()):
        raise DownloadError(
            "the token in HF_TOKEN, or that you logged in with, has characters that no token has",
            expected="hf_ and letters and digits",
            fix="Copy it again from the settings of your account, or log in: hf auth login",
        )


def _cached(model: HubModel, root: Path) -> Path:
    """Where the model is opened, from the cache alone. Raises ModelError where it is not whole there."""
    folder = snapshot_of(root, model.revision)
    if folder is None:
        raise DownloadError(f"nothing of {model} is in {root}", expected="its files", fix="Fetch it.")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return _opened(folder, needed(model, names, lambda name: read_json(folder / name)))


def _without_hub(model: HubModel, root: Path, error: DownloadError) -> Path:
    """The model from the cache, as the hub did not answer with it; else the error, with what is missing."""
    try:
        path = _cached(model, root)
    except ModelError as missing:
        raise DownloadError(
            f"{error.found}, and the cache does not have it: {missing.found}",
            expected=error.expected,
            fix=error.fix,
        ) from None
    _LOG.info("%s; %s is used as it was last fetched", error.found, model)
    return path


def _opened(folder: Path, found: Needed) -> Path:
    if found.without_links:
        for name in found.files:
            _replace_link(folder / name)
    return folder / found.opens


def _replace_link(path: Path) -> None:
    """Put the file in place of a link to it, as the cache has it on systems without links; no byte is copied.

    Where that fails, the link stays, and opening the package says how to copy it.
    """
    if path.is_symlink():
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        with suppress(OSError):
            os.link(path.resolve(), beside)
            os.replace(beside, path)


@dataclass(frozen=True, kw_only=True)
class _Fetching:
    """What one download consists of."""

    model: HubModel
    cache: Path
    listing: _Listing
    progress: Progress | None

    @property
    def root(self) -> Path:
        """The repository's folder in the cache."""
        return repository_folder(self.cache, self.model.repository)

    @property
    def folder(self) -> Path:
        """The commit's folder in the cache."""
        return self.root / "snapshots" / self.listing.commit

    def run(self) -> Path:
        """Fetch what is missing; where the model is opened."""
        found = needed(self.model, self.listing.sizes, self._read)
        absent = [name for name in found.files if not self._has(name)]
        # A file that was named may be in the cache without being all that the model has.
        if absent and not found.opens:
            with suppress(ModelError):
                commit = HubModel(repository=self.model.repository, revision=self.listing.commit)
                path = _cached(commit, self.root)
                self._remember(found.files[0])
                return path
        self._fetch(found.files, absent)
        self._remember(found.files[0])
        return _opened(self.folder, found)

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _read(self, name: str) -> Mapping[str, Any]:
        if not self._has(name):
            self._fetch_file(name, lambda done: None)
        return read_json(self.folder / name)

    def _fetch(self, files: tuple[str, ...], absent: list[str]) -> None:
        sizes = self.listing.sizes
        total = sum(sizes[name] for name in files)
        done = total - sum(sizes[name] for name in absent)
        if absent:
            self._check_room(total - done)
            what = f"{len(absent)} of {len(files)} files, {(total - done) / 1e6:.1f} MB"
            _LOG.info("%s: fetching %s from %s to %s", self.model, what, hub_name(), self.folder)
        for name in absent:
            self._fetch_file(name, lambda now, name=name, before=done: self._tell(name, before + now, total))
            done += sizes[name]
            self._tell(name, done, total)

    def _tell(self, name: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(DownloadProgress(file=name, done=done, total=total))

    def _check_room(self, size: int) -> None:
        """Raise StorageError where the disk cannot take `size` bytes, less those of unfinished files."""
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        with suppress(OSError):
            size -= sum(path.stat().st_size for path in self.root.glob("blobs/*.incomplete"))
            free = shutil.disk_usage(there).free
            if size > free:
                raise no_room(size, free, self.model, self.cache)

    def _fetch_file(self, name: str, count: Callable[[int], None]) -> None:
        def fetch() -> None:
            if self.listing.sizes[name] >= _LARGE:
                self._fetch_blob(name, count)
            _download(self.model.repository, name, self.listing.commit)

        _patiently(fetch, self.model, self.cache, passes=is_passing)

    def _remember(self, name: str) -> None:
        """Have the client note which commit the branch or tag is: by a request for a file that is there.

        Last, so that without a connection nobody is led to a commit whose files are not there yet.
        """
        if snapshot_of(self.root, self.model.revision) != self.folder:
            with suppress(Exception):  # all is there; it only serves whoever has no connection next time
                _download(self.model.repository, name, self.model.revision)

    def _fetch_blob(self, name: str, count: Callable[[int], None]) -> None:
        """Write a file's content where the client keeps it, or go on with what is there of it."""
        url = _client().hf_hub_url(self.model.repository, name, revision=self.listing.commit)
        found = _client().get_hf_file_metadata(url, **_library())
        etag = found.etag or ""
        if not COMMIT_OR_BLOB.fullmatch(etag):  # no name for a file; the client may know what to do
            return
        blob = self.root / "blobs" / etag
        lock = self.cache / ".locks" / self.root.name / f"{etag}.lock"  # the client's own
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _held(lock, name):
            if not blob.exists():
                _write_blob(url, blob, found.size, count)


def _library() -> dict[str, str]:
    """Who asks, for the header `user-agent`."""
    return {"library_name": "latentrt", "library_version": latentrt_version()}


def _download(repository: str, name: str, revision: str) -> None:
    """Have the client put a file into its cache, unless it is there."""
    _client().hf_hub_download(repository, name, revision=revision, **_library())


@contextmanager
def _held(path: Path, name: str) -> Generator[None]:
    """Hold the lock of a file of the cache; while another process has it, a line says so."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)  # pyright: ignore[reportUnknownMemberType]
    except Timeout:
        _LOG.info("waiting for another process that fetches %s", name)
        lock.acquire()  # pyright: ignore[reportUnknownMemberType]
    try:
        yield
    finally:
        lock.release()


def _write_blob(url: str, blob: Path, size: int | None, count: Callable[[int], None]) -> None:
    """Fetch a file to `blob`; `count` is called with how many of its bytes are there."""
    unfinished = blob.with_name(f"{blob.name}.incomplete")
    there = unfinished.stat().st_size if unfinished.exists() else 0
    if size is None or there > size:  # of a release that appended what it should not have
        unfinished.unlink(missing_ok=True)
        there = 0
    count(there)
    with _Counted(unfinished, count) as stream:
        headers = _client(".utils").build_hf_headers(**_library())
        http_get = _client(".file_download").http_get
        http_get(url, stream, resume_size=there, headers=headers, expected_size=size)
    # The content of large files is named by its hash. What an interrupted run left was never checked.
    if there and len(blob.name) == hashlib.sha256().digest_size * 2 and _sha256(unfinished) != blob.name:
        unfinished.unlink()
        raise ConnectionError("the rest of the file does not fit what was there")
    os.replace(unfinished, blob)


class _Counted(io.BufferedWriter):
    """A file that is appended to, and tells how long it is."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._count = count

    def write(self, data: Any, /) -> int:
        """Append, and tell."""
        written = super().write(data)
        self._count(self.tell())
        return written


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
