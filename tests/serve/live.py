"""A real server of the shipped model, on a loopback port of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from latentrt import Pipeline
from latentrt.serve.app import create_app
from latentrt.serve.door.access import Access, allow
from latentrt.serve.door.body import BODY_LIMITS, BodyLimits
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.run import listen, settings
from latentrt.serve.server import Options, Server

WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Live:
    """Where it answers, and what stands behind."""

    url: str
    server: Server
    client: httpx.Client


def open_demo(**options: Any) -> Pipeline:
    """The shipped model on the CPU."""
    return Pipeline.open(backend="onnxruntime", device="cpu", **options)


@contextmanager
def live(
    pipe: Pipeline,
    *,
    bounds: Bounds | None = None,
    options: Options | None = None,
    access: Access | None = None,
    limits: BodyLimits = BODY_LIMITS,
    start: bool = True,
) -> Generator[Live]:
    """Serve a pipeline; without `start` nothing is drawn, and all that is asked for waits."""
    server = Server({"demo": pipe}, bounds, options or Options(rows=4))
    if start:
        server.start()
    listening = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    app = create_app(server, access or allow(), limits)
    runs = uvicorn.Server(settings(app, closing_s=1))
    thread = threading.Thread(target=lambda: asyncio.run(runs.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            until = time.monotonic() + WAIT_S
            while not runs.started:
                assert thread.is_alive(), "it does not answer"
                assert time.monotonic() < until, "it does not answer"
                time.sleep(0.005)
            yield Live(url=url, server=server, client=client)
    finally:
        server.end(0)
        runs.should_exit = True
        thread.join(WAIT_S)
        listening.close()
