"""What is told of an error to who asked for the job: its parts, without paths of this machine."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from ...engines.errors import LatentrtError, MemoryLimitError, StorageError
from .refusals import DeadlineError, RefusedError

# After these another try may succeed, by itself. A client that tries all others again draws for nothing.
RETRYABLE = (MemoryLimitError, StorageError, DeadlineError, RefusedError)

# Folders may have blanks in their names: where a path cannot be told from prose, prose goes with it.
_FOLDER = r"[^\s/\\'\"`;,]+(?: [^\s/\\'\"`;,]+)*[/\\]+"
_URL = r"(?P<url>\b(?!file:)[a-z][a-z0-9+.-]+://\S+)"
_PATH = re.compile(rf"{_URL}|(?:\bfile:|\b[A-Za-z]:|~|(?<![\w./\\]))[/\\]+(?=\S)(?:{_FOLDER})*")
# In the advice of errors: what an option is called beside its parameter, and code.
_OPTION = re.compile(r" \(--[\w-]+(?: [\w-]+)?\)|,? or --[\w-]+(?: [A-Z]+)?")
_CODE = re.compile(r"\b(?:pipe|latentrt)\b|--\w|\w\(|=\[")
_OPERATOR = "Leave it out, or ask who runs this server."
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job has failed.

    Args:
        type: a word for programs: `numeric`, `memory_limit`, …; `internal` for any other error.
        found: what is wrong.
        expected: what would have been accepted.
        fix: what mends it.
        retryable: whether the same request may succeed later.
    """

    type: str
    found: str
    expected: str
    fix: str
    retryable: bool

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The parts of a typed error; of any other nothing is told, as its text may say anything."""
        if not isinstance(error, LatentrtError):
            return INTERNAL
        return cls(
            type=type_of(type(error)),
            found=without_paths(error.found),
            expected=without_paths(error.expected),
            fix=without_paths(for_callers(error.fix)),
            retryable=isinstance(error, RETRYABLE),
        )

    def record(self) -> dict[str, object]:
        """As JSON takes it."""
        return asdict(self)


INTERNAL = Failure(
    type="internal",
    found="the server failed",
    expected="pictures",
    fix="The server's log has the reason.",
    retryable=False,
)


def type_of(kind: type[LatentrtError]) -> str:
    """A class's name as a word for programs: `memory_limit` for MemoryLimitError."""
    name = kind.__name__.removesuffix("Error")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def for_callers(fix: str) -> str:
    """The advice of an error to who sends requests, and has neither this Python nor this command line."""
    if "start the server" in fix:  # who asks may be who runs it
        return fix
    said = _OPTION.sub("", re.sub(r"\bPass (?=\w+=…)", "Send ", fix)).replace("=…", "")
    return _OPERATOR if _CODE.search(said) else said


def without_paths(text: str) -> str:
    """A text whose absolute paths are cut to their last names, and without addresses of memory."""
    return _ADDRESS.sub("(address)", _PATH.sub(lambda found: found["url"] or "", text))
