"""Which data are not rounded because of what becomes of their errors: found in groups, as one by one."""

from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.onnxruntime.lowering.files import open_as_written
from latentrt.engines.package import Package
from latentrt.engines.tolerances import relative_l2
from latentrt.export.quantised.formats import FORMATS
from latentrt.export.quantised.inputs import SEEN, drawn_pictures
from latentrt.export.quantised.ranges import Inputs
from latentrt.export.quantised.rounding import Rounding
from latentrt.export.quantised.sensitivity import MOST_SHARE, _Probe, culprits, without_sensitive
from latentrt.export.quantised.write import plan, write_rounded
from latentrt.runtime.model import SHIPPED

DEMO = Package.open(SHIPPED["demo"])


@cache
def calls() -> list[Inputs]:
    return [call for picture in drawn_pictures(DEMO, SEEN[:2]) for call in picture.calls]


@given(st.lists(st.floats(0, 1).map(lambda error: round(error, 6)), max_size=40), st.floats(0.02, 0.9))
def test_those_above_the_share_are_found_whatever_the_others_are(errors: list[float], share: float) -> None:
    """The squares of these errors add up."""
    squares = {str(index): error**2 for index, error in enumerate(errors)}

    def error_of(names: Collection[str]) -> float:
        return sum(squares[name] for name in names) ** 0.5

    total = sum(squares.values())
    found = culprits(list(squares), error_of, share)
    wanted = {name for name, square in squares.items() if square > share * total * (1 + 1e-9)}
    nearly = {name for name, square in squares.items() if square > share * total * (1 - 1e-9)}
    assert wanted <= found <= nearly if len(squares) > 1 else not found


def test_few_runs_find_one_among_many() -> None:
    asked: list[int] = []

    def error_of(names: Collection[str]) -> float:
        asked.append(len(names))
        return 1.0 if "123" in names else 0.01

    assert culprits([str(index) for index in range(200)], error_of, 0.1) == {"123"}
    assert len(asked) < 20


def test_nothing_is_sensitive_where_nothing_is_wrong() -> None:
    assert culprits(["a", "b"], lambda _: 0.0, 0.1) == frozenset()


@pytest.fixture(scope="module")
def rounding() -> Rounding:
    """Every place is rounded, as if none were sensitive."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("latentrt.export.quantised.write.without_sensitive", lambda *four: four[2])
        return plan(DEMO, FORMATS["int8"], calls())


def alone(rounding: Rounding, name: str, folder: Path) -> float:
    """The error of a package whose UNet has the products of some data rounded, weights and all."""
    places = tuple(place for place in rounding.places if place.data == name)
    divided = {key: factor for key, factor in rounding.divided.items() if key == name}
    one = replace(rounding, places=places, data={name: rounding.data[name]}, divided=divided)
    session = open_as_written(write_rounded(DEMO, folder, one), "unet")
    found = [session.run(["prediction"], dict(call))[0] for call in calls()[:3]]
    return relative_l2(np.stack(found), np.stack(wanted()))


def wanted() -> list[np.ndarray]:
    session = open_as_written(DEMO, "unet")
    return [session.run(["prediction"], dict(call))[0] for call in calls()[:3]]


def test_what_is_left_out_is_what_packages_with_one_rounded_place_say(
    rounding: Rounding, tmp_path: Path
) -> None:
    less = without_sensitive(DEMO, "unet", rounding, calls()[:3])
    gone = rounding.data.keys() - less.data.keys()
    assert gone, "the demo's last shortcut"
    assert {place.data for place in less.places} == less.data.keys()
    assert set(less.divided) <= less.data.keys()
    assert len(less.left_out) == len(rounding.left_out) + len(rounding.places) - len(less.places)
    probe = _Probe(DEMO, "unet", rounding, calls()[:3])
    total = probe.error(rounding.data) ** 2
    assert probe.error(gone) ** 2 > 0.5 * total, "most of the error"
    some = [*gone, *rounding.divided, *list(less.data)[::9]]
    for number, name in enumerate(some):
        (tmp_path / str(number)).mkdir()
        error = alone(rounding, name, tmp_path / str(number))
        assert (error**2 > MOST_SHARE * total) == (name in gone), name
    assert probe.error(less.data) < 0.7 * total**0.5


def test_smoothed_data_are_probed_as_they_will_be_rounded(rounding: Rounding) -> None:
    """With a step fifty times as large they are much further off."""
    name = next(iter(rounding.divided))
    places = tuple(place for place in rounding.places if place.data == name)
    one = replace(rounding, places=places, data={name: rounding.data[name]})
    smooth = _Probe(DEMO, "unet", one, calls()[:1]).error([name])
    assert smooth > 0
    rough = replace(one, divided={name: 50 * one.divided[name]})
    assert _Probe(DEMO, "unet", rough, calls()[:1]).error([name]) > 10 * smooth
