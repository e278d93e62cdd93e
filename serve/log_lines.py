"""Lines of the log that programs can read: a word for what it is, and `name=value` behind it.

They say who (a key's id), what and how long, never a prompt, a picture or a key.
"""

from __future__ import annotations

import json
import logging
import re

from .jobs.job import Job

_LOG = logging.getLogger(__name__)
LONGEST = 200  # characters of a value, which strangers may have written
_PLAIN = re.compile(r"[A-Za-z0-9_.:/+-]+")


def log_line(what: str, **values: object) -> str:
    """One line of ASCII. Values of None are left out; texts with other than plain characters are quoted."""
    return " ".join(
        [what, *(f"{name}={_shown(value)}" for name, value in values.items() if value is not None)]
    )


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)[:LONGEST]
    return text if _PLAIN.fullmatch(text) else json.dumps(text).replace("\x7f", "\\u007f")


def log_job(job: Job) -> None:
    """Write the line of a job that has ended; of others nothing. A watcher of `Jobs`."""
    if job.ended is None:
        return
    work, started = job.submission.work, job.started
    line = log_line(
        "job",
        id=job.id,
        key=job.owner,
        model=job.submission.model or None,
        outcome=job.state,
        reason=job.cancel_reason if job.error is None else job.error.type,
        size=f"{work.width}x{work.height}",
        steps=work.steps,
        pictures=f"{len(job.pictures)}/{work.pictures}",
        bytes=job.picture_bytes,
        waited_s=(started or job.ended) - job.created,
        ran_s=None if started is None else job.ended - started,
    )
    _LOG.info("%s", line)
