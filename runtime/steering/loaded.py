"""The controls that a pipeline may be steered by, by name: opened when they are loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from ...adapters.folder import NameTakenError, check_name, check_names, check_path
from ...engines.errors import CheckpointError, PackageError, UsageError
from ...engines.package import Manifest, Package
from ...engines.spec import CONTROL_TYPE, FEATURE, IMAGE_KEYS, RESIDUAL
from ..controls.control import Control
from ..controls.hints import read_hints
from ..controls.image_prompt import ImagePrompt
from ..controls.preparations import find_preparation
from ..loop.job import Loop, SteeringJob
from ..record import STEERED_BY
from ..request.guidance import OFF
from ..request.request import Request
from .controlnet import SteeredByNet
from .ip_adapter import Prompted, image_prompt_job
from .steered import OpenedControl, Rows
from .t2i_adapter import SteeredByFeatures
from .unions import check_unions, joined

_LOG = logging.getLogger(__name__)

_UNET, _CONTROLLED, _PROMPTED = "unet", "unet_controlled", "unet_image_prompt"
# A kind of controls -> the graph of the UNet that takes it; the last one takes all of them.
_GRAPHS = {"controlnet": _CONTROLLED, "t2i-adapter": _CONTROLLED, "ip-adapter": _PROMPTED}
_TITLES = {"controlnet": "a ControlNet", "t2i-adapter": "a T2I-Adapter", "ip-adapter": "an IP-Adapter"}


class LoadedControls:
    """ControlNets, T2I-Adapters and IP-Adapters by name. Threads may share it.

    Args:
        manifest: of the model that they steer.
        open_package: opens a file, with an IP-Adapter's image encoder.
        open_loop: opens its nets, where the model's are.
        use_unet: lets the model's loop run its rows with a graph of the UNet (`PackageLoop.use_unet`).
    """

    def __init__(
        self,
        manifest: Manifest,
        open_package: Callable[[str | Path, Path | None], Package],
        open_loop: Callable[[Package], Loop],
        use_unet: Callable[[str], None],
    ) -> None:
        self._manifest, self._use_unet = manifest, use_unet
        self._open_package, self._open_loop = open_package, open_loop
        self._loaded: dict[str, OpenedControl] = {}
        self._lock = Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what was loaded."""
        with self._lock:
            return tuple(self._loaded)

    def free_name(self, name: str) -> str:
        """The first with a number behind the name that no control has."""
        taken = set(self.names)
        return next(one for one in (f"{name}-{number}" for number in count(2)) if one not in taken)

    @property
    def kinds(self) -> dict[str, str]:
        """Name -> "controlnet", "t2i-adapter" or "ip-adapter"."""
        with self._lock:
            return {name: opened.kind for name, opened in self._loaded.items()}

    def load(
        self, path: str | Path, name: str | None = None, *, image_encoder: str | Path | None = None
    ) -> str:
        """Open a control, and call it `name`, by default as its file. Returns the name.

        Args:
            path: what to open; a str may be a name that ships.
            name: what to call it.
            image_encoder: of an IP-Adapter; None is the one beside its file.

        Raises:
            CheckpointError: no control, or one for another model.
            UsageError: no path, a name that is none, or one that another one has.
            PackageError: the model's package is so old that it takes none.
            BackendError: it cannot be opened, or on a device a picture is drawn at the moment.
        """
        usual = "a file, a folder, or the name of a model of a hub"
        check_path(path, "a control", usual, "Pass a str or a Path.")
        if image_encoder is not None:
            check_path(image_encoder, "an image encoder", "a file or a folder", "Pass a str or a Path.")
        if name is not None:
            check_name(name, "a control", "Pass name=NAME, or leave it out for the file's.")
        if _PROMPTED not in self._manifest.nets:
            raise PackageError(
                f"the package {self._manifest.name!r} takes no controls: it has no net {_PROMPTED!r}",
                expected="a package of 2026-11-29 or later",
                fix="Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE",
            )
        package = self._open_package(path, None if image_encoder is None else Path(image_encoder))
        self._check(package, Path(path))
        with ExitStack() as stack:
            loop = stack.enter_context(closing(self._open_loop(package)))
            opened = OpenedControl(package=package, loop=loop)
            name = opened.package.manifest.name if name is None else name
            with self._lock:
                known = self._loaded.get(name)
                if known is None:
                    self._use_unet(unet_for(one.kind for one in (*self._loaded.values(), opened)))
                    self._loaded[name] = opened
                    stack.pop_all()
                elif known.package.manifest.sha256 != opened.package.manifest.sha256:
                    raise NameTakenError(
                        f"another control is called {name!r}",
                        expected="a name of its own for each",
                        fix="Pass name=…, or unload the other one first.",
                        name=name,
                    )
        return name

    def unload(self, names: str | Sequence[str] | None = None) -> None:
        """Close these, or all; a picture that is drawn with one fails.

        Raises:
            UsageError: a name that is none.
            BackendError: on a device, where a picture is drawn at the moment.
        """
        fix = "Pass the names of controls, as load_control returns them."
        given = None if names is None else dict.fromkeys(check_names(names, "a control", fix))
        with self._lock:
            going = list(self._loaded if given is None else given)
            for name in going:
                if name not in self._loaded:
                    raise self._unknown(name)
            staying = [one for name, one in self._loaded.items() if name not in going]
            self._use_unet(unet_for(one.kind for one in staying))
            for name in going:
                self._loaded.pop(name).loop.close()

    def close(self) -> None:
        """Free everything. May be called twice."""
        with self._lock:
            while self._loaded:
                self._loaded.popitem()[1].loop.close()

    def check(self, controls: Sequence[Control | ImagePrompt]) -> None:
        """Raise UsageError before anything is drawn.

        For a name that was not loaded or is of another kind of control, a wrong type for a Union, or a
        preparation that there is none of or has no such setting.
        """
        check_unions(
            [
                (one, self._find(one.model).package.manifest)
                for one in controls
                if isinstance(one, Control) and self._find(one.model).kind == "controlnet"
            ]
        )
        for control in controls:
            opened = self._find(control.model)
            if isinstance(control, ImagePrompt) != (opened.kind == "ip-adapter"):
                wanted = "ImagePrompt" if opened.kind == "ip-adapter" else "Control"
                option = "--ip-adapter" if opened.kind == "ip-adapter" else "--control-net"
                raise UsageError(
                    f"{control.model!r} is {_TITLES[opened.kind]}, and was given as another kind of control",
                    expected=f"latentrt.{wanted}, or {option} on the command line",
                    fix=f"Pass latentrt.{wanted}(model={control.model!r}, image=…), or give it to {option}",
                )
            if isinstance(control, Control):
                find_preparation(control.preparation).check(control.settings)

    def records(self, controls: Sequence[Control | ImagePrompt]) -> list[dict[str, Any]]:
        """What a picture's record would say of these. Raises UsageError as `check` and `job`."""
        self.check(controls)
        return [self._read(one).record() for one in controls]

    def job(self, request: Request) -> tuple[SteeringJob, dict[str, Any]]:
        """What the loop is given of a request's controls, and what a picture's record says of them.

        Raises:
            UsageError: an unknown name, a picture that cannot be read, another number of pictures than is
                drawn, or a size or a mode that a control does not take.
        """
        if not request.controls:
            return SteeringJob(), {}
        rows = Rows(
            steps=len(request.schedule()),
            schedule=len(replace(request, denoising_end=None).schedule()),
            guided=request.guided,
            guided_calls=request.guidance_scales() > OFF,
            height=request.height,
            width=request.width,
            pictures=len(request.prompts),
        )
        steering = [self._read(one) for one in request.controls]
        for one in request.controls:
            if not one.on(rows.schedule)[: rows.steps].any():
                _LOG.warning(
                    "%s steers none of the %d steps: from %g to %g of them there is no whole one",
                    one.model,
                    rows.steps,
                    one.start,
                    one.end,
                )
        nets = [one for one in steering if isinstance(one, SteeredByNet)]
        job = SteeringJob(
            controlnets=joined([one.job(rows) for one in nets], [one.control for one in nets], rows),
            features=tuple(one.job(rows) for one in steering if isinstance(one, SteeredByFeatures)),
            image_prompt=image_prompt_job(
                [one for one in steering if isinstance(one, Prompted)],
                rows,
                self._manifest.net(_PROMPTED).spec,
            ),
        )
        return job, {STEERED_BY: [one.record() for one in steering]}

    def _read(self, control: Control | ImagePrompt) -> SteeredByNet | SteeredByFeatures | Prompted:
        """A control with its net and pictures. Raises UsageError."""
        opened = self._find(control.model)
        if isinstance(control, ImagePrompt):
            return Prompted.read(control, opened)
        kind = SteeredByFeatures if opened.kind == "t2i-adapter" else SteeredByNet
        pictures = read_hints(
            control.image,
            preparation=control.preparation,
            settings=control.settings,
            mask_image=control.mask_image,
            resize_mode=control.resize_mode,
        )
        return kind(control=control, opened=opened, pictures=pictures)

    def _find(self, name: str) -> OpenedControl:
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
            raise self._unknown(name)

    def _unknown(self, name: str) -> UsageError:
        near = get_close_matches(name, self._loaded, 3) or list(self._loaded)[:10]
        return UsageError(
            f"no control is called {name!r:.100}",
            expected=f"one of {', '.join(near)}" if near else "the name of one that was loaded",
            fix="Load it first: pipe.load_control(FILE), --control-net FILE, --ip-adapter FILE",
        )

    def _check(self, package: Package, path: Path) -> None:
        """Raise CheckpointError for a control whose outputs are not what this model's UNet takes."""
        ours, theirs = self._manifest, package.manifest
        given = _outputs(package)
        taken = {
            item.name: _sizes(item.shape)
            for item in ours.net(_PROMPTED).spec.inputs
            if item.name.startswith((RESIDUAL, FEATURE, IMAGE_KEYS))
        }
        kind = str(theirs.control["kind"])
        kinds = {_prefix(name) for name in given}
        every = [] if kind == "t2i-adapter" else [name for name in taken if _prefix(name) in kinds]
        other = [name for name, shape in given.items() if taken.get(name) != shape]
        if wrong := [name for name in every if name not in given] or other:
            name = wrong[0]
            why = f"its {name} is {given.get(name, 'missing')}, and {taken.get(name, 'nothing')} is taken"
        elif kind != "ip-adapter" and ours.latent_scale != theirs.latent_scale:
            why = f"its latents are of {theirs.latent_scale} pixels, and of {ours.latent_scale} here"
        elif theirs.context_width not in (0, ours.context_width):
            why = f"it reads a context of {theirs.context_width} numbers, and {ours.context_width} are here"
        elif others := [
            name
            for name, width in theirs.vectors.items()
            if name != CONTROL_TYPE and ours.vectors.get(name) != width
        ]:
            why = f"it reads other {', '.join(others)}"
        else:
            return
        raise CheckpointError(
            f"{path} is {_TITLES[kind]} for {theirs.family}, and {ours.name} is {ours.family}: {why}",
            expected=f"{_TITLES[kind]} that was made for this family of models",
            fix="Use one of these.",
        )


