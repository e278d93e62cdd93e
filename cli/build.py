"""`latentrt build`: a package's nets become engines in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from .models import MODEL, LoraLenient, say, with_checkpoint_options
from .progress import Advance, progress_bar
from .shown import show

if TYPE_CHECKING:
    from ..engines.backends import BackendRow
    from ..engines.package import Package
    from ..engines.profiles import Profile
    from ..engines.store.engine_store import BuildProgress, BuiltEngine, EngineStore, OnProgress
    from ..engines.tensorrt.build import WantedEngine
    from ..engines.tensorrt.builder import Weights

_TICKS = 100  # of the bar, per net
_WEIGHTS, _LEVEL = "embedded", 3
AUTO = "auto"


@with_checkpoint_options
def build(
    model: Annotated[str, Argument(help=MODEL)] = "demo",
    backend: Annotated[
        str | None,
        Option(
            help="tensorrt-rtx, tensorrt, onnxruntime-cuda, onnxruntime, or auto: the fastest on the CPU."
            " Default: the TensorRT installed."
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        Option(
            help="Pictures to build for, WIDTHxHEIGHT[:bN][:tT], each LOW[-HIGH][@OPT]; may be repeated."
            " Default: the model's size, :b1-4."
        ),
    ] = None,
    weights: Annotated[
        str, Option(help="embedded, stripped, streamed, or refittable: adapters may change them.")
    ] = _WEIGHTS,
    optimization_level: Annotated[int, Option(help="0 (quick build) to 5 (long search).")] = _LEVEL,
    workspace: Annotated[int, Option(help="MiB of scratch memory a tactic may use. 0: no limit.")] = 0,
    hardware_compatibility: Annotated[
        str, Option(help="ampere_plus, same_compute_capability. Default: this GPU alone.")
    ] = "",
    nets: Annotated[str, Option(help="Only these, with commas between. Default: all.")] = "",
    control: Annotated[
        list[str] | None,
        Option(help="Also a ControlNet, T2I- or IP-Adapter, and the UNet's graph for it; may be repeated."),
    ] = None,
    lora_lenient: LoraLenient = False,
    store: Annotated[
        Path | None, Option(help="The engine store. Default: LATENTRT_CACHE, or this user's cache folder.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what would be built, and why.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    checkpoint: Any = None,
) -> None:
    """Build engines for TensorRT. With the extra [tensorrt-rtx] it needs no GPU, except for stripped and
    refittable weights.

    For onnxruntime-cuda and onnxruntime (the CPU), measure here which layout of each net is the fastest; of
    the options, --nets, --store and --json count there. With auto, measure onnxruntime and openvino against
    each other; --backend auto draws with the faster one from then on.
    """
    from ..engines.cuda.facts import available, facts
    from ..engines.profiles import Profile, default_profile
    from ..engines.store.engine_store import EngineStore
    from ..engines.tensorrt.build import build_package, plan_build
    from ..engines.tensorrt.builder import BuildOptions
    from ..engines.tensorrt.flavour import ENGINE_BACKENDS, installed_backends
    from ..runtime.model import CONTROLS, open_model

    # Without a backend that is installed the first one, whose error says how to install it.
    chosen = backend or (*installed_backends(), *ENGINE_BACKENDS)[0]
    used = {
        "--profile": bool(profile),
        "--dry-run": dry_run,
        "--weights": weights != _WEIGHTS,
        "--optimization-level": optimization_level != _LEVEL,
        "--workspace": workspace != 0,
        "--hardware-compatibility": hardware_compatibility != "",
    }
    if chosen == AUTO:
        used |= {"--nets": bool(nets), "--control": bool(control)}
    _check_backend(chosen, used)  # before minutes are spent on a checkpoint
    with progress_bar(enabled=not as_json) as advance:
        read: Any = {"options": checkpoint, "allow_unused": lora_lenient}
        reader = "onnxruntime" if chosen == AUTO else chosen
        opened = open_model(model, backend=lambda: reader, advance=advance, note=say, **read)
        names = [name.strip() for name in nets.split(",") if name.strip()]
        wanted = [(opened, names), *_controls(opened, chosen, control or (), advance, CONTROLS.get(model))]
    if _is_measured(chosen):
        _measure(chosen, wanted, EngineStore(store), as_json=as_json)
        return
    asked = [Profile.parse(text, multiple=opened.manifest.size_multiple) for text in profile or ()]
    profiles = asked or [default_profile(opened.manifest)]
    options = BuildOptions(
        weights=_policy(weights),
        optimization_level=optimization_level,
        workspace_limit=workspace * 2**20,
        hardware_compatibility=hardware_compatibility,
    )
    gpu = None if available() else facts()
    how = (chosen, profiles, options, EngineStore(store))
    if dry_run:
        planned = [item for one, some in wanted for item in plan_build(one, *how, nets=some, gpu=gpu)]
        _print_plan(planned, chosen, profiles, as_json=as_json)
        return
    with progress_bar(enabled=not as_json) as advance:
        shown = _shown(advance)
        built = [item for one, some in wanted for item in build_package(one, *how, shown, nets=some, gpu=gpu)]
    _print_built(built, chosen, profiles, as_json=as_json)


def _controls(
    model: Package, backend: str, controls: Sequence[str], advance: Advance, shipped: Path | None
) -> list[tuple[Package, list[str]]]:
    """What is built for controls, and of which nets: the UNet's graph that takes them, and all of theirs."""
    from ..engines.spec import NETS
    from ..runtime.model import open_control_model
    from ..runtime.steering.loaded import unet_for

    opened = [
        open_control_model(name, backend=backend, model=model, shipped=shipped, advance=advance, note=say)
        for name in controls
    ]
    if not opened:
        return []
    graph = unet_for(str(package.manifest.control["kind"]) for package in opened)
    theirs = [(package, [net for net in NETS if net in package.manifest.nets]) for package in opened]
    return [(model, [graph]), *theirs]


