"""What the hub's client raised, as an error with the next step.

The client's releases raise requests', httpx's or httpx2's classes, so those are told apart by what the
client's own classes, the status of an answer and the operating system say. Only that is repeated in a
message: the text of a library may hold an address with a signature, or a header with a token.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...engines.errors import DownloadError, LatentrtError, StorageError
from .ids import HubModel

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's quota, or the file size limit
# The client, and what its releases send requests with.
_CLIENT = ("huggingface_hub", "requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2")
_LOGIN = "hf auth login (or set HF_TOKEN)"
_FREE = "Free disk space (`hf cache` lists what is there), or set HF_HOME to a folder on another disk."
_AGAIN = "Run it again: what was downloaded is kept."


def hub_name() -> str:
    """The hub that is asked, without what else an address may hold, such as a password."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if not (address.scheme and address.hostname):
        return "what HF_ENDPOINT says is no address: it"
    port = f":{address.port}" if address.port else ""
    return f"{address.scheme}://{address.hostname}{port}"


def is_overloaded(error: Exception) -> bool:
    """Whether the hub answered that it cannot answer now."""
    status = _status(_without_wrapping(error))
    return status >= 500 or status in (408, 429)


def is_passing(error: Exception) -> bool:
    """Whether trying again may help: the hub is overloaded, or a connection broke."""
    from huggingface_hub import errors

    error = _without_wrapping(error)
    if _status(error):
        return is_overloaded(error)
    lasting = (LatentrtError, errors.OfflineModeIsEnabled, errors.FileMetadataError, ValueError)
    return not (isinstance(error, lasting) or _is_storage(error))


def is_clients(error: Exception) -> bool:
    """Whether the client or what it is built on raised it, or the system; other errors are mistakes here."""
    root = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | ValueError | LatentrtError) or root in _CLIENT


def refusal(error: Exception, model: HubModel, cache: Path) -> LatentrtError:
    """The error to raise for what the client raised while it fetched `model` to `cache` (`is_clients`)."""
    from huggingface_hub import errors

    error = _without_wrapping(error)
    if isinstance(error, LatentrtError):
        return error
    if isinstance(error, errors.HfHubHTTPError) and _status(error):
        return _refused_by_hub(error, model)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return DownloadError(
            f"{model} is not fetched, because HF_HUB_OFFLINE is set",
            expected="a model in the cache, or a connection",
            fix="Unset HF_HUB_OFFLINE, or pass a local path.",
        )
    if _is_storage(error):
        return _not_written(error, model, cache)
    if isinstance(error, errors.FileMetadataError | ValueError):
        return DownloadError(
            f"{hub_name()} answers with something else than a hub does ({type(error).__name__})",
            expected="the protocol of Hugging Face's hub",
            fix="Check HF_ENDPOINT, and whether a proxy or a login page answers in its place.",
        )
    return DownloadError(
        f"{hub_name()} cannot be reached, or stopped answering ({_reason(error)})",
        expected=f"a connection, to fetch {model}",
        fix=f"Check the connection, and HF_ENDPOINT if you set it. {_AGAIN}",
    )


def no_room(needed: int, free: int, model: HubModel, cache: Path) -> StorageError:
    """The error for a disk that cannot take `needed` bytes."""
    return StorageError(
        f"{model} needs {needed / 1e9:.2f} GB in {cache}, where {free / 1e9:.2f} GB are free",
        expected="room for all of its files",
        fix=_FREE,
    )


def _refused_by_hub(error: Any, model: HubModel) -> DownloadError:
    from huggingface_hub import errors

    page = f"{hub_name()}/{model.repository}"
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"{model.repository} is gated: its authors want you to accept a licence first",
            expected="a token of an account that did",
            fix=f"Accept it at {page} and log in: {_LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(
            f"{model.repository} has no revision {model.revision!r}",
            expected="a branch, a tag or a commit of it",
            fix=f"See which there are: {page}/tree/main",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DownloadError(
            f"{model.repository} is neither a path here nor a model at {hub_name()} that you may see",
            expected="an existing file or folder, or ORG/NAME of a hub",
            fix=f"Check the spelling; if it is a private model, log in: {_LOGIN}",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return DownloadError(
            f"{hub_name()} has lost a file of {model}", expected="what it listed", fix="Run it again."
        )
    status = _status(error)
    if status in (401, 403) or isinstance(error, errors.DisabledRepoError):
        return DownloadError(
            f"{hub_name()} refuses access to {model} (status {status})",
            expected="a token that is valid and may read it, or none for a public model",
            fix=f"Log in again: {_LOGIN}; or unset HF_TOKEN for a public model.",
        )
    return DownloadError(
        f"{hub_name()} answered with status {status}",
        expected=f"the files of {model}",
        fix="Wait for some minutes; a token raises the limits of a hub." if status == 429 else _AGAIN,
    )


def _not_written(error: Exception, model: HubModel, cache: Path) -> StorageError:
    if isinstance(error, OSError) and error.errno in _FULL:
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(cache).free
        return StorageError(
            f"{model} cannot be written: {error.strerror}, with {free} bytes free in {cache}",
            expected="room for all of its files",
            fix=_FREE,
        )
    return StorageError(
        f"{model} cannot be written to {cache}: {_reason(error)}",
        expected="a cache that this user can write",
        fix="Mend its permissions, or set HF_HOME to a folder of yours.",
    )


def _status(error: Exception) -> int:
    """The HTTP status of the answer that an error is about; 0 where there is none."""
    return getattr(getattr(error, "response", None), "status_code", 0) or 0


def _without_wrapping(error: Exception) -> Exception:
    """What the client says it could not find in its cache, after it failed for another reason."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _is_storage(error: Exception) -> bool:
    """Whether the operating system refused a file; requests' and httpx's errors have no `errno`."""
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and error.filename2 is None
        and not isinstance(error, ConnectionError | TimeoutError)
        and type(error).__module__ == "builtins"
    )


def _reason(error: BaseException) -> str:
    """What the operating system says, where it is the cause; else the name of the error's class."""
    for one in _causes(error):
        if (
            isinstance(one, OSError)
            and one.strerror
            and type(one).__module__ in ("builtins", "socket", "ssl")
        ):
            return one.strerror
    return type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
