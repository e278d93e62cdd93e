"""package -> engines in the store: one key per net, and a child process for each that is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from .. import errors
from ..cuda.facts import DeviceFacts, Nvml
from ..errors import BackendError, LatentrtError, MemoryLimitError, StorageError, UsageError
from ..net_weights import engine_bytes
from ..package import Package
from ..profiles import NetProfile, Profile, net_profiles
from ..spec import NETS
from ..store.engine_store import BuiltEngine, EngineStore, Entry, Miss, OnProgress, Report, build_missing
from ..store.key import ANYWHERE, EngineKey, Target, package_key
from .builder import BuildOptions, Facts, Job
from .flavour import Flavour, flavour, installed_version
from .preflight import Room, check_capability, check_room, read_room

_COMMAND = (sys.executable, "-m", f"{__package__}.builder")
_TAIL = 1000  # characters of stderr in a message
_ERRORS: Mapping[str, type[LatentrtError]] = {
    name: getattr(errors, name)
    for name in ("PackageError", "BackendError", "MemoryLimitError", "StorageError", "UsageError")
}

Started = Callable[[int], None]  # process id


def run_builder(job: Job, report: Report, *, started: Started | None = None) -> Facts:
    """Build in a child process, which is gone when this returns or raises, whatever happens.

    Args:
        job: what to build.
        report: called with the phase, and how much of the whole is done (0 to 1, never falling).
        started: called with the child's process id.

    Raises:
        LatentrtError: what the child raised; MemoryLimitError if it was killed, BackendError if it crashed.
    """
    # PYTHONSAFEPATH: `-m` would otherwise put the current folder first, and take modules from there.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(  # noqa: S603
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, env=environment
        )
        try:
            if started is not None:
                started(child.pid)
            last = _follow(child, job, report)
            code = child.wait()
        finally:  # also for KeyboardInterrupt and whatever `report` raises
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                _close(pipe)
        if code == 0 and "facts" in last:
            return cast(Facts, last["facts"])
        raise _failure(job, code, last, _tail(noise))


def _follow(child: subprocess.Popen[bytes], job: Job, report: Report) -> dict[str, Any]:
    """Hand over the job and read lines until the child closes its stdout; the last that is no progress."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
        child.stdin.flush()  # and not closed: the child ends when it closes
    except BrokenPipeError:
        pass  # it has ended already, and its exit code says more
    last: dict[str, Any] = {}
    for line in child.stdout:
        try:
            message = cast(dict[str, Any], json.loads(line))
        except ValueError:  # cut short by a signal
            continue
        if "fraction" in message:
            report(str(message["phase"]), float(message["fraction"]))
        else:
            last = message
    return last


def _failure(job: Job, code: int, last: Mapping[str, Any], noise: str) -> LatentrtError:
    if "error" in last:
        record = cast(dict[str, str], last["error"])
        kind = _ERRORS.get(record["type"], BackendError)
        parts = {"expected": record["expected"], "fix": record["fix"]}
        if kind is MemoryLimitError:
            return MemoryLimitError(record["found"], **parts, culprit=job.net)
        return kind(record["found"], **parts)
    words = f": {noise}" if noise else ""
    if code in (-getattr(signal, "SIGKILL", 9), 137):
        return MemoryLimitError(
            f"the builder of the net {job.net!r} was killed, most likely for want of memory{words}",
            expected="a builder that may finish",
            fix="Close other programs, build for a smaller profile, or limit its MiB: --workspace 2048",
            culprit=job.net,
        )
    return BackendError(
        f"the builder of the net {job.net!r} crashed with exit code {code}{words}",
        expected="an engine, or an error that says why not",
        fix="Try --optimization-level 2 or a smaller --profile, and report it with the package's manifest.",
    )


def _tail(noise: IO[bytes]) -> str:
    size = noise.seek(0, os.SEEK_END)
    noise.seek(max(0, size - _TAIL))
    return " ".join(noise.read().decode("utf-8", errors="replace").split())


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except BrokenPipeError:
        pass  # what was buffered for a child that is gone


# Fields of a key that say how an engine was built, not for what model or device.
_HOW = {"profiles", "flags", "optimization_level", "workspace_limit"}
_AMPERE = (8, 0)  # the oldest compute capability of engines for `ampere_plus`


@dataclass(frozen=True, kw_only=True)
class WantedEngine:
    """An engine that is wanted: its profiles in the engine's order, and what the store has of it."""

    net: str
    profiles: tuple[NetProfile, ...]
    found: Entry | Miss

    @property
    def why(self) -> str:
        """Why it must be built; "" if it is in the store."""
        return self.found.reason if isinstance(self.found, Miss) else ""


