"""The server as an application of Ray Serve: a replica is a whole server, whose requests share steps.

    serve run latentrt.hosts.ray.serving:application                             # the shipped model
    serve run latentrt.hosts.ray.serving:application models=model.safetensors num_gpus=1 max_replicas=8

    serve run latentrt.hosts.ray.serving:application models=one.safetensors,two.safetensors open_at_once=1

Every replica has the HTTP of `latentrt serve`. A job is known to the replica that took it, and Ray chooses
one for each request: callers wait for their answer (OpenAI's and AUTOMATIC1111's APIs, `Prefer: wait`).

Ray's own ports run whatever they are sent, for anyone (CVE-2023-48022): keep them to a network of your own.

With `open_at_once` a replica opens models when somebody asks for them, by the header
`serve_multiplexed_model_id`, and Ray sends requests where their model is open.

Source: `ray.serve.ingress`, `ray.serve.multiplexed`, `ray.serve.config.AutoscalingPolicy`, Ray 2.60.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ...engines.errors import UsageError
from ...runtime.model import check_opening
from ...serve.server import named

if TYPE_CHECKING:
    from ...serve.door.access import Access
    from ...serve.door.guard import Guard

_MODEL = b"serve_multiplexed_model_id"  # the header that says which, as Ray has it
_GRACE_S = 30.0  # for the jobs of a model that makes way for another
_METRIC = "pixel_steps"  # of what waits and runs in a replica, as its metrics call it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What replicas are.

    Attributes:
        models: of each replica, as `latentrt serve` takes them, with commas between.
        device, backend, loras: as there.
        key_file: of keys that callers need. Ray's proxy listens where Ray was told to, so without it every
            caller of that address may draw.
        hosts: names besides this machine's that callers may use, with commas between.
        rows, at_once, queue: as there; 0 rows are measured.
        open_at_once: models that a replica has open; 0 is all of them, from its start.
        min_replicas, max_replicas: how many there are.
        pixel_steps: width x height x steps x pictures of what waits and runs: one more replica for each.
        num_cpus, num_gpus: of each replica.
        look_s: between two decisions on how many there are.
        idle_s: after which there are fewer.
    """

    models: str = "demo"
    device: str = "auto"
    backend: str = "auto"
    loras: str = ""
    key_file: str = ""
    hosts: str = ""
    rows: int = 0
    at_once: int = 4
    queue: int = 64
    open_at_once: int = 0
    min_replicas: int = 1
    max_replicas: int = 1
    pixel_steps: float = 20e6
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    look_s: float = 2.0
    idle_s: float = 300.0

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """Texts of a command line, or values.

        Raises:
            UsageError: a name or a value that is none, or that no replica could start with.
            BackendError: the backend is unknown.
        """
        kinds: dict[str, Any] = {item.name: type(item.default) for item in fields(cls)}
        found: dict[str, Any] = {}
        for name, value in given.items():
            if name not in kinds:
                raise UsageError(
                    f"there is no setting {name!r:.80}",
                    expected=f"one of {', '.join(kinds)}",
                    fix=f"Leave {name:.80} out.",
                )
            try:
                found[name] = kinds[name](value)
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"{name} is {value!r:.80}", expected="a number", fix=f"Change {name}."
                ) from error
        settings = cls(**found)
        settings._check()
        return settings

    def _check(self) -> None:
        """Raise what would else be seen in the log of a replica alone."""
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise UsageError(
                    f"{name} is {getattr(self, name):g}",
                    expected=f"{least:g} or more",
                    fix=f"Change {name}.",
                )
        if self.min_replicas > self.max_replicas:
            raise UsageError(
                f"min_replicas is {self.min_replicas}",
                expected=f"max_replicas, {self.max_replicas}, or fewer",
                fix="Change one of them.",
            )
        if self.key_file and not Path(self.key_file).is_file():
            raise UsageError(
                f"key_file is {self.key_file!r:.200}, which is no file",
                expected="keys, one a line",
                fix="Check the path.",
            )
        if not all(model.strip() for model in named(self.models.split(",")).values()):
            raise UsageError(
                f"models is {self.models!r:.200}", expected="a model, or several", fix="Leave models out."
            )
        check_opening(backend=self.backend, device=self.device, loras=self.loras or None)


# What is less makes no server, or stops Ray's controller.
_LEAST = {
    "pixel_steps": 1.0,
    "rows": 0,
    "at_once": 1,
    "queue": 1,
    "open_at_once": 0,
    "min_replicas": 1,
    "max_replicas": 1,
    "num_cpus": 0.0,
    "num_gpus": 0.0,
    "look_s": 0.1,
    "idle_s": 0.0,
}


