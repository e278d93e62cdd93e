"""What a model's name leads to: the shipped model, a package folder, or a checkpoint opened as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..adapters.folder import check_folder
from ..engines.backend import Place, check_backend
from ..engines.backends import BACKENDS
from ..engines.errors import CheckpointError, UsageError, command
from ..engines.hub import snapshot
from ..engines.package import MANIFEST, Package
from .prompts.tokenizer import tokenize
from .request.parameters import lora_text

if TYPE_CHECKING:
    from ..adapters.fusing import LoraFile
    from ..checkpoints.entries import OpenedModel
    from ..checkpoints.files.open import Checkpoint
    from ..checkpoints.fused import Fused
    from ..checkpoints.hub.download import DownloadProgress
    from ..checkpoints.stages import Progress

SHIPPED = {"demo": Path(__file__).resolve().parent.parent / "demo" / "package"}

# Where adapters of shipped models lie, embeddings, and controls.
ADAPTERS = {"demo": SHIPPED["demo"].parent / "adapters"}
EMBEDDINGS = {"demo": SHIPPED["demo"].parent / "embeddings"}
CONTROLS = {"demo": SHIPPED["demo"].parent / "controls"}

# The options that the command line calls otherwise than `CheckpointOptions`.
_FLAGS = {"fused": "--fuse-lora"}

Advance = Callable[[str, int, int], None]  # (what is being done, how much is done, of how much)
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How a checkpoint is opened; a package was exported in one way, and takes none of these.

    Attributes:
        dtype: the arithmetic, "fp16" or "fp32". None is fp32 on a CPU and fp16 on a GPU.
        vae: a folder or file of another autoencoder, in place of the checkpoint's.
        tiny_vae: a folder or file of a tiny autoencoder (TAESD), for previews.
        prediction_type: "epsilon" or "v_prediction", where the checkpoint does not say it.
        fused: files of adapters that become part of the weights, in this order; alone, or each with its
            strength. The cache keeps what they make of the weights.
        few_steps: the few-step LoRA (`adapters.few_steps.FEW_STEPS`) whose sampler, steps and guidance become
            the defaults; None is the one that an adapter's metadata speaks of, if any does.
    """

    dtype: Literal["fp16", "fp32"] | None = None
    vae: str | Path | None = None
    tiny_vae: str | Path | None = None
    prediction_type: str | None = None
    fused: Sequence[LoraFile] | None = None
    few_steps: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for what no checkpoint could be opened with."""
        if self.dtype not in (None, "fp16", "fp32"):
            raise UsageError(
                f"dtype is {self.dtype!r}", expected="fp16 or fp32", fix="Leave it out for the usual one."
            )
        if self.fused is not None:
            from ..adapters.fusing import files_and_strengths

            files_and_strengths(self.fused)
        for name in ("vae", "tiny_vae"):
            value: object = getattr(self, name)
            if not isinstance(value, (str, Path, type(None))):
                raise UsageError(
                    f"{name} is {value!r}",
                    expected="the path of a folder or file",
                    fix="Leave it out for the checkpoint's own.",
                )


def shipped_of(model: str | Path, package: Package) -> str:
    """The shipped model that `model` is, or that its package was made of; "" for any other.

    A package keeps the name and the text encoders of what it was made of.
    """
    if str(model) in SHIPPED:
        return str(model)
    name = package.manifest.name
    if name in SHIPPED and _text_encoder(package) == _text_encoder(Package.open(SHIPPED[name])):
        return name
    return ""


def _text_encoder(package: Package) -> Mapping[str, Any]:
    """The files that prompts are read with: sizes and hashes."""
    return {path: file for path, file in package.manifest.files.items() if path.startswith("text_encoder/")}


def given_options(opened_with: object) -> tuple[str, ...]:
    """What a command says to open a checkpoint with what `Package.opened_with`, or a record, has."""
    given = cast("Mapping[str, Any]", opened_with if isinstance(opened_with, Mapping) else {})
    words: list[str] = []
    for item in fields(CheckpointOptions):
        value: Any = given.get(item.name)
        if item.name == "fused" and isinstance(value, list):
            words += _fused_options(cast("list[Any]", value))
            continue
        found: Any = cast(Any, value).get("name") if isinstance(value, Mapping) else value
        if isinstance(found, str):
            words += [f"--{item.name.replace('_', '-')}", found]
    return tuple(words)


def _fused_options(fused: list[Any]) -> Iterator[str]:
    """The same for adapters."""
    for one in fused:
        if isinstance(one, Mapping) and isinstance(name := cast(Any, one).get("name"), str):
            yield from (_FLAGS["fused"], lora_text(name, cast(Any, one).get("strength", 1.0)))


def open_model(
    model: str | Path,
    *,
    backend: Callable[[], str],
    options: CheckpointOptions = CheckpointOptions(),
    advance: Advance | None = None,
    note: Note | None = None,
    allow_unused: bool = False,
) -> Package:
    """Open a model of any kind as a package.

    Args:
        model: the shipped model ("demo"), a package folder, a checkpoint's file or folder, the name of a
            checkpoint that was opened before (`latentrt models`), or a model of a hub (`org/name`,
            `org/name@revision`), which is fetched first. A name is opened as it was the last time:
            with the same other autoencoders and prediction type, where `options` has no others. Its path
            opens it with its own.
        backend: the name of the backend that it is opened for; called for a checkpoint alone.
        options: of checkpoints.
        advance: is told how far a download or a first opening has come.
        note: is given each line on what was assumed about a checkpoint, or left out.
        allow_unused: go on where an adapter of `options.fused` has keys that the model has no weight for.

    Raises:
        ModelError: nothing there, or nothing that can be opened.
        UsageError: an option that does not go with this model.
        BackendError: as `backend` raises it.
        StorageError: the disk is full.
    """
    given: object = model
    if not isinstance(given, (str, Path)):
        raise UsageError(
            f"the model is {given!r:.80}", expected="a name or a path", fix="Pass a str or a Path."
        )
    if not isinstance(cast(object, options), CheckpointOptions):
        raise UsageError(
            f"checkpoint is {options!r:.80}",
            expected="CheckpointOptions",
            fix="Pass checkpoint=latentrt.CheckpointOptions(…).",
        )
    if str(model) in SHIPPED:
        return _package(SHIPPED[str(model)], options)
    # here: the shipped model needs none of it
    from ..checkpoints.entries import refuse_entry
    from ..checkpoints.find import locate, recall
    from ..checkpoints.hub.ids import is_hub_id

    asked, before = str(model), recall(str(model))
    hub = asked if is_hub_id(asked) else ""
    own = ""
    if before is not None:
        asked_for, options, hub = options, _as_before(options, before), before.note.hub
        if options != asked_for:  # in one line with what it is opened with
            own = f", as it was the last time; without that: -m {command(hub or before.note.path)}"
    path = snapshot(locate(asked, progress=_downloading(advance)))
    if before is not None and note is not None:
        changed = ", which has changed since it was opened" if before.entries[0].state == "changed" else ""
        note(f"{asked} is {path}{changed}{_named(options)}{own}")
    if is_package(path):
        refuse_entry(path)
        return _package(path, options)
    return _opened(path, backend(), options, hub, advance, note, allow_unused=allow_unused)


def check_model(model: str) -> None:
    """Find a model, but open nothing; one of a hub is fetched. Raises as `open_model` where there is none."""
    if model not in SHIPPED:
        from ..checkpoints.find import locate  # here: as in `open_model`

        locate(model)


def check_opening(*, backend: str, device: str, loras: str | Path | None) -> None:
    """Raise what `Pipeline.open` refuses on every machine, for whoever has it called on another one.

    Raises:
        UsageError: no such device, a backend that does not run there, or adapters in no folder.
        BackendError: an unknown backend.
    """
    check_backend(backend, Place.parse(device))
    check_folder(loras)


def open_control_model(
    control: str | Path,
    *,
    backend: str,
    model: Package,
    image_encoder: Path | None = None,
    shipped: Path | None = None,
    advance: Advance | None = None,
    note: Note | None = None,
) -> Package:
    """Open a control: a file, a diffusers folder, a model of a hub, or one that ships.

    Args:
        control: which.
        backend: the name of the one that it is opened for.
        model: that it steers; a ControlNet that is stored as a change of its UNet is completed with it.
        image_encoder: of an IP-Adapter; None is the one beside it.
        shipped: a folder whose controls are called by name; a Path, or "./NAME", is another place.
        advance, note: as in `open_model`.

    Raises:
        ModelError: nothing there, or no control that can be opened.
        StorageError: the disk is full.
    """
    from ..checkpoints.find import locate
    from ..checkpoints.hub.ids import is_hub_id
    from ..checkpoints.opened import Options, open_control

    asked = str(control)
    if shipped is not None and isinstance(control, str) and asked in os.listdir(shipped):
        asked = str(shipped / asked)
    return open_control(
        snapshot(locate(asked, progress=_downloading(advance))),
        Options(
            dtype=cast(Any, model.manifest.dtype),
            reads=BACKENDS[backend].reads,
            image_encoder=image_encoder,
        ),
        base=model,
        hub=asked if is_hub_id(asked) else "",
        progress=_opening(advance),
        note=note,
    )


def is_package(path: Path) -> bool:
    """Whether a folder is a package. Raises CheckpointError for what this user may not look at."""
    try:
        return (path / MANIFEST).is_file()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror})",
            expected="a file or folder that this user may read",
            fix="Mend its permissions.",
        ) from error


def _as_before(options: CheckpointOptions, before: OpenedModel) -> CheckpointOptions:
    """The options, and where they are silent those of the last opening; its dtype is none of them."""
    vae, tiny_vae = (Path(path) if path else None for path in (before.note.vae, before.note.tiny_vae))
    return replace(
        options,
        vae=options.vae or vae,
        tiny_vae=options.tiny_vae or tiny_vae,
        prediction_type=options.prediction_type or before.note.prediction_type or None,
        fused=options.fused if options.fused is not None else before.note.fused or None,
        few_steps=options.few_steps or (before.note.few_steps if options.fused is None else "") or None,
    )


def _named(options: CheckpointOptions) -> str:
    """The options that a name brings along, for people."""
    given: list[tuple[str, Any]] = [
        *((name, getattr(options, name)) for name in ("vae", "tiny_vae", "prediction_type", "few_steps")),
    ]
    if options.fused:
        from ..adapters.fusing import files_and_strengths

        pairs = files_and_strengths(options.fused)
        given += [("fused", lora_text(str(path), strength)) for path, strength in pairs]
    return "".join(f", with {name} {value}" for name, value in given if value is not None)


def _package(folder: Path, options: CheckpointOptions) -> Package:
    used = [item.name for item in fields(options) if getattr(options, item.name) is not None]
    if used:
        flag = _FLAGS.get(used[0], f"--{used[0].replace('_', '-')}")
        other = "draw with it by --lora FILE" if used[0] == "fused" else "export the checkpoint again with it"
        raise UsageError(
            f"{flag} ({used[0]}=…) was given for {folder}, which is a package",
            expected="a checkpoint, which is opened in more than one way",
            fix=f"Leave it out, or {other}.",
        )
    return Package.open(folder)


def _opened(
    path: Path,
    backend: str,
    options: CheckpointOptions,
    hub: str,
    advance: Advance | None,
    note: Note | None,
    *,
    allow_unused: bool,
) -> Package:
    from ..checkpoints.opened import Options, open_checkpoint

    row = BACKENDS[backend]
    package = open_checkpoint(
        path,
        Options(
            dtype=options.dtype or ("fp16" if row.on_device else "fp32"),
            reads=row.reads,
            vae=None if options.vae is None else Path(options.vae),
            tiny_vae=None if options.tiny_vae is None else Path(options.tiny_vae),
            prediction_type=options.prediction_type,
            fuse=_fuse(options, allow_unused=allow_unused),
        ),
        tokenize=tokenize,
        hub=hub,
        progress=_opening(advance),
        note=note,
    )
    given = {} if options.dtype is None else {"dtype": options.dtype}
    return replace(package, opened_with={**given, **package.opened_with})


def _fuse(options: CheckpointOptions, *, allow_unused: bool) -> Callable[[Checkpoint], Fused]:
    """What reads the adapters of these options, for a checkpoint."""
    from ..adapters.fusing import read_fused

    return partial(
        read_fused, loras=options.fused or (), few_steps=options.few_steps, allow_unused=allow_unused
    )


def _downloading(advance: Advance | None) -> Callable[[DownloadProgress], None] | None:
    if advance is None:
        return None
    return lambda now: advance(f"downloading {now.file}", now.done, now.total)


def _opening(advance: Advance | None) -> Callable[[Progress], None] | None:
    if advance is None:
        return None
    return lambda now: advance(now.stage, now.index, now.total)
