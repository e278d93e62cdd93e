"""How latentrt was installed: its version, and the command that adds something to it."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache  # it reads a file, and every picture has it in its record
def latentrt_version() -> str:
    """latentrt's version; "unknown" where it only lies on the path, as in a zip or a bare checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("latentrt")
    except PackageNotFoundError:
        return "unknown"


def install_command(extras: str, *flags: str) -> str:
    """The command that installs latentrt again as it was, with these extras ("cpu", "cpu,export").

    pip keeps where a distribution came from, but for those of an index (PEP 610, `direct_url.json`).
    """
    return " ".join(["pip install", *flags, _source()[0].replace("[]", f"[{extras}]" if extras else "")])


def upgrade_command() -> str:
    """The command that installs a newer release, or in a checkout pulls what is newer."""
    checkout = _source()[1]
    return f'git -C "{checkout}" pull' if checkout else install_command("", "--upgrade")


@cache
def _source() -> tuple[str, Path | None]:
    """What to pass to pip, with [] where the extras go, and the checkout if there is one."""
    from importlib.metadata import distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    # Not installed at all, as in a zip, or a note that nobody can read: then the index is all that is left.
    with suppress(Exception):
        note = json.loads(distribution("latentrt").read_text("direct_url.json") or "null")
        url = str(note["url"])
        if "dir_info" not in note:
            if vcs := note.get("vcs_info"):
                url = f"{vcs['vcs']}+{url}@{vcs.get('requested_revision') or vcs['commit_id']}"
            return f'"latentrt[] @ {url}"', None
        folder = Path(url2pathname(urlsplit(url).path))
        if (folder / "pyproject.toml").is_file():
            return f'{"-e " if note["dir_info"].get("editable") else ""}"{folder}[]"', folder
    return '"latentrt[]"', None