def target(row: Flavour, gpu: DeviceFacts | None, hardware_compatibility: str = "") -> Target:
    """The device in an engine's key. Without a GPU only a portable engine can be built, or looked for.

    `hardware_compatibility` is as in BuildOptions: an engine for more than this GPU does not name it.
    """
    if row.portable or gpu is None:
        return ANYWHERE
    if not hardware_compatibility:
        return Target(compute_capability=gpu.sm, gpu=gpu.kind, driver=gpu.driver_line)
    same = hardware_compatibility == "same_compute_capability"
    return Target(
        compute_capability=gpu.sm if same else hardware_compatibility, gpu="any", driver=gpu.driver_line
    )


def _levels(row: Flavour, gpu: DeviceFacts | None) -> tuple[str, ...]:
    """The values of `hardware_compatibility` that engines for this GPU may have, the closest fit first."""
    if row.portable or gpu is None:
        return ("",)
    ampere = ("ampere_plus",) if gpu.compute_capability >= _AMPERE else ()
    return ("", "same_compute_capability", *ampere)


def engine_key(
    package: Package,
    net: str,
    row: Flavour,
    version: str,
    profiles: Sequence[NetProfile],
    options: BuildOptions,
    *,
    gpu: DeviceFacts | None = None,
) -> EngineKey:
    """The key under which the store has this engine; builder and runtime both ask here.

    `version` is the library's exact one, `profiles` are the net's own in the engine's order, and `gpu` is
    needed where engines are not portable.
    """
    return package_key(
        package,
        net,
        backend=row.backend,
        version=version,
        target=target(row, gpu, options.hardware_compatibility),
        profiles=(profile.text for profile in profiles),
        flags=options.flags,
        optimization_level=options.optimization_level,
        workspace_limit=options.workspace_limit,
        hardware_compatibility=options.hardware_compatibility,
    )


def find_engines(
    package: Package,
    net: str,
    row: Flavour,
    version: str,
    store: EngineStore,
    *,
    gpu: DeviceFacts | None = None,
) -> tuple[tuple[Entry, tuple[NetProfile, ...]], ...]:
    """Every engine of this net that runs here, however it was built.

    Those of this GPU alone come before those of its compute capability, and these before those of Ampere and
    later; of each kind, the most recently used comes first. Which profiles a user has built, and with which
    options, only the store knows. So the runtime gets all of them, each with its profiles in the engine's
    order, and chooses.
    """
    spec = package.manifest.nets[net].spec
    entries = store.entries()
    found: list[tuple[Entry, tuple[NetProfile, ...]]] = []
    for level in _levels(row, gpu):
        options = BuildOptions(hardware_compatibility=level)
        like = engine_key(package, net, row, version, (), options, gpu=gpu)
        for entry in entries:
            if set(like.differences(entry.key)) <= _HOW:
                sources = [Profile.parse(str(text), multiple=1) for text in entry.facts.get("profiles", ())]
                profiles = net_profiles(net, spec, sources)
                if tuple(profile.text for profile in profiles) == entry.key.profiles:
                    found.append((entry, profiles))
    return tuple(found)


def built_nets(package: Package, names: Iterable[str] = ()) -> tuple[str, ...]:
    """The nets that get engines, in the order of the data flow: those of `names`, or all usual ones.

    Raises:
        UsageError: a name that is none of them.
    """
    rows = {net: row for net, row in NETS.items() if net in package.manifest.nets and not row.for_others}
    wanted = tuple(names) or tuple(net for net, row in rows.items() if row.usual)
    if unknown := [name for name in wanted if name not in rows]:
        raise UsageError(
            f"the package has no net {unknown[0]!r} to build",
            expected=", ".join(rows),
            fix="Leave --nets out to build all that every picture may need.",
        )
    return tuple(net for net in rows if net in wanted)


