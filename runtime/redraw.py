"""A picture once more, from what its file says of how it was made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..engines.errors import SamplerError, UsageError, command
from .embeddings import Words
from .model import given_options
from .pictures.infotext import parse_infotext
from .pictures.write import PictureMetadata, read_metadata
from .pipeline import Pipeline
from .record import BEGAN_AS, LORA_HASHES, STEERED_BY, Recorded, read_a1111, read_record
from .recorded_adapters import Redrawn, redrawn_adapters
from .recorded_controls import check_recorded_controls
from .refine import refine
from .request.inputs import INPUTS, Input, find_input
from .request.parameters import PARAMETERS, CallParameters, check_loras
from .result import Result
from .sampling.names import resolve
from .sampling.step_lists import list_of_model
from .second_pass import DIFFERENT, after, enlarged_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A file or its content, what `read_metadata` says of one, or a record.
Source = str | Path | bytes | PictureMetadata | Mapping[str, Any]

_LOG = logging.getLogger(__name__)


def redraw(
    pipe: Pipeline,
    source: Source,
    *,
    prompt: str | None = None,
    refiner: Pipeline | None = None,
    callback_on_step_end: Any = None,
    **parameters: Unpack[CallParameters],
) -> Result[Any]:
    """Draw a picture again: with the same package, and nothing changed, to the byte.

    What is not carried over from another program's text, and a model that is another one, is logged.

    Args:
        pipe: draws; the base's, where a refiner ended the picture.
        source: a picture's file, its content, or its record (`Result.record`).
        prompt: another one than the picture's.
        refiner: of a picture that a refiner ended.
        callback_on_step_end: as `Pipeline` calls it.
        parameters: those that are to be others than the picture's. `image`, `mask_image` and `latents` are
            what it started from; a file's are looked for beside it, by name and then by hash.

    Raises:
        UsageError: the file says nothing, an input or an embedding is missing or another one, or whatever
            `Pipeline` raises.
    """
    given = {"prompt": prompt, **{name: parameters.get(name) for name in INPUTS}}
    changes = {name: value for name, value in parameters.items() if name not in INPUTS}
    changes["callback_on_step_end"] = callback_on_step_end
    metadata = read_metadata(source) if isinstance(source, (str, Path, bytes)) else source
    record = metadata.record if isinstance(metadata, PictureMetadata) else metadata
    folder = Path(source).parent if isinstance(source, (str, Path)) else None
    if record is None:
        assert isinstance(metadata, PictureMetadata)
        return _of_text(pipe, metadata, source, given, changes)
    _check_model(pipe, record.get("base_record") or record)
    if record.get("grid"):
        raise UsageError(
            f"the file shows {record['grid']} pictures side by side, and says how the first was made",
            expected="one picture",
            fix="Draw it from its parameters, which `latentrt metadata` prints.",
        )
    if refiner is not None and "base_record" not in record:
        raise UsageError(
            "a refiner for a picture that none ended",
            expected="the model that drew it alone",
            fix="Leave the refiner out, or draw a new picture with it.",
        )
    if "base_record" in record:
        return _refined(pipe, refiner, record, folder, given, changes)
    return _drawn(pipe, record, folder, given, changes)


def _drawn(
    pipe: Any,
    record: Mapping[str, Any],
    folder: Path | None,
    given: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> Result[Any]:
    recorded = read_record(record)
    check_recorded_controls(pipe, record.get(STEERED_BY), changes.get("controls"))
    first = _first_pass(record)
    inputs = _inputs(recorded, folder, given) if first is None else {}
    parameters = {**_without_rivals(recorded.parameters, changes), **inputs, **changes}
    found = _adapters(pipe, recorded, _prompt(recorded, given), parameters, changes)
    parameters["loras"] = found.loras
    pipe = _knowing(pipe, found)
    _check_embeddings(pipe, recorded, found, parameters, _words(pipe, found))
    if first is not None:
        return _twice(pipe, found.prompt, parameters, first)
    result = pipe(found.prompt, **parameters)
    return _with_names(result, recorded)


def _first_pass(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the first of two passes had other values of. Raises UsageError."""
    found = record.get(BEGAN_AS)
    if found is None or (isinstance(found, Mapping) and set(cast("Any", found)) == set(DIFFERENT)):
        return cast("Mapping[str, Any] | None", found)
    raise UsageError(
        f"the record's {BEGAN_AS} is {found!r:.80}",
        expected=f"{', '.join(DIFFERENT)}: a record that latentrt wrote",
        fix="Pass prompt and parameters instead.",
    )


