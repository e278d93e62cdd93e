"""`latentrt serve`: models behind HTTP, for programs in other languages, chat front ends, and browsers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..engines.errors import UsageError
from .control import load_control
from .models import say
from .progress import progress_bar
from .shown import show

if TYPE_CHECKING:
    from ..serve.server import Options

PORT = 7860  # AUTOMATIC1111's, which its clients try first
KEYS = "LATENTRT_API_KEYS"  # the environment's variable


def serve(
    models: Annotated[
        list[str] | None,
        Argument(
            metavar="[NAME=]MODEL…", help="Checkpoints or packages, as generate's --model. Default: demo."
        ),
    ] = None,
    host: Annotated[str, Option(help="The address to listen on. Others than this machine's need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, Option(min=0, max=65535, help="0 is any free one.")] = PORT,
    key_file: Annotated[
        Path | None, Option(metavar="FILE", help=f"Keys that callers need, one a line; or ${KEYS}.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, Option(metavar="NAME", help="A name by which this server may be called, too.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, Option(metavar="ORIGIN", help="Pages that may call: https://example.org.")
    ] = None,
    queue: Annotated[int, Option(min=1, help="Jobs that wait and run, at most.")] = 64,
    rows: Annotated[
        int | None, Option(min=1, help="Rows of a call of the UNet, at most. Default: measured.")
    ] = None,
    fixed_rows: Annotated[
        int | None,
        Option(
            "--fixed-rows",
            min=2,
            metavar="N",
            help="Rows of every call, filled up: for devices that round otherwise with another number.",
        ),
    ] = None,
    at_once: Annotated[int, Option(min=1, help="Jobs of a model that run side by side.")] = 4,
    grace: Annotated[float, Option(min=0, help="Seconds for jobs that are there at SIGTERM.")] = 30.0,
    strict_models: Annotated[
        bool, Option("--strict-models", help="Refuse names of models that are not served.")
    ] = False,
    lenient: Annotated[
        bool, Option("--lenient", help="OpenAI's API: leave out unknown fields, in place of refusing them.")
    ] = False,
    backend: Annotated[str, Option(help="As of generate.")] = "auto",
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:1, openvino:GPU.")] = "auto",
    threads: Annotated[int | None, Option(help="CPU threads.")] = None,
    lora_dir: Annotated[
        Path | None, Option("--lora-dir", metavar="FOLDER", help="Adapters that requests name.")
    ] = None,
    embd_dir: Annotated[
        Path | None, Option("--embd-dir", metavar="FOLDER", help="Textual inversions that prompts name.")
    ] = None,
    control: Annotated[
        list[str] | None,
        Option(metavar="FILE", help="ControlNets, T2I-Adapters and IP-Adapters that requests name."),
    ] = None,
    open_metrics: Annotated[
        bool, Option("--open-metrics", help="/metrics needs no key, as /health never does.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object when it answers.")] = False,
) -> None:
    """Draw for whoever calls: OpenAI's and AUTOMATIC1111's APIs, jobs with live events, and a page."""
    _check_installed()
    options = _options(rows, fixed_rows, at_once=at_once, strict_models=strict_models, lenient=lenient)
    from ..runtime.pipeline import Pipeline
    from ..serve.app import create_app
    from ..serve.door.access import HEALTH_PATHS, allow, check_exposure
    from ..serve.door.keys import join_keys, keys_of_environment, read_keys
    from ..serve.jobs.bounds import Bounds
    from ..serve.metrics import PATH as METRICS
    from ..serve.run import listen
    from ..serve.run import serve as answer
    from ..serve.server import Server, named

    keys = join_keys([keys_of_environment(KEYS), *([read_keys(key_file)] if key_file else [])])
    check_exposure(host, keys)
    open_paths = (*HEALTH_PATHS, METRICS) if open_metrics else HEALTH_PATHS
    access = allow(hosts=allow_host or (), origins=allow_origin or (), keys=keys, open_paths=open_paths)
    names = named(models or ["demo"])
    with ExitStack() as stack:
        listening = stack.enter_context(listen(host, port))
        with progress_bar(enabled=not as_json) as advance:
            open_pipe = partial(
                Pipeline.open,
                backend=backend,
                device=device,
                threads=threads,
                loras=lora_dir,
                embeddings=embd_dir,
                progress=advance,
                note=say,
            )
            pipes = {name: stack.enter_context(open_pipe(model)) for name, model in names.items()}
            for pipe in pipes.values():
                for file in control or ():
                    load_control(pipe, file)
            server = Server(pipes, Bounds(jobs=queue), options)
            advance("warming up", 0, 1)
            server.start()
        stack.callback(server.end, 0.0)
        address, number = listening.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{number}"
        ready = partial(_say_ready, url, list(pipes), as_json=as_json)
        answer(server, create_app(server, access), listening, ready=ready, grace_s=grace)


def _options(rows: int | None, fixed_rows: int | None, **rest: Any) -> Options:
    from ..serve.server import Options

    if fixed_rows is None:
        return Options(rows=rows, **rest)
    if rows not in (None, fixed_rows):
        raise UsageError(
            f"--rows {rows} and --fixed-rows {fixed_rows}",
            expected="one number of rows",
            fix="Leave --rows out.",
        )
    return Options(rows=fixed_rows, sizes=(fixed_rows,), **rest)


def _say_ready(url: str, models: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"url": url, "models": list(models)}), flush=True)
    else:
        show(f"{', '.join(models)} at {url}")
        sys.stdout.flush()  # of a service it is a pipe


def _check_installed() -> None:
    from importlib.util import find_spec

    from ..engines.installed import install_command

    wanted = ("fastapi", "uvicorn", "multipart", "prometheus_client")
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the server needs {', '.join(missing)}",
            expected="the extra `serve`",
            fix=install_command("serve"),
        )
