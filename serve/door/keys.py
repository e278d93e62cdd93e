"""Who may call: keys, of which only digests are kept, so that nothing can print one.

Keys come from a file or from an environment variable, never from the command line, which every user of a
machine can read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import UsageError, command

SHORTEST_KEY = 16  # characters; a key's id, which logs show, would let shorter ones be found by trying
LARGEST_KEY_FILE = 64 * 2**10  # bytes
_KEY = re.compile(rf"[!-~]{{{SHORTEST_KEY},512}}")
_NEW_KEY = 'Make one: python3 -c "import secrets; print(secrets.token_urlsafe())"'
_OTHERS = stat.S_IRWXO | stat.S_IWGRP


@dataclass(frozen=True)
class Keys:
    """SHA-256 digests of the keys that may call; without any, everyone may.

    A key's id is the first eight hexadecimal digits of its digest: logs and jobs name the caller by it.
    """

    digests: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.digests)

    def owner(self, key: bytes | None) -> str | None:
        """The id of a key, None if it is not one of these.

        Every digest is compared, whichever fits, so that the time taken says nothing of them.
        """
        if key is None:
            return None
        digest = hashlib.sha256(key).digest()
        fits = [hmac.compare_digest(digest, one) for one in self.digests]
        return digest.hex()[:8] if any(fits) else None


NO_KEYS = Keys()


def read_keys(path: str | os.PathLike[str]) -> Keys:
    """The keys of a file: one a line; empty lines, and those that begin with #, are left out.

    Raises:
        UsageError: the file cannot be read, is too large, may be read or written by others (its group may
            read it), has a line that is no key, or has none at all.
    """
    place = Path(path)
    try:
        with place.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(LARGEST_KEY_FILE + 1)
    except OSError as error:
        raise UsageError(
            f"the key file {place} cannot be read: {error.strerror}",
            expected="a text file with a key a line",
            fix=_NEW_KEY,
        ) from error
    if os.name == "posix" and mode & _OTHERS:
        raise UsageError(
            f"the key file {place} is open to other users (mode {stat.S_IMODE(mode):o})",
            expected="a file that its owner alone may write, and its group at most read",
            fix=f"Close it: {command('chmod', '600', place)}",
        )
    if len(content) > LARGEST_KEY_FILE:
        raise UsageError(
            f"the key file {place} has more than {LARGEST_KEY_FILE} bytes",
            expected="a text file with a key a line",
            fix=_NEW_KEY,
        )
    lines = [line.strip() for line in content.decode("latin-1").splitlines()]
    named = {
        f"line {number} of the key file {place}": line
        for number, line in enumerate(lines, 1)
        if line and not line.startswith("#")
    }
    return _digests(named, f"the key file {place}")


def keys_of_environment(name: str, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys in a variable, separated by blanks or commas; none where the variable is not set.

    Raises:
        UsageError: the variable is set and has no key, or something that is none. (Whoever sets it wants
            keys: an empty one would open the server to everyone.)
    """
    text = environment.get(name)
    if text is None:
        return NO_KEYS
    words = re.split(r"[\s,]+", text.strip(" \t\r\n,"))
    named = {f"key {number} in {name}": word for number, word in enumerate(words, 1) if word}
    return _digests(named, name)


def join_keys(several: Iterable[Keys]) -> Keys:
    """All the keys of several places, each once."""
    return Keys(tuple(dict.fromkeys(digest for keys in several for digest in keys.digests)))


def _digests(named: Mapping[str, str], place: str) -> Keys:
    """Errors name where a key stands, and never show it."""
    for name, key in named.items():
        if not _KEY.fullmatch(key):
            raise UsageError(
                f"{name} has {len(key)} characters, or other ones than a key may have",
                expected=f"{SHORTEST_KEY} to 512 characters of ASCII without blanks",
                fix=_NEW_KEY,
            )
    if not named:
        raise UsageError(f"{place} holds no key", expected="one or several keys", fix=_NEW_KEY)
    return Keys(tuple(dict.fromkeys(hashlib.sha256(key.encode()).digest() for key in named.values())))
