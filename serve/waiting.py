"""How asyncio waits for what the workers' threads do: a job's events, its end, and who has gone away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, cast

from .jobs.events import EventLog, Reading
from .jobs.job import Job
from .jobs.table import Jobs

Receive = Callable[[], Awaitable[Mapping[str, Any]]]


async def readings(
    log: EventLog, number: int = 0, every: float | None = None
) -> AsyncGenerator[Reading | None]:
    """What a log has after a number, as it comes; the last one has ended.

    With `every`, None after so many seconds in which nothing came.
    """
    loop, more = asyncio.get_running_loop(), asyncio.Event()
    forget = log.watch(lambda: cast(None, loop.call_soon_threadsafe(more.set)))
    try:
        while True:
            more.clear()
            reading = log.after(number)
            if reading.snapshot is not None:
                number = reading.snapshot.number
            if reading.events:
                number = reading.events[-1].number
            if reading.snapshot is not None or reading.events or reading.ended:
                yield reading
            if reading.ended:
                return
            try:
                await asyncio.wait_for(more.wait(), every)
            except asyncio.TimeoutError:
                yield None
    finally:
        forget()


async def ended(jobs: Jobs, job: Job, timeout: float | None = None) -> Job:
    """The job when it has ended, or as it is when the time is over. Raises UnknownJobError, GoneError."""

    async def end() -> None:
        async for _ in readings(job.log):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(end(), timeout)
    return jobs.get(job.id, job.owner)


async def unless_gone(receive: Receive, work: Awaitable[Job], gone: Callable[[], Any]) -> Job | None:
    """The result of `work`, or None after `gone` was called because the connection has closed.

    It is called too where the request's own task is cancelled, as servers do that tell of it so (Ray Serve).
    The body must have been read. (Polling `Request.is_disconnected` never says so behind some middleware.)
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        gone()
        return None
    except asyncio.CancelledError:
        gone()
        raise
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
