"""What people write for a model of a hub: `org/name`, `org/name@revision`, one of its files, or its page.

Nothing here imports the hub's client or asks a hub.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..files.component import PICKLES

SAFETENSORS = ".safetensors"
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# As the hub has names: letters, digits, "-", "_" and ".", neither "--" nor "..", no "-" or "." at the ends.
_WORD = r"(?!.*?(?:--|\.\.))\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"{_WORD}/{_WORD}", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[\w.-]+(?:/[\w.-]+)*", re.ASCII)  # a branch, a tag, a commit, refs/pr/1
# What follows the repository in a page's address, before the revision.
_PAGES = ("tree", "blob", "resolve", "commit")


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model of a hub.

    Attributes:
        repository: "ORG/NAME".
        revision: a branch, a tag or a commit.
        file: the one file of the repository that is wanted; None is the whole model.
    """

    repository: str
    revision: str = "main"
    file: str | None = None

    def __str__(self) -> str:
        """What `parse` reads."""
        file = "" if self.file is None else f"/{self.file}"
        return f"{self.repository}{file}{'' if self.revision == 'main' else f'@{self.revision}'}"


def is_hub_id(text: str) -> bool:
    """Whether `text` is a model of a hub, and no path: what exists here, or looks like a path, is none.

    `models/SD/dream.safetensors` could be both. It is a path where there is a folder `models`.
    """
    found = parse(text)
    with suppress(OSError, ValueError):  # such as a name that is too long for a file
        if Path(text).exists():
            return False
        if found is not None and found.file is not None and "://" not in text:
            return not Path(text.partition("/")[0]).is_dir()
    return found is not None


def parse(text: str) -> HubModel | None:
    """The model that `text` names, whatever lies at a path of that name; None if it has another form."""
    if "://" in text:
        return _parse_page(text)
    path, at, revision = text.partition("@")
    words = path.split("/")
    model = _model(words[:2], revision if at else "main", words[2:])
    # org/name.safetensors is a path; so is a folder in a folder in a folder
    if model is None or path.endswith((SAFETENSORS, *PICKLES)) != (model.file is not None):
        return None
    return model


def _parse_page(text: str) -> HubModel | None:
    address = urlsplit(text)
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    if address.scheme not in ("https", "http") or address.netloc not in (*_HOSTS, endpoint.netloc):
        return None
    words = [unquote(word) for word in address.path.strip("/").split("/")]
    if len(words) == 2:
        return _model(words, "main", [])
    if len(words) < 4 or words[2] not in _PAGES:
        return None
    return _model(words[:2], words[3], words[4:])


def _model(repository: list[str], revision: str, file: list[str]) -> HubModel | None:
    name = "/".join(repository)
    if not (_REPOSITORY.fullmatch(name) and _REVISION.fullmatch(revision)):
        return None
    if any(word in ("", ".", "..") or re.search(r'[\\:*?"<>|\0]', word) for word in file):
        return None
    return HubModel(repository=name, revision=revision, file="/".join(file) or None)
