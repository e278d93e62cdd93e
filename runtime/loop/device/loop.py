"""The loop on a device: uploaded once, enqueued to the end, waited for once.

Latent, invariants, table and noise stay on the device; guidance and the row update are the net `step`, or
`step_masked` where a picture is kept outside a mask. A row that ran before can be replayed as a CUDA graph
(`cuda_graphs.py`); `memory_fallback.py` decides what is given up when memory runs out. What a request needs
before its rows, such as its prompts' contexts, is a `call` each, with a synchronisation of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from threading import RLock
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from ....engines.backend import MemoryLedger
from ....engines.device import Device, DeviceNet, Shapes
from ....engines.errors import BackendError, MemoryLimitError
from ....engines.net_weights import changed_names, engine_bytes
from ....engines.package import Manifest, Package
from ....engines.spec import Array
from ...pictures.tiling import decode_tiled
from ..calls import answered
from ..controls import ControlNetInputs, SteadyInputs, added_inputs, averages, refuse_unloaded
from ..denoise import check_finite, steps_of_calls
from ..job import NEVER, Clock, ControlJob, DenoiseJob, Drawn, PackageLoop, State, Stop, UNetCall
from .controls import NET, ControlProgram, ControlShape, DeviceControls, SteeringInputs
from .cuda_graphs import Replay
from .memory_fallback import MemoryNeed, MemoryPlan, equal_rows, fit_in_memory
from .pool import ProgramPool
from .programs import (
    BoundProgram,
    DenoiseProgram,
    DenoiseShape,
    NetProgram,
    Nets,
    ScheduleProgram,
    ScheduleShape,
    input_shapes,
)
from .verdicts import Graphs, Verdicts

_LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

# A plan that fitted is tried first for so many requests of its size; then one starts from the top again.
_REMEMBERED = 32


@dataclass(frozen=True, kw_only=True)
class _RememberedPlan:
    """A plan that fitted after something was given up."""

    plan: MemoryPlan
    requests_left: int


@dataclass(kw_only=True)
class _Turns:
    """What loops on one device share: whose turn it is, and its memory.

    Attributes:
        lock: is held by who runs.
        loops: those that are open, the first of them the one that the others are adapted from.
    """

    lock: RLock = field(default_factory=RLock)
    loops: list[DeviceLoop] = field(default_factory=list["DeviceLoop"])


@dataclass(kw_only=True)
class _Rows:
    """What loops share that have the same UNet: graphs of its rows, which one run of it may invalidate.

    Attributes:
        replays: of every program that has run rows.
        ran_last: of these.
    """

    replays: dict[BoundProgram, Replay] = field(default_factory=dict["BoundProgram", "Replay"])
    ran_last: BoundProgram | None = None


@dataclass(frozen=True, kw_only=True)
class OwnNet:
    """A net with other weights than the base's: what opens it, and about how many bytes its weights take."""

    open: Callable[[], DeviceNet]
    size: int


class _Picture:
    """`cuda_graphs.Picture` of a job, in the programs that it was given.

    Args:
        job: what is drawn.
        denoiser, schedule: run its rows.
        decoder: of its end; None where that comes later, or never.
        controls: what steers it; None where nothing does.
        held: gives the programs back when it closes.
    """

    def __init__(
        self,
        job: DenoiseJob,
        denoiser: DenoiseProgram,
        schedule: ScheduleProgram,
        decoder: NetProgram | None,
        controls: DeviceControls | None,
        held: ExitStack,
    ) -> None:
        self.denoiser, self.decoder, self.close = denoiser, decoder, held.close
        self._schedule, self._job, self._controls = schedule, job, controls
        self.rows, self.capturable = len(job.table), denoiser.capturable
        self.enqueue_row, self.blank_row = denoiser.enqueue_row, denoiser.blank_row
        self.read_state = denoiser.read_state

    def rewind(self) -> None:
        self.denoiser.rewind(self._job)

    def feed_row(self, row: int) -> None:
        self.denoiser.feed_row(self._schedule, row)
        if self._controls is not None:
            self._controls.feed(row)


