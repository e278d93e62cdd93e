"""Profiles: for which pictures an engine is built, and which of an engine's profiles serves a call.

A profile is written `WIDTHxHEIGHT[:bN][:tT]`. Each of WIDTH, HEIGHT, N (pictures) and T (tokens) is
`LOW[-HIGH][@OPT]`: what is accepted, and the value the engine is tuned for (LOW unless given). So
`512x512:b1-4` is one size and up to four pictures, and `512-1024@768x512-1024@768:b1-2:t77-231` every size
between, tuned for 768x768, with prompts of up to 231 tokens. Without `:b` a profile takes 1 to 4 pictures,
without `:t` 77 tokens.

A net has inputs of its own, so `net_profiles` turns a picture's profile into shapes: one TensorRT
optimisation profile, or two where the net runs in the loop (with guidance its batch is twice the pictures).
Nets around the loop take single pictures as well: one may be the start of many, and a decoder that is short
of memory runs picture by picture, and in tiles. All of this is arithmetic; nothing is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import TypeVar

from .errors import PackageError, UsageError, command
from .package import Manifest
from .spec import NETS, VECTORS, Dim, NetSpec, level_symbol

GRAMMAR = (
    "WIDTHxHEIGHT[:bN][:tT], each LOW[-HIGH][@OPT], such as 512x512:b1-4 or 512-1024@768x512-1024@768:b1-2"
)

_RANGE = r"([0-9]+)(?:-([0-9]+))?(?:@([0-9]+))?"
_PROFILE = re.compile(rf"{_RANGE}x{_RANGE}(?::b{_RANGE})?(?::t{_RANGE})?", re.ASCII)
_DIGITS = 5  # of a number; TensorRT's dimensions are 64 bits wide, its volumes are what runs out first
SMALLEST_TILE = 256  # pixels: the smallest tile of an encoder or decoder that runs in pieces
_MOST_STEPS, _USUAL_STEPS, _USUAL_PROMPTS = 2000, 30, 2
_MOST_PROMPTS = 2  # groups of image tokens: IP-Adapters, or pictures with masks of their own
_USUAL_IMAGE_TOKENS, _MOST_IMAGE_TOKENS = 4, 257  # of a classic IP-Adapter; every place of ViT-H
_MOST_EMBEDDINGS = 1024  # beyond the vocabulary: a row of 2 to 5 kB each
_LEVELS = 6  # of a UNet, the latent's among them: more than any has

Size = TypeVar("Size", int, "Axis")
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # input name -> shape


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What one size may be: `low` to `high`, tuned for `opt`. Raises ValueError unless in that order."""

    low: int
    opt: int
    high: int

    def __post_init__(self) -> None:
        """Check the order."""
        if not 1 <= self.low <= self.opt <= self.high:
            raise ValueError(f"{self} is not in the order 1 <= LOW <= OPT <= HIGH")

    def __str__(self) -> str:
        """In the grammar of profiles, as short as it can be written."""
        span = str(self.low) if self.low == self.high else f"{self.low}-{self.high}"
        return span if self.opt == self.low else f"{span}@{self.opt}"

    def __mul__(self, factor: int) -> Axis:
        """All three times `factor`."""
        return Axis(low=self.low * factor, opt=self.opt * factor, high=self.high * factor)

    def __floordiv__(self, factor: int) -> Axis:
        """All three divided by `factor`."""
        return Axis(low=self.low // factor, opt=self.opt // factor, high=self.high // factor)


_FEW = Axis(low=1, opt=1, high=4)  # pictures
_ONE_PROMPT = Axis(low=77, opt=77, high=77)  # tokens of one CLIP window


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Which pictures an engine is built for: pixels, pictures at once, tokens of the prompt."""

    width: Axis
    height: Axis
    batch: Axis = _FEW
    tokens: Axis = _ONE_PROMPT

    @classmethod
    def parse(cls, text: str, *, multiple: int = 8) -> Profile:
        """Read a profile; `multiple` is the package's `size_multiple`.

        Raises:
            UsageError: not in the grammar, not in order, or pixels that are no multiple.
        """
        found = _PROFILE.fullmatch(text)
        if not found:
            raise _refuse(text, "it does not follow the grammar")
        parts = [found.groups()[start : start + 3] for start in range(0, 12, 3)]
        if any(number and len(number) > _DIGITS for part in parts for number in part):
            raise _refuse(text, f"a number has more than {_DIGITS} digits")
        try:
            width, height, batch, tokens = (_axis(*part) for part in parts)
        except ValueError as error:
            raise _refuse(text, "a range is not in the order 1 <= LOW <= OPT <= HIGH") from error
        assert width is not None, "the grammar has no profile without it"
        assert height is not None, "nor without this"
        for axis in (width, height):
            if any(pixels % multiple for pixels in (axis.low, axis.opt, axis.high)):
                raise _refuse(text, f"{axis} pixels are not multiples of {multiple}")
        return cls(width=width, height=height, batch=batch or _FEW, tokens=tokens or _ONE_PROMPT)

    def __str__(self) -> str:
        """The canonical spelling: `parse` gives it back, and engine keys are made of it."""
        tokens = "" if self.tokens == _ONE_PROMPT else f":t{self.tokens}"
        return f"{self.width}x{self.height}:b{self.batch}{tokens}"


def default_profile(manifest: Manifest) -> Profile:
    """The package's default size, one to four pictures."""
    return fixed_profile(manifest.defaults.width, manifest.defaults.height, tokens=manifest.max_tokens)


def fixed_profile(width: int, height: int, *, batch: int | None = None, tokens: int = 77) -> Profile:
    """The profile of exactly this request; without `batch`, of one to four pictures of this size."""
    return Profile(
        width=Axis(low=width, opt=width, high=width),
        height=Axis(low=height, opt=height, high=height),
        batch=Axis(low=batch, opt=batch, high=batch) if batch else _FEW,
        tokens=Axis(low=tokens, opt=tokens, high=tokens),
    )


def _axis(low: str | None, high: str | None, opt: str | None) -> Axis | None:
    return Axis(low=int(low), opt=int(opt or low), high=int(high or low)) if low else None


def _refuse(text: str, why: str) -> UsageError:
    return UsageError(
        f"the profile {text[:80]!r} cannot be built: {why}",
        expected=GRAMMAR,
        fix="Write for instance: --profile 512x512:b1-4.",
    )


@dataclass(frozen=True, kw_only=True)
class NetProfile:
    """One TensorRT optimisation profile of one net.

    `shapes` has (min, opt, max) per input, `axes` the net's symbols as numbers. `dims` has the shapes as the
    net's contract writes them, and `source` the picture's profile: both serve the messages.
    """

    net: str
    label: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    axes: Mapping[str, Axis]
    dims: Mapping[str, tuple[Dim, ...]]
    source: Profile

    @property
    def text(self) -> str:
        """What decides the shapes, as an engine's key has it: nets that know no size share their engine."""
        return " ".join(f"{symbol}={axis}" for symbol, axis in sorted(self.axes.items())) or "fixed"

    def includes(self, other: NetProfile) -> bool:
        """Whether `other` has nothing to add: tuned for the same shapes, and covering no more."""
        return all(
            self.axes[symbol].opt == axis.opt
            and self.axes[symbol].low <= axis.low
            and axis.high <= self.axes[symbol].high
            for symbol, axis in other.axes.items()
        )

    def covers(self, shapes: Shapes) -> bool:
        """Whether a call with these input shapes may use this profile."""
        return all(
            name in self.shapes
            and len(shape) == len(self.shapes[name][0])
            and all(
                a <= b <= c for a, b, c in zip(self.shapes[name][0], shape, self.shapes[name][2], strict=True)
            )
            for name, shape in shapes.items()
        )

    def distance(self, shapes: Shapes) -> float:
        """How far covered shapes are from what the profile is tuned for: sum of |log(actual / opt)|."""
        return sum(
            abs(log(actual / opt))
            for name, shape in shapes.items()
            for actual, opt in zip(shape, self.shapes[name][1], strict=True)
        )


def net_profiles(net: str, spec: NetSpec, profiles: Sequence[Profile]) -> tuple[NetProfile, ...]:
    """The optimisation profiles of one net, in the engine's order, none that another includes.

    Raises:
        PackageError: the net's contract has a symbol this release does not know.
    """
    dims = {tensor.name: tensor.shape for tensor in spec.inputs}
    symbols = {dim for shape in dims.values() for dim in shape if isinstance(dim, str)}
    expanded: list[NetProfile] = []
    for profile in profiles:
        for guided in (True, False) if net in NETS and NETS[net].in_loop else (None,):
            known = _axes(net, profile, guided=guided, vectors=not VECTORS.keys().isdisjoint(dims))
            if symbols - set(known):
                raise _unknown_symbol(net, min(symbols - set(known)), known)
            axes = {symbol: known[symbol] for symbol in symbols}
            expanded.append(
                NetProfile(
                    net=net,
                    label=_label(profile, axes, guided=guided),
                    shapes={name: _shapes(shape, axes) for name, shape in dims.items()},
                    axes=axes,
                    dims=dims,
                    source=profile,
                )
            )
    return tuple(
        mine
        for place, mine in enumerate(expanded)
        if not any(other.includes(mine) for other in expanded[:place])
        and not any(other.includes(mine) and not mine.includes(other) for other in expanded[place:])
    )


def _axes(net: str, profile: Profile, *, guided: bool | None, vectors: bool) -> dict[str, Axis]:
    """Every symbol of `spec.py` as numbers.

    `guided` is None for nets outside the loop; with `vectors` a net is called once for each row of the UNet.
    """
    width, height, pictures = profile.width, profile.height, profile.batch
    if net in NETS and NETS[net].tiled:
        width, height = (replace(axis, low=min(axis.low, SMALLEST_TILE)) for axis in (width, height))
    both = pictures * 2
    rows = replace(both, low=1)  # of both halves of guidance, or of one
    if guided is not None:
        rows = both if guided else pictures
    else:
        pictures = replace(pictures, low=1)
    chunks = -(-profile.tokens.high // _ONE_PROMPT.high)  # of the longest text: each is encoded as a row
    steps = both.opt if vectors else 1, both.high if vectors else 1
    return {
        "N": pictures,
        "B": rows,
        "E": Axis(low=1, opt=1, high=_MOST_EMBEDDINGS),
        "P": Axis(low=1, opt=_USUAL_PROMPTS, high=both.high * chunks + 1),  # and the empty text
        "S": Axis(low=1, opt=_USUAL_STEPS * steps[0], high=_MOST_STEPS * steps[1]),
        "T": profile.tokens,
        "G": Axis(low=1, opt=1, high=_MOST_PROMPTS),
        "I": Axis(low=1, opt=_USUAL_IMAGE_TOKENS, high=_MOST_IMAGE_TOKENS),
        "H": height,
        "W": width,
        "H/8": height // 8,
        "W/8": width // 8,
        **{
            level_symbol(side, level): _halved(pixels // 8, level)
            for side, pixels in (("H", height), ("W", width))
            for level in range(1, _LEVELS)
        },
    }


def _halved(axis: Axis, times: int) -> Axis:
    """An axis halved so many times, rounded up: a level of the UNet."""
    low, opt, high = (-(-size >> times) for size in (axis.low, axis.opt, axis.high))
    return Axis(low=low, opt=opt, high=high)


def _unknown_symbol(net: str, symbol: str, known: Mapping[str, Axis]) -> PackageError:
    return PackageError(
        f"the contract of the net {net!r} has the symbol {symbol!r}",
        expected=f"one of {', '.join(known)}",
        fix="Export the checkpoint again with this release: latentrt export CHECKPOINT -o PACKAGE",
    )


def _shapes(shape: tuple[Dim, ...], axes: Mapping[str, Axis]) -> tuple[Shape, Shape, Shape]:
    spans = [axes[dim] if isinstance(dim, str) else Axis(low=dim, opt=dim, high=dim) for dim in shape]
    return (
        tuple(span.low for span in spans),
        tuple(span.opt for span in spans),
        tuple(span.high for span in spans),
    )


def _label(profile: Profile, axes: Mapping[str, Axis], *, guided: bool | None) -> str:
    """What a net's profile is for, in words, from the symbols that the net has."""
    words = [
        *_pixels(axes),
        f"b{axes.get('N', profile.batch)}" if "N" in axes or guided is not None else "",
        f"{axes['P']} prompts" if "P" in axes else "",
        f"{axes['S']} {_unit(axes['S'])}" if "S" in axes else "",
        f"{axes['B']} rows" if "B" in axes and guided is None else "",
        f"{axes['T']} tokens" if axes.get("T", _ONE_PROMPT) != _ONE_PROMPT else "",
        "" if guided is None else "guided" if guided else "unguided",
    ]
    return " ".join(filter(None, words))


def _pixels(sizes: Mapping[str, Size]) -> list[str]:
    """Width and height of the picture, for people; nothing for a net that knows no size."""
    for width, height, factor in (("W/8", "H/8", 8), ("W", "H", 1)):
        if {width, height} <= set(sizes):
            return [f"{sizes[width] * factor}x{sizes[height] * factor}"]
    return []


def _unit(schedule: Axis) -> str:
    """What the symbol S counts."""
    return "steps" if schedule.high == _MOST_STEPS else "steps x rows"


def choose(
    profiles: Sequence[NetProfile],
    shapes: Shapes,
    *,
    backend: str = "tensorrt-rtx",
    package: str = "PACKAGE",
    further: Sequence[str] = (),
) -> int:
    """Which profile of an engine serves a call: of those that cover it, the one tuned for the nearest shapes.

    `profiles` are all of the engine's, in its order. The message has a command, with `backend`, `package` and
    what is `further` to be given to it.

    Raises:
        UsageError: no profile covers the shapes, with the command that builds one; or the shapes are none of
            this net's.
    """
    covering = [index for index, profile in enumerate(profiles) if profile.covers(shapes)]
    if covering and set(shapes) == set(profiles[0].dims):
        return min(covering, key=lambda index: profiles[index].distance(shapes))
    first = profiles[0]
    sizes = _sizes(first.dims, shapes)
    if sizes is None:
        raise UsageError(
            f"the net {first.net!r} was called with the shapes {dict(shapes)}",
            expected=", ".join(f"{name} ({', '.join(map(str, dims))})" for name, dims in first.dims.items()),
            fix="Check the call against the net's spec (`latentrt inspect PACKAGE`).",
        )
    labels = "; ".join(profile.label for profile in profiles)
    if "S" in sizes:  # there is no option for what it may be
        raise UsageError(
            f"a schedule has {sizes['S']} {_unit(first.axes['S'])}",
            expected=f"what engines cover: {labels}",
            fix=f"Ask for at most {_MOST_STEPS} steps: --steps {_USUAL_STEPS}.",
        )
    if sizes.get("E", 0) > _MOST_EMBEDDINGS:
        raise UsageError(
            f"prompts have {sizes['E']} embeddings beyond the vocabulary",
            expected=f"at most {_MOST_EMBEDDINGS}, which is what an engine covers",
            fix="Use fewer embeddings of textual inversion at once.",
        )
    sources = dict.fromkeys(str(profile.source) for profile in profiles)
    sources[str(_profile_for(sizes, first.source))] = None
    options = [*further, *(word for source in sources for word in ("--profile", source))]
    raise UsageError(
        f"no profile of the engine of {first.net!r} covers {_words(sizes)}",
        expected=f"what it was built for: {labels}",
        fix=f"Build one that does: {command('latentrt', 'build', package, '--backend', backend, *options)}",
    )


def _sizes(dims: Mapping[str, tuple[Dim, ...]], shapes: Shapes) -> dict[str, int] | None:
    """The value of each symbol in `shapes`; None where the shapes contradict the contract."""
    sizes: dict[str, int] = {}
    fits = set(dims) == set(shapes)
    for name, shape in shapes.items():
        expected = dims.get(name, ())
        fits = fits and len(expected) == len(shape)
        for dim, size in zip(expected, shape, strict=False):
            same = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            fits = fits and size == same >= 1
    return sizes if fits else None


def _words(sizes: Mapping[str, int]) -> str:
    """Sizes of symbols, for people."""
    words = [f"{pixels} pixels" for pixels in _pixels(sizes)]
    units = {"N": "picture", "B": "row", "P": "prompt", "T": "token"}
    counts = [(sizes[symbol], unit) for symbol, unit in units.items() if symbol in sizes]
    return ", ".join(words + [f"{count} {unit}{'s' if count > 1 else ''}" for count, unit in counts])


def _profile_for(sizes: Mapping[str, int], source: Profile) -> Profile:
    """A profile that covers `sizes`, and is `source` where they say nothing."""
    rows = sizes.get("B", sizes.get("P", 0))
    # An even number of rows is most often guidance; an engine for that many pictures would take it as well.
    pictures = sizes.get("N") or (rows // 2 if rows % 2 == 0 else rows) or source.batch.low

    def only(other: Axis, **factors: int) -> Axis:
        size = max(sizes.get(symbol, 0) * factor for symbol, factor in factors.items())
        return Axis(low=size, opt=size, high=size) if size else other

    return Profile(
        width=only(source.width, **{"W/8": 8, "W": 1}),
        height=only(source.height, **{"H/8": 8, "H": 1}),
        batch=Axis(low=pictures, opt=pictures, high=pictures),
        tokens=only(source.tokens, T=1),
    )