def _shown(advance: Advance) -> OnProgress:
    """Shows the progress of a build in a bar."""

    def on_progress(now: BuildProgress) -> None:
        done = int((now.index + now.fraction) * _TICKS)
        advance(f"{now.net}: {now.phase.lower()}", done, now.total * _TICKS)

    return on_progress


def _check_backend(name: str, options: Mapping[str, bool]) -> None:
    """Raise BackendError for a backend that cannot run here, UsageError for one that builds nothing.

    UsageError too for an option that it does not use.

    TensorRT-RTX builds without a GPU: there only its library must be there.
    """
    from ..engines.backend import find_backend
    from ..engines.backends import BACKENDS
    from ..engines.errors import UsageError
    from ..engines.tensorrt.flavour import flavour

    row = BACKENDS.get(name)
    if name == AUTO:
        _check_for_contest(options)
    elif row is None or row.builds == "engines":
        flavour(name)
    elif row.builds == "nothing":
        raise UsageError(
            f"there is nothing to build for {name}",
            expected="a backend with engines, or with layouts to measure",
            fix=f"Draw with it: --backend {name}",
        )
    else:
        _check_for_layouts(name, options)
        find_backend(name)


def _is_measured(name: str) -> bool:
    """Whether nothing is made for a backend but choices among what runs as it is."""
    from ..engines.backends import BACKENDS

    return name == AUTO or (name in BACKENDS and BACKENDS[name].builds == "layouts")


def _measure(
    name: str, wanted: Sequence[tuple[Package, list[str]]], store: EngineStore, *, as_json: bool
) -> None:
    """Measure what `_is_measured`, and print it."""
    from ..engines.backends import BACKENDS

    for package, nets in wanted:
        if name == AUTO:
            _compete(package, store, as_json=as_json)
        else:
            _tune(BACKENDS[name], package, store, nets, as_json=as_json)


def _check_for_contest(options: Mapping[str, bool]) -> None:
    """Raise UsageError for an option that a contest does not use, BackendError where a backend is missing."""
    from ..engines.backend import find_backend
    from ..engines.contest.fastest import HOSTS
    from ..engines.errors import UsageError

    if option := next((name for name, used in options.items() if used), ""):
        raise UsageError(
            f"{option} was given with --backend auto, which measures pictures of the default size",
            expected="--store and --json at most",
            fix=f"Leave {option} out.",
        )
    for name in HOSTS:
        find_backend(name)


def _check_for_layouts(backend: str, options: Mapping[str, bool]) -> None:
    """Raise UsageError for the first option that was used and makes no difference to layouts."""
    from ..engines.errors import UsageError

    if option := next((name for name, used in options.items() if used), ""):
        raise UsageError(
            f"{option} was given with --backend {backend}, which measures layouts at the default size",
            expected="--nets, --store and --json at most",
            fix=f"Leave {option} out.",
        )


