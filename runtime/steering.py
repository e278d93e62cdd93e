"""The ControlNets that a pipeline may be steered by, by name: opened when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ..adapters.folder import check_name, check_names, check_path
from ..engines.errors import CheckpointError, PackageError, UsageError
from ..engines.package import Manifest, Package
from ..engines.spec import RESIDUAL
from .controls.control import Control
from .controls.hints import HintPictures, read_hints
from .loop.job import ControlJob, Loop
from .record import STEERED_BY
from .request.inputs import fingerprint
from .request.request import Request


@dataclass(frozen=True, kw_only=True)
class OpenedControl:
    """A ControlNet whose nets run: its package, and the loop that calls them."""

    package: Package
    loop: Loop


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering:
    """A control of a request with its pictures, read and checked."""

    control: Control
    opened: OpenedControl
    pictures: HintPictures

    def job(
        self, *, steps: int, text_of_row: Sequence[int], guided: bool, height: int, width: int, pictures: int
    ) -> ControlJob:
        """What the loop is given.

        Args:
            steps: S, the calls of the UNet.
            text_of_row: of its B rows.
            guided: whether half of them are unconditional.
            height, width: of the pictures.
            pictures: N; several for each of the control's, or as many.

        Raises:
            UsageError: the control has another number of pictures.
        """
        hint = self.pictures.at(height, width)
        if pictures % len(hint):
            raise UsageError(
                f"{len(hint)} control pictures for {pictures} pictures",
                expected="one control picture, or one for every prompt",
                fix="Pass one control picture for all of them.",
            )
        manifest = self.opened.package.manifest
        if manifest.control.get("channel_order") == "bgr":
            hint = np.ascontiguousarray(hint[:, ::-1])
        each = pictures // len(hint)
        rows = len(text_of_row)
        return ControlJob(
            manifest=manifest,
            call=self.opened.loop.call,
            hint=hint,
            hint_of_row=tuple((row % pictures) // each for row in range(rows)),
            scales=self.control.scales(
                steps=steps,
                rows=rows,
                outputs=len(manifest.nets["controlnet"].spec.outputs),
                guided=guided,
                pooled=bool(manifest.control.get("global_pool")),
            ),
        )

    def record(self) -> dict[str, Any]:
        """As a picture's record has it."""
        control, pictures = self.control, self.pictures
        values = {
            "model": str(control.model),
            "sha256": self.opened.package.manifest.sha256,
            "images": [fingerprint(one) for one in pictures.pictures],
            "masks": [fingerprint(one) for one in pictures.masks],
            "strength": control.strength,
            "start": control.start,
            "end": control.end,
            "mode": control.mode,
            "preparation": control.preparation,
            "settings": dict(pictures.settings),
            "resize_mode": control.resize_mode,
        }
        return {name: value for name, value in values.items() if value not in (None, [], {})}