class Opened:
    """A server of some models, and what answers for it.

    Raises:
        LatentrtError: a model cannot be opened.
    """

    def __init__(self, settings: Settings, models: Mapping[str, str], access: Access) -> None:
        from ...runtime.pipeline import Pipeline
        from ...serve.app import create_app
        from ...serve.jobs.bounds import Bounds
        from ...serve.server import Options, Server

        with ExitStack() as stack:
            pipes = {
                name: stack.enter_context(
                    Pipeline.open(
                        model,
                        device=settings.device,
                        backend=settings.backend,
                        loras=settings.loras or None,
                    )
                )
                for name, model in models.items()
            }
            options = Options(
                rows=settings.rows or None,
                at_once=settings.at_once,
                strict_models=settings.open_at_once > 0,  # another one's name must not draw with this
            )
            self.server = Server(pipes, Bounds(jobs=settings.queue), options)
            self.server.start()
            self.app: Guard = create_app(self.server, access)
            self._closing = stack.pop_all()

    def close(self, grace_s: float) -> None:
        """End, with so many seconds for what still runs. May be called twice."""
        self.server.end(grace_s)
        self._closing.close()

    def __del__(self) -> None:
        """What Ray calls, in a thread of its own, for the model that was not asked for the longest."""
        if hasattr(self, "_closing"):
            self.close(_GRACE_S)


class Replica:
    """One server, or with `open_at_once` one of each open model; Ray makes it in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        from ...serve.door.access import allow
        from ...serve.door.keys import join_keys, read_keys

        keys = join_keys([read_keys(Path(settings.key_file))] if settings.key_file else [])
        hosts = [name for name in settings.hosts.split(",") if name]
        self._access = allow(hosts=hosts, keys=keys)
        self._settings = settings
        self.models = named(settings.models.split(","))
        self.open: WeakSet[Opened] = WeakSet()
        self._all = None if settings.open_at_once else self._opened(self.models)

    def _opened(self, models: Mapping[str, str]) -> Opened:
        opened = Opened(self._settings, models, self._access)
        self.open.add(opened)
        return opened

    async def opened(self, name: str) -> Opened:
        """One model, opened; `application` has Ray remember the last ones. Raises LatentrtError."""
        models = {name: self.models[name]}
        return await asyncio.get_running_loop().run_in_executor(None, self._opened, models)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray hands requests to."""
        return self._all.app if self._all else ByModel(self)

    def check_health(self) -> None:
        """Raise where a worker is dead for good, or stuck: Ray then makes another replica."""
        if any(opened.server.health == "unhealthy" for opened in list(self.open)):
            raise RuntimeError("the replica's worker does not draw any more")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """How much waits and runs here."""
        return {_METRIC: float(sum(opened.server.queue.load.pixel_steps for opened in list(self.open)))}

    def __del__(self) -> None:
        """End; what still runs has had Ray's time to end."""
        for opened in list(getattr(self, "open", ())):
            opened.close(0.0)


class ByModel:
    """The ASGI application of a replica whose models make way for each other."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answered by the application of the model that a request names, or of the first one."""
        if scope["type"] == "lifespan":
            await self._life(receive, send)
            return
        models = self._replica.models
        names = [value.decode("latin-1") for key, value in scope["headers"] if key == _MODEL]
        name = names[0] if names else next(iter(models))
        if name in models:
            opened = await self._replica.opened(name)
            await opened.app(scope, receive, send)
            return
        text = f"no model {name[:80]!r} is served; expected one of {', '.join(models)}\n"
        head = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 404, "headers": head})
        await send({"type": "http.response.body", "body": text.encode()})

    async def _life(self, receive: Any, send: Any) -> None:
        """Look after whatever is open, as each application does where it is alone."""
        from ...serve.app import LOOK_S

        await receive()
        await send({"type": "lifespan.startup.complete"})
        ends = asyncio.ensure_future(receive())
        while not (await asyncio.wait({ends}, timeout=LOOK_S))[0]:
            for opened in list(self._replica.open):
                opened.server.look()
        await send({"type": "lifespan.shutdown.complete"})


class ByPixelSteps:
    """How many replicas there are to be, by how much there is to draw: one for each `target` of it."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Ray's `AutoscalingContext` -> the number, and what is kept until the next decision."""
        measured: Mapping[str, Mapping[str, float]] = context.aggregated_metrics or {}
        there = measured.get(_METRIC, {})
        return max(1, math.ceil(sum(there.values()) / self._target)), {}


def application(arguments: Mapping[str, Any]) -> Any:
    """The application of such settings, for `serve run` and `ray.serve.run`. Raises as `Settings.read`."""
    serve: Any = import_module("ray.serve")
    config: Any = import_module("ray.serve.config")
    settings = Settings.read(arguments)
    scaling = config.AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        upscale_delay_s=settings.look_s,
        downscale_delay_s=settings.idle_s,
        metrics_interval_s=settings.look_s / 2,
        look_back_period_s=settings.look_s,
        policy=config.AutoscalingPolicy(
            policy_function=ByPixelSteps, policy_kwargs={"target": settings.pixel_steps}
        ),
    )
    deployment = serve.deployment(
        name="latentrt",
        max_ongoing_requests=2 * settings.queue,  # the queue refuses by itself, and pages look on besides
        autoscaling_config=scaling,
        graceful_shutdown_timeout_s=40.0,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )
    replica: Any = Replica
    if settings.open_at_once:
        remember = serve.multiplexed(max_num_models_per_replica=settings.open_at_once)
        replica = type("Replica", (Replica,), {"opened": remember(Replica.opened)})
    return deployment(serve.ingress()(replica)).bind(settings)
