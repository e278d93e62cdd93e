"""Ways from a checkpoint to its first picture, each in fresh processes: ours, through an export, and others'.

A process says twice how far it has come, and each time waits until it was looked at: when its model is open,
and when the picture is there. So seconds are by this process's clock, from the moment that the other one was
started, and include its imports. What ways keep on disk goes to a folder that is theirs alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from ...checkpoints.files.open import Checkpoint
from ..case import Case
from ..machine import resident_bytes
from ..models import full_size
from ..process import LIMIT, Child
from ..sides.contract import OURS, missing_modules
from ..sides.single_file import PIPELINES, not_set_up, without_checker, write_configs

DTYPE = "fp32"  # the arithmetic of all ways but stable-diffusion.cpp's, which has its own
_TELL = """
import json, os, sys
replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # what libraries print goes to stderr
def tell(**facts):
    print(json.dumps(facts), file=replies, flush=True)
    sys.stdin.readline()
asked = json.loads(sys.argv[1])
"""
_OURS = f"""{_TELL}
sys.modules.update(torch=None, diffusers=None, transformers=None)
from latentrt.runtime import Pipeline
with Pipeline.open(**asked["open"]) as pipe:
    tell(backend=pipe.backend)
    pipe(asked["prompt"], output_type="np", **asked["parameters"])
    tell()
"""
_DIFFUSERS = f"""{_TELL}
import diffusers, torch
if asked["threads"]:
    torch.set_num_threads(asked["threads"])
pipe = getattr(diffusers, asked["pipeline"]).from_single_file(
    asked["model"], config=asked["configs"], local_files_only=True, torch_dtype=torch.float32, **asked["more"]
)
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
tell(diffusers=diffusers.__version__, torch=str(torch.__version__))
pipe(asked["prompt"], generator=torch.Generator().manual_seed(asked["seed"]), **asked["parameters"])
tell()
"""
# Weights are mapped or read as its defaults have it, in the file's types; without `eager_load` it would be
# open before it has read any.
_CPP = f"""{_TELL}
try:
    from cyllama import __version__
    from cyllama.sd import SampleMethod, SDContext, SDContextParams
except ImportError as error:
    tell(error=f"cyllama cannot be imported ({{error}})", kind="not available")
    raise
params = SDContextParams(model_path=asked["model"])
params.eager_load = True
if asked["threads"]:
    params.n_threads = asked["threads"]