def _prefix(name: str) -> str:
    """What an output is called without its number."""
    return name.rstrip("0123456789")


def unet_for(kinds: Iterable[str]) -> str:
    """The graph of the UNet that takes controls of all these kinds."""
    graphs = {_GRAPHS[kind] for kind in kinds}
    return next((graph for graph in (_PROMPTED, _CONTROLLED) if graph in graphs), _UNET)


def _sizes(shape: Sequence[int | str]) -> tuple[int | str, ...]:
    """What a control's output and the UNet's input for it have in common.

    Of a map the channels and the level, and of an attention's keys the width of all heads.
    """
    numbers = [size for size in shape[1:] if isinstance(size, int)]
    if len(numbers) == 2:  # (B, G, heads, width, I)
        return (numbers[0] * numbers[1],)
    return tuple(size for size in shape[1:] if size != "I")


def _outputs(package: Package) -> dict[str, tuple[int | str, ...]]:
    """By name, of what a control gives to the UNet; of keys and values the keys."""
    kind = str(package.manifest.control["kind"])
    net = {"controlnet": "controlnet", "t2i-adapter": "t2i_adapter", "ip-adapter": "image_prompt"}[kind]
    found = {item.name: item.shape for item in package.manifest.net(net).spec.outputs}
    if kind == "ip-adapter":
        return {
            name: (shape[-1],) for name, shape in found.items() if name.startswith(IMAGE_KEYS)
        }  # (N, I, C)
    return {name: _sizes(shape) for name, shape in found.items()}