def _twice(pipe: Any, prompt: str, parameters: Mapping[str, Any], first: Mapping[str, Any]) -> Result[Any]:
    """Draw small, and draw on at the size that the parameters say."""
    small = {**{name: value for name, value in parameters.items() if name != "strength"}, **first}
    drawn = pipe(prompt, **{**small, "output_type": "latent"})
    larger = {name: parameters[name] for name in ("height", "width")}
    return after(pipe(prompt, **{**parameters, "image": enlarged_for(pipe, drawn, larger)}), drawn)


def _adapters(
    pipe: Any, recorded: Recorded, prompt: str, parameters: Mapping[str, Any], changes: Mapping[str, Any]
) -> Redrawn:
    """The picture's adapters, or those of the changes. Raises UsageError."""
    given: Any = changes.get("loras")
    if given is not None:
        check_loras(given)
    syntax = parameters.get("prompt_syntax") or PARAMETERS["prompt_syntax"].default
    return redrawn_adapters(pipe.adapters, recorded, prompt, syntax, given)


def _knowing(pipe: Any, found: Redrawn) -> Any:
    """The pipeline, knowing adapters by the names that the picture has for them."""
    return pipe._with_adapters(pipe.adapters.knowing(found.known)) if found.known else pipe


def _without_rivals(parameters: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded parameters that can go with the changes."""
    changed = {name for name, value in changes.items() if name in PARAMETERS and value is not None}

    def rivals(name: str, other: str) -> bool:
        return name in PARAMETERS[other].excludes or other in PARAMETERS[name].excludes

    return {
        name: value for name, value in parameters.items() if not any(rivals(name, one) for one in changed)
    }


def _with_names(result: Result[Any], recorded: Recorded) -> Result[Any]:
    """The result with its inputs called as they were: what they show is the same."""
    named = {
        name: (Input(name=wanted.get("name"), sha256=wanted["sha256"]),)
        for name, wanted in recorded.inputs.items()
    }
    inputs = {**result.request.inputs, **named}
    return replace(result, request=replace(result.request, inputs=inputs))


def _prompt(recorded: Recorded, given: Mapping[str, Any]) -> str:
    return recorded.prompt if given["prompt"] is None else given["prompt"]


def _refined(
    pipe: Pipeline,
    refiner: Pipeline | None,
    record: Mapping[str, Any],
    folder: Path | None,
    given: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> Result[Any]:
    if refiner is None:
        raise UsageError(
            f"the picture was ended by the refiner {record['model']!r}",
            expected="that refiner as well as the base",
            fix="Pass refiner=…, or --refiner PACKAGE.",
        )
    _check_model(refiner, record)
    base, end = read_record(record["base_record"]), read_record(record)
    steered = record["base_record"].get(STEERED_BY)
    check_recorded_controls(pipe, steered, changes.get("controls"))
    parameters: dict[str, Any] = {**base.parameters, **end.parameters}
    found = _adapters(pipe, base, _prompt(base, given), {**parameters, **changes}, changes)
    at = parameters.pop("denoising_end")
    parameters.pop("denoising_start", None)
    together: Any = {**parameters, **_inputs(base, folder, given), **changes, "loras": found.loras}
    pipe = _knowing(pipe, found)
    if changes.get("loras") is None:
        together["refiner_loras"] = end.parameters.get("loras", ())
        refiner = _knowing(refiner, _of_refiner(refiner, base, end))
    assert refiner is not None
    _check_embeddings(pipe, base, found, together, _words(pipe, found))
    _check_embeddings(refiner, end, found, together, {})
    result = refine(pipe, refiner, found.prompt, at=at, **together)
    return replace(result, base=_with_names(result.base, base) if result.base else None)


def _of_refiner(refiner: Pipeline, base: Recorded, end: Recorded) -> Redrawn:
    """The adapters that a refiner drew with and the base did not. Raises UsageError."""
    own = {name: digits for name, digits in end.adapters.items() if base.adapters.get(name) != digits}
    loras = [one for one in end.parameters.get("loras", ()) if one[0] in own]
    recorded = replace(end, adapters=own, parameters={**end.parameters, "loras": loras})
    return redrawn_adapters(refiner.adapters, recorded, "", "plain", None)


def _of_text(
    pipe: Any,
    metadata: PictureMetadata,
    source: Source,
    given: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> Result[Any]:
    """From AUTOMATIC1111's text, or one like it."""
    if metadata.parameters is None:
        raise UsageError(
            f"{_named(source)} does not say how it was made",
            expected="a picture with latentrt's record, or with AUTOMATIC1111's text",
            fix="Pass its prompt and parameters instead.",
        )
    passed = {name: given[name] for name in INPUTS if given[name] is not None}
    recorded = read_a1111(parse_infotext(metadata.parameters), tuple(passed))
    parameters, left = dict(recorded.parameters), list(recorded.left)
    found = _adapters(pipe, recorded, _prompt(recorded, given), {**parameters, **changes}, changes)
    left += [
        f"{LORA_HASHES}: {name}, which no <lora:{name}:…> of the prompt names" for name in found.untagged
    ]
    try:
        manifest = pipe.package.manifest
        step_list = list_of_model(manifest.vectors, manifest.time_ids)
        resolve(parameters.get("sampler"), manifest.scheduler, step_list)
    except SamplerError:
        left.append(f"Sampler: {parameters.pop('sampler')}")
    if left:
        _LOG.warning("not carried over from %s: %s", _named(source), "; ".join(left))
    together = {**parameters, **passed, **changes, "loras": found.loras}
    pipe = _knowing(pipe, found)
    _check_embeddings(pipe, recorded, found, together, _words(pipe, found))
    return pipe(found.prompt, **together)


def _named(source: Source) -> str:
    """What a picture's file is called; what was read before has no name."""
    return str(source) if isinstance(source, (str, Path)) else "the picture"


def _check_embeddings(
    pipe: Pipeline, recorded: Recorded, found: Redrawn, parameters: Mapping[str, Any], words: Words
) -> None:
    """See to it that the embeddings that the picture was drawn with are there. Raises UsageError.

    `words` are those of the adapters that it is drawn with; one that came with another is not missed.
    """
    names = ("negative_prompt", "prompt_2", "negative_prompt_2")
    texts = [found.prompt, *(text for name in names if isinstance(text := parameters.get(name), str))]
    wanted = [one for one in recorded.embeddings if not one.adapter or one.name in words]
    pipe.embeddings.check(wanted, texts, words)


def _words(pipe: Pipeline, found: Redrawn) -> Words:
    return pipe.adapters.chosen(found.loras, found.tagged).words


def _check_model(pipe: Pipeline, record: Mapping[str, Any]) -> None:
    """Say so if another model drew the picture, or this one opened otherwise."""
    package = pipe.package
    if record.get("model_sha256") != package.manifest.sha256:
        _LOG.warning(
            "the picture was drawn with %r, sha256 %.12s; this is %r, %.12s: it may differ%s",
            record.get("model"),
            record.get("model_sha256", "unknown"),
            package.manifest.name,
            package.manifest.sha256,
            _opened_otherwise(record.get("opened_with"), package.opened_with),
        )


def _opened_otherwise(was: object, now: Mapping[str, Any]) -> str:
    """What a model was opened with, where that is something else than now; "" where it is not."""
    if (was or {}) == now:
        return ""
    options = given_options(was)
    if not options:
        return f". It was opened without {command(*given_options(now))}"
    values = cast("Mapping[str, Any]", was).values()
    lists = (cast("list[object]", value) if isinstance(value, list) else [value] for value in values)
    files = (
        cast("Mapping[str, Any]", file) for found in lists for file in found if isinstance(file, Mapping)
    )
    hashes = [f"{file.get('sha256')!s:.12}" for file in files]
    named = f" (sha256 {', '.join(hashes)})" if hashes else ""
    return (
        f". It was opened with {command(*options)}{named}; open it so: "
        f"{command('latentrt', 'generate', '--from', 'PICTURE', '-m', 'MODEL', *options)}"
    )


def _inputs(recorded: Recorded, folder: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures that it started from, as they were passed or found. Raises UsageError."""
    extra = [name for name in INPUTS if given[name] is not None and name not in recorded.inputs]
    if extra:
        raise UsageError(
            f"{' and '.join(extra)} for a picture that did not start from one",
            expected="none",
            fix="Leave it out, or draw a new picture from it.",
        )
    return {name: find_input(name, wanted, given[name], folder) for name, wanted in recorded.inputs.items()}
