"""How latentrt was installed, and so the command that adds something to it."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import Path


def install_command(extras: str, *flags: str) -> str:
    """The command that installs latentrt again as it was, with these extras ("cpu", "cpu,export").

    pip keeps where a distribution came from, but for those of an index (PEP 610, `direct_url.json`).
    """
    return " ".join(["pip install", *flags, _requirement().replace("[]", f"[{extras}]")])


@cache
def _requirement() -> str:
    """What to pass to pip, with [] where the extras go."""
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
            return f'"latentrt[] @ {url}"'
        folder = Path(url2pathname(urlsplit(url).path))
        if (folder / "pyproject.toml").is_file():
            return f'{"-e " if note["dir_info"].get("editable") else ""}"{folder}[]"'
    return '"latentrt[]"'
