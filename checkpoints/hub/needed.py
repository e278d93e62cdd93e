"""Which files of a repository are needed to open it, decided by their names and a few JSON files.

The same rules say whether what a cache holds is whole: they are then asked about the names in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NoReturn, cast

from ...engines.errors import CheckpointError, PackageError, command
from ...engines.package import MANIFEST, check_inside
from ...engines.spec import TEXT_ENCODERS
from ..files.component import DIFFUSERS, PICKLES, SUPPORTED, shard_names, weight_variants
from ..files.families import layout_of, left_out
from ..files.tokenizers import TOKENIZER_FILES
from .ids import SAFETENSORS, HubModel

INDEX = "model_index.json"
_CONFIG = "config.json"
_ORDER = ("fp16", "")  # of variants: half the bytes, and what most were trained or are run in
Read = Callable[[str], Mapping[str, Any]]  # of a JSON file, by its name in the repository


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What opening a model takes.

    Attributes:
        files: names in the repository: small files before weights, so that whoever is interrupted lacks
            weights, which is noticed.
        opens: what is opened, by its name in the repository; "" is the repository's folder.
        without_links: whether the files must not be links, as those of a package.
    """

    files: tuple[str, ...]
    opens: str = ""
    without_links: bool = False


def needed(model: HubModel, names: Collection[str], read: Read) -> Needed:
    """What is needed of the files `names` of a repository.

    A diffusers folder takes what its pipeline's class consists of, a package what its manifest lists, a part
    alone (an autoencoder, say) its config and weights, and a repository of one `.safetensors` file that file.
    Weights are safetensors, in fp16 where there are such; never pickles, and never both.

    Raises:
        CheckpointError: a needed file is missing, there are only pickles, the family is not supported, or
            several files could be meant.
        PackageError: a package's manifest names files outside it, or files that are missing.
    """
    if model.file is not None:
        return _one_file(model, names, model.file)
    if INDEX in names:
        return _pipeline(model, names, read)
    if MANIFEST in names:
        return _package(model, names, read)
    top = [name for name in names if "/" not in name]
    if _CONFIG in top and weight_variants(top, DIFFUSERS):
        return Needed(files=(_CONFIG, *_weights(model, names, PurePosixPath(), DIFFUSERS, read)))
    files = sorted(name for name in top if name.endswith(SAFETENSORS))
    if len(files) == 1:
        return Needed(files=(files[0],), opens=files[0])
    raise _other_layout(model, names, files)


def _one_file(model: HubModel, names: Collection[str], file: str) -> Needed:
    if file not in names:
        others = [name for name in sorted(names) if name.endswith(SAFETENSORS)]
        raise CheckpointError(
            f"{model.repository} has no file {file}",
            expected=f"one of {', '.join(others[:20])}" if others else "a repository with .safetensors files",
            fix="Pass one of them." if others else "Use another repository.",
        )
    if file.endswith(PICKLES):
        _refuse_pickles(model, [file])
    if not file.endswith(SAFETENSORS):
        raise CheckpointError(
            f"{model.repository} has {file}, which holds no weights",
            expected=f"a {SAFETENSORS} file, or the repository",
            fix=f"Pass the repository: {model.repository}",
        )
    return Needed(files=(file,), opens=file)


def _pipeline(model: HubModel, names: Collection[str], read: Read) -> Needed:
    index = read(INDEX)
    layout = layout_of(str(index.get("_class_name")), model.repository)
    absent = left_out(layout, index)
    parts = {name: stem for name, stem in layout.parts.items() if name not in absent}
    small = [INDEX, *(f"{folder}/{file}" for folder, file in layout.configs.items())]
    small += [f"{name}/{_CONFIG}" for name in parts]
    for encoder, folder in TEXT_ENCODERS.items():
        if encoder in parts:
            small += _tokenizer(model, names, folder)
    for name in small:
        if name not in names:
            _refuse_missing(model, name)
    pickles: list[str] = []
    weights: list[str] = []
    for name, stem in parts.items():
        folder = PurePosixPath(name)
        if only := _only_pickles(names, folder, stem):
            pickles += only
        else:
            weights += _weights(model, names, folder, stem, read)
    if pickles:
        _refuse_pickles(model, pickles, [name for name in names if "/" not in name])
    return Needed(files=(*small, *weights))


def _tokenizer(model: HubModel, names: Collection[str], folder: str) -> list[str]:
    found = [f"{folder}/{name}" for name in TOKENIZER_FILES if f"{folder}/{name}" in names]
    if f"{folder}/tokenizer.json" not in found:
        found += [f"{folder}/{name}" for name in ("vocab.json", "merges.txt")]  # which are then required
    return list(dict.fromkeys(found))