def plan_build(
    package: Package,
    backend: str,
    profiles: Sequence[Profile],
    options: BuildOptions,
    store: EngineStore,
    *,
    nets: Iterable[str] = (),
    gpu: DeviceFacts | None = None,
) -> tuple[WantedEngine, ...]:
    """What `build_package` would do; nothing is built, and no library is loaded.

    Raises:
        BackendError: the library is missing, or cannot build this here, or the GPU is too old for it.
        UsageError: an unknown net.
        PackageError: the package's contract or weights file cannot be read.
    """
    row = flavour(backend)
    options.check(row, has_gpu=gpu is not None)
    check_capability(package.manifest, gpu)
    version = installed_version(backend) or ""
    planned: list[WantedEngine] = []
    for net in built_nets(package, nets):
        expanded = net_profiles(net, package.manifest.nets[net].spec, profiles)
        key = engine_key(package, net, row, version, expanded, options, gpu=gpu)
        planned.append(WantedEngine(net=net, profiles=expanded, found=store.find(key)))
    return tuple(planned)


def build_package(
    package: Package,
    backend: str,
    profiles: Sequence[Profile],
    options: BuildOptions,
    store: EngineStore,
    progress: OnProgress | None = None,
    *,
    nets: Iterable[str] = (),
    gpu: DeviceFacts | None = None,
    room: Callable[[Path], Room] | None = None,
    started: Started | None = None,
) -> tuple[BuiltEngine, ...]:
    """Make sure that the store has an engine of every net; each is built in a process of its own.

    `room` reads what is free for a build in a folder, before each build; `started` gets the process id of
    each builder.

    Raises:
        LatentrtError: as `plan_build`, `check_room` and `run_builder` raise. Engines that were complete stay.
    """
    planned = plan_build(package, backend, profiles, options, store, nets=nets, gpu=gpu)
    row = flavour(backend)
    run = _Run(
        package=package,
        row=row,
        options=options,
        store=store,
        profiles={item.net: item.profiles for item in planned},
        room=room or _room_for(row, gpu),
        started=started,
        gpu=gpu,
    )
    return build_missing(store, [item.found for item in planned], run.build, progress)


def _room_for(row: Flavour, gpu: DeviceFacts | None) -> Callable[[Path], Room]:
    """Reads what is free; device memory only where the builder uses it, and where it is not the host's."""

    def vram() -> int | None:
        memory = Nvml(gpu.uuid).memory() if gpu else None
        return memory[0] if memory else None

    reader = vram if gpu and not gpu.unified and not row.builds_without_gpu else None
    return lambda folder: read_room(folder, vram=reader)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One call of `build_package`; `profiles` are those of each net."""

    package: Package
    row: Flavour
    options: BuildOptions
    store: EngineStore
    profiles: Mapping[str, tuple[NetProfile, ...]]
    room: Callable[[Path], Room]
    started: Started | None
    gpu: DeviceFacts | None

    def build(self, net: str, path: Path, report: Report) -> Facts:
        """Run the builder for one net, with the timing cache where the library has one."""
        check_room(net, engine_bytes(self.package, net), self.room(self.store.root))
        file, profiles = self.package.manifest.nets[net], self.profiles[net]
        # The key says what the manifest says; whoever changed a file in place gets no engine of it.
        self.package.verify((file.graph, *file.weights))
        cache = path.with_name("timing.cache") if self.row.cache == "timing" else None
        side = self.store.side_file("timing", self._cache_name())
        if cache:
            cache.write_bytes(self.store.read_side_file(side))
        job = Job(
            backend=self.row.backend,
            net=net,
            graph=self.package.path(file.graph),
            weights=self.package.weights_folder(net),
            spec=file.spec,
            profiles=tuple(profile.shapes for profile in profiles),
            options=self.options,
            engine=path,
            timing_cache=cache,
        )
        facts = run_builder(job, report, started=self.started)
        if cache and (warning := self._keep(side, cache)):
            facts = {**facts, "warnings": [*facts.get("warnings", ()), warning]}
        sources = dict.fromkeys(str(profile.source) for profile in profiles)
        return {**facts, "labels": [profile.label for profile in profiles], "profiles": list(sources)}

    def _cache_name(self) -> str:
        """The name of the timing cache. Another GPU's timings would make engines slower, so it names the GPU
        also where engines do not.
        """
        device = target(self.row, self.gpu)
        version = installed_version(self.row.backend)
        name = f"{self.row.backend}-{version}-{device.compute_capability}-{device.gpu}"
        return "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name)

    def _keep(self, side: Path, cache: Path) -> str:
        """Keep the timings for the next build. Returns a warning if that fails: the engine is built."""
        try:
            data = cache.read_bytes() if cache.is_file() else b""
            cache.unlink(missing_ok=True)  # the folder becomes the engine's own
            if data:
                self.store.write_side_file(side, data)
        except (OSError, StorageError) as error:
            return f"the timing cache was not kept: {error}"
        return ""