class DeviceLoop:
    """Implements `job.Loop` over the seam `engines/device.py`. Threads may share it: they take turns.

    Args:
        device, nets: where the package's nets run, and they by name; both are closed with the loop.
        manifest: the package's.
        graphs: whether to replay rows as CUDA graphs: "on", "off", or "auto", where that is faster.
        verdicts: what is known of replayed rows here.
        log: is passed a line for everything given up when memory was short, and why rows are not replayed.
        open_net: opens a net of a package with other weights on the device; None where nothing can.
        base: the loop that this one is adapted from. They take turns, and it closes device and nets.
        beside: the loop of another package on the same device. They take turns, and it closes the device.
        own: the nets that this one has in place of the base's once `open_own` has opened them, and how.
    """

    def __init__(
        self,
        device: Device,
        nets: Nets,
        manifest: Manifest,
        *,
        graphs: Graphs = "auto",
        verdicts: Verdicts | None = None,
        log: Callable[[str], None] = _LOG.warning,
        open_net: Callable[[Package, str], DeviceNet] | None = None,
        base: DeviceLoop | None = None,
        beside: DeviceLoop | None = None,
        own: Mapping[str, OwnNet] = MappingProxyType({}),
    ) -> None:
        self.device = device
        self.nets = dict(nets)
        self.pool = ProgramPool(device, self.nets, self._forget)
        self._manifest = manifest
        self._scale = manifest.latent_scale
        self._graphs: Graphs = graphs
        self._verdicts = verdicts or Verdicts()
        self._log = log
        self._open_net, self._base, self._beside = open_net, base, beside
        self._own = own
        self._graph = "unet"  # of the base alone
        first = base or beside
        self._turns = first._turns if first else _Turns()
        self._rows = base._rows if base and "unet" not in own else _Rows()
        self._lock = self._turns.lock
        self._plans: dict[MemoryNeed, _RememberedPlan] = {}
        self._logged = set[str]()
        self._opened = set[str]()  # of `own`
        self._closed = False
        if base is None:
            self._turns.loops.append(self)

    @property
    def replays(self) -> bool:
        """Whether rows of any shape are replayed as a CUDA graph now."""
        return any(replay.replayed for replay in self._rows.replays.values())

    # ── job.PackageLoop ────────────────────────────────────────────────────────────────────────

    def use_unet(self, package: Package, net: str) -> None:
        """See `job.PackageLoop`. Whichever it is, it has the place of "unet" in `nets`."""
        assert self._base is None, "adapted loops run the graph of their base"
        with self._lock:
            if net == self._graph:
                return
            if self._in_use:
                raise BackendError(
                    "the UNet cannot take controls now: a picture is drawn",
                    expected="a loop that draws nothing",
                    fix="Load controls before pictures are drawn.",
                )
            assert self._open_net is not None, "`open_beside` has refused every control"
            opened = self._open_net(package, net)
            self.free_idle()
            self.nets["unet"].close()
            self.nets["unet"], self._graph = opened, net
            self._plans.clear()

    @property
    def unet(self) -> str:
        """The graph of the UNet that runs rows."""
        return self._graph if self._base is None else self._base.unet

    def open_beside(self, package: Package) -> DeviceLoop:
        """See `job.PackageLoop`. Raises BackendError where nothing opens nets of another package."""
        if self._open_net is None:
            raise BackendError(
                "the engines are fixed, and a control has its own",
                expected="a backend that opens more nets",
                fix="Use another one: --backend onnxruntime-cuda, or --backend onnxruntime",
            )
        nets: dict[str, DeviceNet] = {}
        with self._lock, ExitStack() as until_failure:
            for name in package.manifest.nets:
                opened = self._open_one(partial(self._open_net, package, name))
                until_failure.callback(opened.close)
                nets[name] = opened
            until_failure.pop_all()
        return DeviceLoop(self.device, nets, package.manifest, graphs="off", log=self._log, beside=self)

    def adapted(self, package: Package) -> DeviceLoop:
        """See `job.PackageLoop`. Raises BackendError where nothing opens nets with other weights."""
        if self._open_net is None:
            raise BackendError(
                "the engines' weights are fixed, and adapters change them",
                expected="a backend that opens nets with other weights",
                fix="Use another one: --backend onnxruntime-cuda, or --backend onnxruntime",
            )
        graphs = {name: self.unet if name == "unet" else name for name in self.nets}
        own = {
            name: OwnNet(open=partial(self._open_net, package, graph), size=engine_bytes(package, graph))
            for name, graph in graphs.items()
            if changed_names(package, graph)
        }
        return DeviceLoop(
            self.device,
            self.nets,
            self._manifest,
            graphs=self._graphs,
            verdicts=self._verdicts,
            log=self._log,
            base=self,
            own=own,
        )

    @property
    def own_bytes(self) -> int:
        """See `job.PackageLoop`. Of a net whose engines are opened when they are chosen, one is counted."""
        return sum(self.nets[name].memory.weights or own.size for name, own in self._own.items())

    def open_own(self) -> None:
        """See `job.PackageLoop`. What no request uses makes room for them."""
        with self._lock, ExitStack() as until_failure:
            until_failure.callback(self.close)
            self._turns.loops.append(self)
            for name, own in self._own.items():
                self.nets[name] = self._open_one(own.open)
                self._opened.add(name)
            until_failure.pop_all()

    def _open_one(self, open_net: Callable[[], DeviceNet]) -> DeviceNet:
        try:
            return open_net()
        except MemoryLimitError as error:
            if not self.free_idle():
                raise
            self._log(f"out of memory ({error.found}): free idle contexts")
        return open_net()

    def make_way(self, other: PackageLoop) -> None:
        """See `job.PackageLoop`: nothing, as nets on a device are bound; what does not fit is an error."""

    # ── job.Loop ───────────────────────────────────────────────────────────────────────────────

    def call(self, net: str, **arrays: Array) -> dict[str, Array]:
        """Run a net once at the shapes of the arrays, and wait for it.

        Raises:
            PackageError: the package has no such net.
            UsageError: arrays that are not its inputs, or of shapes that its engines do not have.
            MemoryLimitError: it does not fit.
            BackendError: it failed on the device.
        """
        self._manifest.net(net)
        net = "unet" if net == self.unet else net
        if self._base is not None and net not in self._own:
            return self._base.call(net, **arrays)  # with its programs, and also once this loop is closed
        self.nets[net].spec.check(arrays)
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        need = MemoryNeed(call=f"{net} of {shapes}")
        with self._lock:
            return self._fit(need, lambda plan: self._call(net, arrays))

    def steps(self, job: DenoiseJob, clock: Clock, stop: Stop | None) -> Iterator[State]:
        """Yield the state after every row of the table. Raises as `draw`, and CancelledError.

        A job in windows, or with several ControlNets, runs on the host, and its nets here: each call is
        uploaded and waited for.
        """
        if self._by_calls(job):
            yield from answered(self.unet_calls(job, clock, stop))
            return
        need, total = _need(job, self._scale), len(job.table)
        stop = stop or NEVER
        stop.check(f"before step 1 of {total}")
        with self._lock:
            given = self._steering(job, clock)
            picture, read = self._fit(need, lambda plan: self._first_row(job, given, plan, clock))
        try:
            unet_input = job.first
            for index, row in enumerate(job.table.rows()):
                if index:
                    stop.check(f"before step {index + 1} of {total}")
                    with self._lock, clock.stage("unet"):
                        read = self._row(picture, index)
                latent, remembered = read
                check_finite(latent, f"after step {index + 1} of {total}", self._manifest.dtype)
                state = State(
                    index=index,
                    unet_input=unet_input,
                    # the guided output m, solved from what the row remembers of it: h = p*y + q*m
                    prediction=(remembered - row.p * unet_input) / row.q,
                    latent=latent,
                    profile=picture.denoiser.profile,
                )
                yield state
                if state.latent is not latent:
                    with self._lock:
                        self._check_open()
                        picture.denoiser.set_latent(state.latent)
                unet_input = state.latent
        finally:
            with self._lock:
                picture.close()

    def unet_calls(self, job: DenoiseJob, clock: Clock, stop: Stop | None) -> Iterator[UNetCall | State]:
        """See `job.Loop`; between the calls the host works. Raises as `draw`, and CancelledError."""
        yield from steps_of_calls(job, self._manifest, self.call, clock, stop, self.unet, self._run_unet)

    def _run_unet(self, **arrays: Array) -> dict[str, Array]:
        return self.call(self.unet, **arrays)

    def draw(self, job: DenoiseJob, clock: Clock, *, decode: bool) -> Drawn:
        """Denoise and decode, with one synchronisation (more if the decoder is tiled, or `_by_calls`).

        Raises:
            NumericError: the latent is not finite.
            UsageError: shapes or vectors that the nets do not take.
            MemoryLimitError: the request does not fit.
            BackendError: a net failed on the device.
        """
        if self._by_calls(job):
            return self._draw_by_calls(job, clock, decode=decode)
        need = _need(job, self._scale)
        with self._lock:
            given = self._steering(job, clock)
            drawn = self._fit(need, lambda plan: self._draw(job, given, plan, clock, decode=decode))
            check_finite(drawn.latent, "after the last step", self._manifest.dtype)
            if decode and drawn.image is None:
                with clock.stage("vae_decoder"):
                    image, mean = self._decode(drawn.latent, job.tile, self.plan(job))
                drawn = replace(drawn, image=image, mean=mean)
            self._settle()
            return drawn

    def _by_calls(self, job: DenoiseJob) -> bool:
        """Whether a job's rows are calls from the host.

        Those in windows; and those with what a device does not add up, several ControlNets, or average, or
        with a net that runs elsewhere.
        """
        controls, unet = job.steering.controlnets, self.nets["unet"].spec
        types = {item.name: item.dtype for item in (*unet.inputs, *unet.outputs)}
        return (
            job.windows is not None
            or len(controls) > 1
            or (bool(job.steering) and not added_inputs(unet))
            or not all(self._is_resident(control, types) for control in controls)
        )

    def _is_resident(self, control: ControlJob, types: Mapping[str, str]) -> bool:
        """Whether a ControlNet can read the UNet's latent, and write its inputs."""
        loop, spec = control.loop, control.manifest.nets[NET].spec
        shared = [*(item for item in spec.inputs if item.name == "latent"), *spec.outputs]
        return (
            isinstance(loop, DeviceLoop)
            and loop.device is self.device
            and not averages(control.manifest)
            and all(types.get(item.name) == item.dtype for item in shared)
        )

    def _draw_by_calls(self, job: DenoiseJob, clock: Clock, *, decode: bool) -> Drawn:
        *_, last = self.steps(job, clock, None)
        image: Array | None = None
        mean: Array | None = None
        if decode:
            with clock.stage("vae_decoder"):
                image, mean = self.decode(last.latent, tile=job.tile)
        return Drawn(latent=last.latent, image=image, mean=mean)

    def decode(self, latent: Array, *, tile: int | None = None, stop: Stop = NEVER) -> tuple[Array, Array]:
        """Pictures of latents; see `job.Loop`. Raises UsageError, MemoryLimitError, BackendError."""
        if self._base is not None and "vae_decoder" not in self._own:
            return self._base.decode(latent, tile=tile, stop=stop)
        with self._lock:
            decoded = self._decode(latent, tile, stop=stop)
            self._settle()
            return decoded

    def close(self) -> None:
        """Free everything that this loop does not share, whatever fails on the way. May be called twice.

        The loop that others are adapted from has the device and the nets that they share: they are closed
        with it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            first = None if self._base or self._beside else self
            with ExitStack() as everything:
                if self in self._turns.loops:
                    everything.callback(self._turns.loops.remove, self)
                if self is first:
                    everything.callback(self.device.close)
                for name, net in self.nets.items():
                    if self._base is None or name in self._opened:
                        everything.callback(net.close)
                everything.callback(self.pool.close)
                everything.callback(self.pool.free_idle)
                if self is first:
                    for loop in self._turns.loops[1:]:
                        everything.callback(loop.close)

    # ── memory ─────────────────────────────────────────────────────────────────────────────────

    def free_idle(self) -> bool:
        """Free what no request uses now, of all loops on the device; return whether there was anything."""
        freed = [loop.pool.free_idle() for loop in self._turns.loops]
        if not self._in_use:  # a graph that is still alive may hold what a library would release
            for net in self._all_nets:
                net.release()
        return any(freed)

    @property
    def _all_nets(self) -> list[DeviceNet]:
        """Those of all loops on the device, each once."""
        return list(dict.fromkeys(net for loop in self._turns.loops for net in loop.nets.values()))

    @property
    def _in_use(self) -> bool:
        """Whether a request has programs on the device, of whichever loop: they share nets."""
        return any(loop.pool.in_use for loop in self._turns.loops)

    def _forget(self, program: BoundProgram) -> None:
        """Free the graph that holds the addresses of a program about to be freed."""
        if program in self._rows.replays:
            self._rows.replays.pop(program).close()

    def _settle(self) -> None:
        """The stream is idle and the picture on the host: a moment for what must not be timed."""
        for net in self.nets.values():
            net.settle()

    def stream_weights(self) -> int:
        """Bytes freed by streaming the weights of every net that can; it closes all of a net's bindings."""
        self.free_idle()
        return 0 if self._in_use else sum(net.stream_weights() for net in self._all_nets)

    def describe_memory(self) -> str:
        """The numbers, for a refusal."""
        now = self.device.memory()
        weights = sum(net.memory.weights for net in self._all_nets)
        return (
            f"{now.free / 2**20:.0f} MiB of {now.total / 2**20:.0f} free on {self.device.name}, weights"
            f" {weights / 2**20:.0f} MiB, activations {self.pool.scratch_size / 2**20:.0f} MiB"
        )

    @property
    def ledger(self) -> Mapping[str, MemoryLedger]:
        """What each net holds now; those of a control are called `CONTROL: NET`."""
        of_controls = {
            f"{loop._manifest.name}: {name}": net.memory
            for loop in self._turns.loops
            if loop._beside is not None
            for name, net in loop.nets.items()
        }
        return {name: net.memory for name, net in self.nets.items()} | of_controls

    def plan(self, job: DenoiseJob) -> MemoryPlan:
        """The plan that such a job starts with: one that fitted earlier, or all at once."""
        need = _need(job, self._scale)
        remembered = self._plans.get(need)
        return remembered.plan if remembered else need.start

    def _fit(
        self, need: MemoryNeed, attempt: Callable[[MemoryPlan], Result], start: MemoryPlan | None = None
    ) -> Result:
        """Try what fitted last time first; now and then start anew, as memory may have come back."""
        start = start or need.start
        remembered = self._plans.pop(need, None)
        if remembered is None or not remembered.requests_left:
            remembered = _RememberedPlan(plan=start, requests_left=_REMEMBERED)
        result, plan = fit_in_memory(attempt, remembered.plan, need, self, self._log)
        if plan != start:
            left = remembered.requests_left - 1 if plan == remembered.plan else _REMEMBERED
            self._plans[need] = _RememberedPlan(plan=plan, requests_left=left)
        return result

    # ── one attempt ────────────────────────────────────────────────────────────────────────────

    def _prepare(
        self, job: DenoiseJob, given: SteeringInputs | None, plan: MemoryPlan, *, decoder: bool
    ) -> _Picture:
        """Check out the programs of a job, and enqueue its invariants, table, noise and first latent.

        With `decoder` the decoder is taken as well, before any work is done that its failure would waste.
        """
        device, nets, shape = self.device, self.nets, self._shape(job, plan)
        schedule_shape, latents = ScheduleShape.of(job, shape), {"latent": job.first.shape}
        sized = [
            *((net, shape.sizes(rows)) for rows in set(shape.calls()) for net in ("unet", "unet_context")),
            (shape.step, shape.sizes(shape.batch)),
            ("unet_time", schedule_shape.sizes),
        ]
        calls: list[tuple[str, Shapes]] = [(net, input_shapes(nets[net].spec, sizes)) for net, sizes in sized]
        self.pool.reserve([*calls, ("vae_decoder", latents)] if decoder else calls)
        with ExitStack() as until_failure:
            make_schedule = partial(ScheduleProgram, device, nets, schedule_shape)
            schedule = self.pool.check_out(until_failure, schedule_shape, "unet_time", make_schedule)
            make_denoiser = partial(DenoiseProgram, device, nets, shape)
            denoiser = self.pool.check_out(until_failure, shape, "unet", make_denoiser)
            last = self._check_out_net(until_failure, "vae_decoder", latents) if decoder else None
            program = self._check_out_control(until_failure, job, shape)
            denoiser.begin(job)
            schedule.enqueue(job)
            controls = None if given is None else DeviceControls(denoiser, given, program)
            return _Picture(job, denoiser, schedule, last, controls, until_failure.pop_all())

    def _check_out_control(
        self, until: ExitStack, job: DenoiseJob, shape: DenoiseShape
    ) -> ControlProgram | None:
        """The program of a job's ControlNet, from the pool of the loop that has it."""
        if not job.steering.controlnets:
            return None
        (control,) = job.steering.controlnets
        loop, sized = control.loop, ControlShape.of(job, shape)
        assert isinstance(loop, DeviceLoop), "others are called"
        loop.pool.reserve([(NET, input_shapes(loop.nets[NET].spec, sized.sizes))])
        make = partial(ControlProgram, self.device, loop.nets, sized)
        return loop.pool.check_out(until, sized, NET, make)

    def _steering(self, job: DenoiseJob, clock: Clock) -> SteeringInputs | None:
        """What steers a job; its nets that do not depend on the latent run here."""
        if not job.steering:
            return None
        for control in job.steering.controlnets:
            if isinstance(control.loop, DeviceLoop) and control.loop._closed:
                refuse_unloaded()
        with clock.stage("controls"):
            return SteeringInputs(
                steady=SteadyInputs(job, self.nets["unet"].spec),
                nets=tuple(ControlNetInputs(control, job) for control in job.steering.controlnets),
            )

    def _check_out_net(self, until: ExitStack, net: str, shapes: Shapes) -> NetProgram:
        make = partial(NetProgram, self.device, self.nets[net], shapes)
        return self.pool.check_out(until, tuple(shapes.items()), net, make)

    def _call(self, net: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """One attempt at running a net; arrays are converted to its dtypes."""
        shapes = {item.name: arrays[item.name].shape for item in self.nets[net].spec.inputs}
        self.pool.reserve([(net, shapes)])
        with ExitStack() as until_done:
            program = self._check_out_net(until_done, net, shapes)
            program.upload(arrays)
            outputs = program.enqueue()
            self.device.synchronize()
        return outputs

    def _begin_rows(self, picture: _Picture) -> None:
        """Decide whether the rows of one picture are replayed."""
        denoiser = picture.denoiser
        if denoiser not in self._rows.replays:
            # An engine with other weights may have other kernels: a verdict on the base says nothing of it.
            adapted = ", adapted" if "unet" in self._own else ""
            self._rows.replays[denoiser] = Replay(
                self._graphs,
                dtype=self._manifest.dtype,
                shape=f"{denoiser.shape}, {denoiser.profile}{adapted}",
                verdicts=self._verdicts,
                log=self._log_once,
            )
        self._drop_graphs_of_others(denoiser)
        self._rows.replays[denoiser].begin(self.device, picture)

    def _log_once(self, line: str) -> None:
        """What is said of one shape goes for others too, mostly."""
        if line not in self._logged:
            self._logged.add(line)
            self._log(line)

    def _first_row(
        self, job: DenoiseJob, given: SteeringInputs | None, plan: MemoryPlan, clock: Clock
    ) -> tuple[_Picture, Array]:
        """One attempt at the first row: in it libraries allocate."""
        with clock.stage("prepare"):
            picture = self._prepare(job, given, plan, decoder=False)
        try:
            with clock.stage("unet"):
                self._begin_rows(picture)
                return picture, self._row(picture, 0)
        except BaseException:
            picture.close()
            raise

    def _row(self, picture: _Picture, row: int) -> Array:
        """Run a row, and wait for the state that it leaves."""
        self._check_open()
        self._enqueue_row(picture, row)
        state = picture.read_state()
        self.device.synchronize()
        return state

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(
                "the pipeline was closed while a picture was drawn",
                expected="an open pipeline until its last step",
                fix="Take all steps inside its `with` block.",
            )

    def _enqueue_row(self, picture: _Picture, row: int) -> None:
        picture.feed_row(row)
        self._drop_graphs_of_others(picture.denoiser)  # others may have had their turn since the last row
        self._rows.replays[picture.denoiser].enqueue(picture)

    def _drop_graphs_of_others(self, denoiser: DenoiseProgram) -> None:
        """Before rows of one shape run: graphs of others that would not outlive them."""
        if self._rows.ran_last is not denoiser and not self.nets["unet"].graphs_outlive_other_shapes:
            for program, replay in self._rows.replays.items():
                if program is not denoiser:
                    replay.drop()
        self._rows.ran_last = denoiser

    def _draw(
        self, job: DenoiseJob, given: SteeringInputs | None, plan: MemoryPlan, clock: Clock, *, decode: bool
    ) -> Drawn:
        """One attempt at a job: the latent, and the picture too where the plan decodes all at once."""
        whole = decode and plan.decoder_pictures is None and plan.tile is None
        with clock.stage("prepare"):
            picture = self._prepare(job, given, plan, decoder=whole)
        try:
            with clock.stage("enqueue"):
                self._begin_rows(picture)
                for row in range(picture.rows):
                    self._enqueue_row(picture, row)
                decoded: Mapping[str, Array] = {}
                if picture.decoder is not None:
                    picture.decoder.take_latent(picture.denoiser)
                    decoded = picture.decoder.enqueue()
                latent = picture.read_state()[0]
            with clock.stage("wait"):
                self.device.synchronize()
        finally:
            picture.close()
        image, mean = decoded.get("image"), decoded.get("mean")
        return Drawn(latent=latent, image=image, mean=mean, profile=picture.denoiser.profile)

    def _decode(
        self, latent: Array, tile: int | None, start: MemoryPlan | None = None, stop: Stop = NEVER
    ) -> tuple[Array, Array]:
        """Decode with what memory allows, beginning with `start`, or as the request asks for it."""
        pictures, _, height, width = latent.shape
        need = MemoryNeed(
            pictures=pictures, height=height * self._scale, width=width * self._scale, tile=tile
        )
        return self._fit(need, lambda plan: self._decode_by(plan, latent, stop), start)

    def _decode_by(self, plan: MemoryPlan, latent: Array, stop: Stop) -> tuple[Array, Array]:
        """One attempt at decoding: all pictures at once, one by one, or in tiles, as the plan says."""

        def whole(part: Array) -> tuple[Array, Array]:
            stop.check("before the decoder")
            decoded = self._call("vae_decoder", {"latent": part})
            return decoded["image"], decoded["mean"]

        def picture(part: Array) -> tuple[Array, Array]:
            if plan.tile is None:
                return whole(part)
            return decode_tiled(whole, part, plan.tile, self._scale)

        count = plan.decoder_pictures or len(latent)
        parts = [picture(latent[i : i + count]) for i in range(0, len(latent), count)]
        return np.concatenate([image for image, _ in parts]), np.concatenate([mean for _, mean in parts])

    def _shape(self, job: DenoiseJob, plan: MemoryPlan) -> DenoiseShape:
        batch, (height, width) = len(job.text_of_row), job.shape[1:]
        step = "step" if job.kept is None else "step_masked"
        self._manifest.net(step)  # older packages have no masked one
        prompt = job.steering.image_prompt
        tokens = {} if prompt is None else {"groups": prompt.groups, "image_tokens": prompt.tokens}
        return DenoiseShape(
            pictures=job.pictures,
            guided=job.guided,
            height=height,
            width=width,
            tokens=job.context.shape[1],
            rows=equal_rows(batch, plan.rows or batch),
            step=step,
            **tokens,
        )


def _need(job: DenoiseJob, scale: int) -> MemoryNeed:
    _, height, width = job.shape
    return MemoryNeed(
        batch=len(job.text_of_row),
        guided=job.guided,
        pictures=job.pictures,
        height=height * scale,
        width=width * scale,
        tile=job.tile,
        controlnets=len(job.steering.controlnets),
    )
