"""A web service: a prompt comes in as JSON, the bytes of a picture go out.

pip install fastapi uvicorn
uvicorn --app-dir examples --factory service_fastapi:create_app
curl http://127.0.0.1:8000/pictures -H "Content-Type: application/json" -o circle.png \
    -d '{"prompt": "a red circle on a blue background", "seed": 1}'

A client that hangs up stops its picture, and a request that would wait too long is refused at once.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from threading import Event

from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field

import latentrt

AT_ONCE = 1  # one picture uses every core already
WAITING = 8  # more requests than these are refused
LONGEST = 120.0  # seconds


class Wanted(BaseModel):
    """What a client may ask for; what it may not choose, such as 4096x4096 pixels, is not here."""

    prompt: str = Field(max_length=2000)
    negative_prompt: str = Field("", max_length=2000)
    seed: int | None = None
    steps: int = Field(20, ge=1, le=50)


class Studio:
    """One pipeline for all requests, and who may use it."""

    def __init__(self, pipe: latentrt.Pipeline, *, at_once: int = AT_ONCE, waiting: int = WAITING) -> None:
        self._pipe = pipe
        self._turns = asyncio.Semaphore(at_once)
        self._room = at_once + waiting

    async def draw(self, wanted: Wanted, request: Request) -> bytes:
        """PNG. Raises LatentrtError; HTTPException 503 if too many wait."""
        if self._room == 0:
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "10"})
        self._room -= 1
        try:
            async with self._turns:
                cancel = Event()
                drawing = asyncio.create_task(asyncio.to_thread(self._draw, wanted, cancel))
                try:
                    while not drawing.done():
                        if await request.is_disconnected():
                            cancel.set()
                        await asyncio.wait({drawing}, timeout=0.1)
                    return drawing.result()
                finally:
                    cancel.set()  # the server may stop this request too
                    await asyncio.wait({drawing})  # its turn ends when its thread does
        finally:
            self._room += 1

    def _draw(self, wanted: Wanted, cancel: Event) -> bytes:
        return self._pipe(
            wanted.prompt,
            negative_prompt=wanted.negative_prompt,
            seed=wanted.seed,
            num_inference_steps=wanted.steps,
            cancel=cancel,
            timeout=LONGEST,
        ).to_bytes("PNG")


def status_of(error: latentrt.LatentrtError) -> int:
    """The HTTP status that tells a client whose fault it was, and whether to try again."""
    if isinstance(error, latentrt.UsageError):
        return 422
    if isinstance(error, latentrt.CancelledError):
        return 504
    return 503 if isinstance(error, latentrt.MemoryLimitError) else 500


def create_app(model: str = "demo") -> FastAPI:
    """The application. The model is opened when it starts, and closed when it ends."""
    studios: list[Studio] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        with latentrt.Pipeline.open(model) as pipe:
            pipe.warmup()
            studios.append(Studio(pipe))
            yield
            studios.clear()

    async def pictures(wanted: Wanted, request: Request) -> Response:
        try:
            return Response(await studios[0].draw(wanted, request), media_type="image/png")
        except latentrt.LatentrtError as error:
            raise HTTPException(status_of(error), str(error)) from error

    app = FastAPI(title="latentrt", lifespan=lifespan)
    app.add_api_route("/pictures", pictures, methods=["POST"], response_class=Response)
    return app