context = SDContext(params)
tell(cyllama=__version__)
context.generate(asked["prompt"], sample_method=SampleMethod.EULER, **asked["parameters"])
tell()
"""


@dataclass(frozen=True, kw_only=True)
class Errand:
    """What every way opens and draws.

    Attributes:
        source: the checkpoint; `source.root` is a file, or for some ways a diffusers folder.
        case: the picture, drawn with the sampler "euler".
        threads: of a CPU; None is what each takes by itself.
        sdcpp: a Python interpreter that has cyllama, whose wheel holds stable-diffusion.cpp.
    """

    source: Checkpoint
    case: Case
    threads: int | None = None
    sdcpp: Path | None = None

    @property
    def path(self) -> str:
        """Where the checkpoint lies."""
        return str(self.source.root.absolute())


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a way took.

    Attributes:
        opened: seconds until the model was open, before its first step.
        drawn: seconds of all of it, until the last process had ended.
        peak: the most bytes that were resident in a process; 0 where the system does not tell.
        written: bytes by which its folder grew.
        export: seconds of `opened` that an export took.
        side: versions of what did the work.
    """

    opened: float
    drawn: float
    peak: int
    written: int
    export: float | None = None
    side: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to the first picture.

    Attributes:
        side: who goes it, as a row has it.
        ways: what its rows are called: as many as `go` yields.
        go: go it, in a folder that is empty. Raises LatentrtError.
        refusal: None if it can be gone here, else the reason.
    """

    side: str
    ways: tuple[str, ...]
    go: Callable[[Errand, Path], Iterator[Taken]]
    refusal: Callable[[Errand], str | None] = lambda errand: None


def _draw(script: str, asked: Mapping[str, Any], folder: Path, *, interpreter: str = sys.executable) -> Taken:
    """Run a script that tells twice; what it keeps goes below `folder`. Raises SideError."""
    before = _size(folder)
    place = {"LATENTRT_CACHE": str(folder / "cache"), "XDG_CACHE_HOME": str(folder / "other caches")}
    began = perf_counter()
    arguments = ["-c", script, json.dumps(asked)]
    offline = {"HF_HUB_OFFLINE": "1"}
    with Child(*arguments, environment={**place, **offline}, interpreter=interpreter) as child:
        side = child.answer()
        opened = perf_counter() - began
        child.ask()
        peak = resident_bytes(child.pid)[1]
        child.tell()
        for _ in child.lines(LIMIT):
            pass
        drawn = perf_counter() - began
    return Taken(opened=opened, drawn=drawn, peak=peak, written=_size(folder) - before, side=side)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _ours(errand: Errand, model: str, folder: Path) -> Taken:
    opened = {"model": model, "backend": "onnxruntime", "threads": errand.threads}
    asked = {"open": opened, "prompt": errand.case.prompt, "parameters": errand.case.parameters}
    return _draw(_OURS, asked, folder)


def _as_it_is(errand: Errand, folder: Path) -> Iterator[Taken]:
    """Without a cache, and again with what the first process left there."""
    for _ in range(2):
        yield _ours(errand, errand.path, folder)


def _exported(errand: Errand, folder: Path, flags: tuple[str, ...] = ()) -> Iterator[Taken]:
    """`latentrt export` with these flags, and a picture from the package: the sum of both."""
    package = folder / "package"
    export = full_size.export(Path(errand.path), package, DTYPE, *flags)
    seconds, written = export["wall_seconds"], _size(folder)
    then = _ours(errand, str(package), folder)
    yield replace(
        then,
        opened=seconds + then.opened,
        drawn=seconds + then.drawn,
        peak=max(int(export["peak_rss"]), then.peak),
        written=written + then.written,
        export=seconds,
    )


def _diffusers(errand: Errand, folder: Path) -> Iterator[Taken]:
    """As a user calls it, but that configs which it would fetch are there: they are written before."""
    case, configs = errand.case, folder / "configs"
    family = errand.source.family
    write_configs(errand.source, configs)
    parameters = {
        "width": case.width,
        "height": case.height,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance_scale,
        "negative_prompt": case.negative_prompt,
    }
    asked = {
        "model": errand.path,
        "configs": str(configs),
        "pipeline": PIPELINES[family],
        "more": without_checker(family),
        "threads": errand.threads,
        "prompt": case.prompt,
        "seed": case.seed,
        "parameters": parameters,
    }
    yield _draw(_DIFFUSERS, asked, folder)


def _no_diffusers(errand: Errand) -> str | None:
    missing = missing_modules("torch", "diffusers", "transformers")
    return not_set_up(errand.source) or _no_file(errand) or missing


def _cpp(errand: Errand, folder: Path) -> Iterator[Taken]:
    case = errand.case
    parameters = {
        "width": case.width,
        "height": case.height,
        "sample_steps": case.steps,
        "cfg_scale": case.guidance_scale,
        "negative_prompt": case.negative_prompt,
        "seed": case.seed,
    }
    asked = {"model": errand.path, "threads": errand.threads, "prompt": case.prompt, "parameters": parameters}
    yield _draw(_CPP, asked, folder, interpreter=str(errand.sdcpp))


def _no_cpp(errand: Errand) -> str | None:
    if errand.sdcpp is None:
        return "needs --sdcpp PYTHON, an interpreter of an environment with cyllama"
    return _no_file(errand)


def _no_file(errand: Errand) -> str | None:
    return None if errand.source.root.is_file() else "it reads one file, and this checkpoint is a folder"


def _no_tracing(errand: Errand) -> str | None:
    return missing_modules("torch", "diffusers", "transformers", "onnx", "onnxscript")


# By the names of `--ways`, in the order of the first round.
WAYS: Mapping[str, Way] = {
    "opened": Way(side=OURS, ways=("as it is, cold cache", "as it is, warm cache"), go=_as_it_is),
    "templates": Way(side=OURS, ways=("exported through templates",), go=_exported),
    "traced": Way(
        side=OURS,
        ways=("exported by tracing",),
        go=partial(_exported, flags=("--trace",)),
        refusal=_no_tracing,
    ),
    "diffusers": Way(side="diffusers", ways=("from_single_file",), go=_diffusers, refusal=_no_diffusers),
    "sdcpp": Way(side="stable-diffusion.cpp", ways=("cyllama",), go=_cpp, refusal=_no_cpp),
}