def _inside(names: Collection[str], folder: PurePosixPath) -> Iterator[str]:
    return (PurePosixPath(name).name for name in names if PurePosixPath(name).parent == folder)


def _only_pickles(names: Collection[str], folder: PurePosixPath, stem: str) -> list[str]:
    inside = list(_inside(names, folder))
    if weight_variants(inside, stem):
        return []
    return sorted(str(folder / name) for name in inside if name.endswith(PICKLES))


def _weights(
    model: HubModel, names: Collection[str], folder: PurePosixPath, stem: str, read: Read
) -> list[str]:
    """One set of a part's weights: a file, or an index and its shards."""
    variants = weight_variants(_inside(names, folder), stem)
    known = [name for name in _ORDER if name in variants]
    if not known and len(variants) > 1:
        choices = [str(folder / name) for name in variants.values()]
        fetch = command("hf", "download", model.repository, "--local-dir", "FOLDER")
        raise CheckpointError(
            f"{model.repository} has weights as {' and '.join(choices)}",
            expected=f"{folder / stem}{SAFETENSORS}, or its .fp16 variant",
            fix=f"Fetch them, and rename the set to use: {fetch}",
        )
    if not variants:
        _refuse_missing(model, f"{folder / stem}{SAFETENSORS}")
    first = str(folder / variants[next(iter(known or variants))])
    if first.endswith(SAFETENSORS):
        return [first]
    files = [first, *(str(folder / name) for name in shard_names(read(first), f"{model.repository}/{first}"))]
    for name in files:
        if name not in names:
            _refuse_missing(model, name)
    return files


def _package(model: HubModel, names: Collection[str], read: Read) -> Needed:
    listed = cast(object, read(MANIFEST).get("files"))
    if not isinstance(listed, dict):
        raise PackageError(
            f"{model.repository}/{MANIFEST} lists no files",
            expected="a package that `latentrt export` wrote, or a diffusers folder",
            fix="Use another repository.",
        )
    files = [MANIFEST, *map(str, cast(dict[object, object], listed))]
    for name in files:
        check_inside(name)
        if name not in names:
            raise PackageError(
                f"{model.repository} has no {name}, which its manifest lists",
                expected="a complete package",
                fix="Use another revision: ORG/NAME@REVISION",
            )
    # Graphs and tokenizers before weights.
    files.sort(key=lambda name: (name != MANIFEST, name.endswith(SAFETENSORS)))
    return Needed(files=tuple(files), without_links=True)


def _other_layout(model: HubModel, names: Collection[str], files: list[str]) -> CheckpointError:
    if files:
        return CheckpointError(
            f"{model.repository} has the files {', '.join(files[:20])}",
            expected="one file, or a diffusers folder",
            fix=f"Say which one: {replace(model, file=files[0])}",
        )
    if pickles := sorted(name for name in names if name.endswith(PICKLES) and "/" not in name):
        _refuse_pickles(model, pickles)
    there = f"only {', '.join(sorted(names)[:5])}" if names else "nothing"
    return CheckpointError(
        f"{model.repository} has neither {INDEX} nor a {SAFETENSORS} file at its top, {there}"[:500],
        expected=SUPPORTED,
        fix=f"Use another repository, or say which file: {model.repository}/FILE{SAFETENSORS}",
    )


def _refuse_pickles(model: HubModel, pickles: list[str], top: Collection[str] = ()) -> NoReturn:
    """Raise CheckpointError: only pickles there. `top`: the repository's files that could do instead."""
    folder = PurePosixPath(PurePosixPath(model.repository).name)
    whole = next((name for name in sorted(top) if name.endswith(SAFETENSORS)), None)
    if whole is not None:
        fix = f"Use its {SAFETENSORS} file, if that holds the whole model: {replace(model, file=whole)}"
    else:
        revision = () if model.revision == "main" else ("--revision", model.revision)
        fetch = command("hf", "download", model.repository, *revision, "--local-dir", folder)
        made = PurePosixPath(pickles[0]).with_suffix(SAFETENSORS)
        convert = command("latentrt", "convert", folder / pickles[0], "-o", folder / made)
        fix = f"Convert {'it' if len(pickles) == 1 else 'each'}: {fetch} && {convert}"
    raise CheckpointError(
        f"{model.repository} has its weights as pickles ({', '.join(pickles)}): reading them can run code"[
            :500
        ],
        expected=f"{SAFETENSORS} files",
        fix=fix,
    )


def _refuse_missing(model: HubModel, name: str) -> NoReturn:
    raise CheckpointError(
        f"{model.repository} has no {name}",
        expected=SUPPORTED,
        fix="Use another repository, or another revision of it: ORG/NAME@REVISION",
    )