class LoadedControls:
    """ControlNets by name. Threads may share it.

    Args:
        manifest: of the model that they steer.
        open_nets: opens the nets of a file, as the model's own are.
    """

    def __init__(self, manifest: Manifest, open_nets: Callable[[Path], OpenedControl]) -> None:
        self._manifest, self._open = manifest, open_nets
        self._loaded: dict[str, OpenedControl] = {}
        self._lock = Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what was loaded."""
        with self._lock:
            return tuple(self._loaded)

    def load(self, path: str | Path, name: str | None = None) -> str:
        """Open a ControlNet, and call it `name`, by default as its file. Returns the name.

        Raises:
            CheckpointError: no ControlNet, or one for another model.
            UsageError: no path, a name that is none, or one that another one has.
            PackageError: the model's package is so old that it takes none.
        """
        check_path(
            path,
            "a ControlNet",
            "a file, a folder, or the name of a model of a hub",
            "Pass a str or a Path.",
        )
        if name is not None:
            check_name(name, "a ControlNet", "Pass name=NAME, or leave it out for the file's.")
        if "unet_controlled" not in self._manifest.nets:
            raise PackageError(
                f"the package {self._manifest.name!r} takes no ControlNets: it has no net 'unet_controlled'",
                expected="a package of 2026-11-29 or later",
                fix="Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE",
            )
        with ExitStack() as stack:
            opened = self._open(Path(path))
            stack.enter_context(closing(opened.loop))
            self._check(opened.package, Path(path))
            name = opened.package.manifest.name if name is None else name
            with self._lock:
                known = self._loaded.get(name)
                if known is None:
                    self._loaded[name] = opened
                    stack.pop_all()
                elif known.package.manifest.sha256 != opened.package.manifest.sha256:
                    raise UsageError(
                        f"another ControlNet is called {name!r}",
                        expected="a name of its own for each",
                        fix="Pass name=…, or unload the other one first.",
                    )
        return name

    def unload(self, names: str | Sequence[str] | None = None) -> None:
        """Close these, or all; a picture that is drawn with one fails. UsageError for a name that is none."""
        fix = "Pass the names of ControlNets, as load_control returns them."
        given = None if names is None else dict.fromkeys(check_names(names, "a ControlNet", fix))
        with self._lock:
            going = list(self._loaded if given is None else given)
            for name in going:
                if name not in self._loaded:
                    raise self._unknown(name)
            for name in going:
                self._loaded.pop(name).loop.close()

    def close(self) -> None:
        """Free everything. May be called twice."""
        self.unload()

    def check(self, controls: Sequence[Control]) -> None:
        """Raise UsageError for a name that was not loaded, before anything is drawn."""
        for control in controls:
            self._find(control.model)

    def steering(self, controls: Sequence[Control]) -> tuple[Steering, ...]:
        """These controls with their nets and pictures.

        Raises:
            UsageError: an unknown name, or a picture that cannot be read.
        """
        return tuple(
            Steering(
                control=control,
                opened=self._find(control.model),
                pictures=read_hints(
                    control.image,
                    preparation=control.preparation,
                    settings=control.settings,
                    mask_image=control.mask_image,
                    resize_mode=control.resize_mode,
                ),
            )
            for control in controls
        )

    def jobs(
        self, request: Request, steps: int, text_of_row: Sequence[int]
    ) -> tuple[tuple[ControlJob, ...], dict[str, Any]]:
        """What the loop is given of a request's controls, and what a picture's record says of them.

        `steps` and `text_of_row` are as in `Steering.job`; errors are those of it and of `steering`.
        """
        steering = self.steering(request.controls or ())
        jobs = tuple(
            one.job(
                steps=steps,
                text_of_row=text_of_row,
                guided=request.guided,
                height=request.height,
                width=request.width,
                pictures=len(request.prompts),
            )
            for one in steering
        )
        return jobs, {STEERED_BY: [one.record() for one in steering]} if steering else {}

    def _find(self, name: str) -> OpenedControl:
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
            raise self._unknown(name)

    def _unknown(self, name: str) -> UsageError:
        near = get_close_matches(name, self._loaded, 3) or list(self._loaded)[:10]
        return UsageError(
            f"no ControlNet is called {name!r:.100}",
            expected=f"one of {', '.join(near)}" if near else "the name of one that was loaded",
            fix="Load it first: pipe.load_control(FILE), or --control-net FILE",
        )

    def _check(self, package: Package, path: Path) -> None:
        """Raise CheckpointError for a ControlNet whose outputs are not what this model's UNet takes."""
        ours, theirs = self._manifest, package.manifest
        taken = {item.name: item.shape for item in ours.net("unet_controlled").spec.inputs}
        wanted = {name: shape for name, shape in taken.items() if name.startswith(RESIDUAL)}
        given = {item.name: item.shape for item in theirs.net("controlnet").spec.outputs}
        vectors = dict(theirs.vectors)
        if (
            wanted != given
            or ours.latent_scale != theirs.latent_scale
            or ours.context_width != theirs.context_width
            or any(ours.vectors.get(name) != width for name, width in vectors.items())
        ):
            raise CheckpointError(
                f"{path} is a ControlNet for {theirs.family}, with {len(given)} outputs and a context of"
                f" {theirs.context_width} numbers; {ours.name} is {ours.family}",
                expected=f"one for a context of {ours.context_width} numbers and with {len(wanted)} outputs",
                fix="Use a ControlNet that was made for this family of models.",
            )