def _tune(row: BackendRow, package: Package, store: EngineStore, nets: list[str], *, as_json: bool) -> None:
    """Measure the layouts of ONNX Runtime's nets, and print the medians and the choice."""
    with progress_bar(enabled=not as_json) as advance:
        tuned: Sequence[BuiltEngine] = row.tune_package()(package, store, _shown(advance), nets=nets)
    if as_json:
        print(json.dumps({"backend": row.name, "nets": list(map(_record, tuned))}))
        return
    for item in tuned:
        facts = item.entry.facts
        times = ", ".join(f"{name} {value:.3f} ms" for name, value in facts["milliseconds"].items())
        how = f"measured: {item.why}" if item.why else "in the store"
        show(f"{item.net}  {facts['layout']}  ({times})  {how}")
        for name, reason in facts["rejected"].items():
            show(f"  {name} is out: {reason}")


def _compete(package: Package, store: EngineStore, *, as_json: bool) -> None:
    """Measure the layouts of ONNX Runtime, then the backends of the host, and print which is the fastest."""
    from ..engines.backends import BACKENDS
    from ..engines.contest.fastest import HOSTS, standing
    from ..engines.contest.hosts import measure_hosts

    with progress_bar(enabled=not as_json) as advance:
        BACKENDS[HOSTS[0]].tune_package()(package, store, _shown(advance))
        measured = measure_hosts(package, store, _shown(advance))
    found = standing(package, {item.net: item.entry.facts for item in measured})
    if as_json:
        rows = list(map(_record, measured))
        totals = {"fastest": found.name, "backends": dict(found.nets), "picture": dict(found.milliseconds)}
        print(json.dumps({"backend": AUTO, **totals, "nets": rows}))
        return
    rows = [(item.net, item.entry.facts["milliseconds"]) for item in measured]
    for what, times in (*rows, ("picture", found.milliseconds)):
        first = times[HOSTS[0]]
        shown = (f"{name} {took:.3f} ms ({took / first:.2f}x)" for name, took in times.items())
        show(f"{what:<12} {', '.join(shown)}")
    for item in measured:
        for name, reason in item.entry.facts["rejected"].items():
            show(f"  {name} is out at {item.net}: {reason}")
    show(f"auto takes {found.name} for this model from now on")


def _record(item: BuiltEngine) -> dict[str, Any]:
    """What --json says of an entry, of whatever kind."""
    return {
        "net": item.net,
        "path": str(item.entry.path),
        "cached": not item.why,
        "why": item.why,
        "facts": dict(item.entry.facts),
    }


def _policy(name: str) -> Weights:
    from ..engines.errors import UsageError
    from ..engines.tensorrt.builder import Weights

    try:
        return Weights(name)
    except ValueError:
        raise UsageError(
            f"the weight policy is {name!r}",
            expected=", ".join(policy.value for policy in Weights),
            fix="Use the default: --weights embedded",
        ) from None


def _print_plan(
    planned: Sequence[WantedEngine], backend: str, profiles: list[Profile], *, as_json: bool
) -> None:
    labels = [[profile.label for profile in item.profiles] for item in planned]
    if as_json:
        rows = [
            {"net": item.net, "profiles": names, "cached": not item.why, "why": item.why}
            for item, names in zip(planned, labels, strict=True)
        ]
        print(json.dumps({"backend": backend, "profiles": list(map(str, profiles)), "nets": rows}))
        return
    for item, names in zip(planned, labels, strict=True):
        show(f"{item.net}  {', '.join(names)}  {f'to build: {item.why}' if item.why else 'in the store'}")


def _print_built(
    built: Sequence[BuiltEngine], backend: str, profiles: list[Profile], *, as_json: bool
) -> None:
    if as_json:
        rows = [
            {
                **_record(item),
                "profiles": item.entry.facts["labels"],
                "size": item.entry.size,
                "seconds": item.entry.build_seconds if item.why else 0.0,
            }
            for item in built
        ]
        print(json.dumps({"backend": backend, "profiles": list(map(str, profiles)), "nets": rows}))
        return
    for item in built:
        labels = ", ".join(item.entry.facts["labels"])
        how = f"built in {item.entry.build_seconds:.1f} s: {item.why}" if item.why else "in the store"
        show(f"{item.net}  {labels}  {item.entry.size / 1e6:.1f} MB  {how}")
