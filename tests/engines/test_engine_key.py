import json
from dataclasses import fields, replace
from typing import Any

import pytest

from latentrt.engines.store.key import EngineKey, canonical_sha256, miss_reason
from tests.engines.engine_keys import KEY, OTHER

FIELDS = [item.name for item in fields(EngineKey)]


def changed(name: str) -> EngineKey:
    return replace(KEY, **{name: OTHER[name]})


def test_a_key_holds_at_least_the_twelve_fields_and_the_tests_know_all() -> None:
    assert len(FIELDS) >= 12
    assert set(FIELDS) == set(OTHER)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_changes_the_digest_and_is_named(name: str) -> None:
    other = changed(name)
    assert other.digest != KEY.digest
    assert KEY.differences(other) == other.differences(KEY) == (name,)


def test_json_round_trip_keeps_the_digest() -> None:
    again = EngineKey.from_json(json.loads(json.dumps(KEY.to_json())))
    assert again == KEY
    assert again.digest == KEY.digest == canonical_sha256(KEY.to_json())


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type_is_refused(name: str) -> None:
    wrong: Any
    for wrong in (None, 1.5, True, -1, "two\nlines", ["a"], (1,), {}):
        with pytest.raises(ValueError, match=name):
            replace(KEY, **{name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("net", ""),
        ("graph", ""),
        ("weights", "ABC"),
        ("weights", KEY.weights.upper()),
        ("dtype", "int8"),
        ("backend", "tvm"),
        ("flags", ("STRIP_PLAN", "REFIT_INDIVIDUAL")),
        ("flags", ("REFIT_INDIVIDUAL", "REFIT_INDIVIDUAL")),
    ],
)
def test_an_impossible_value_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=name):
        replace(KEY, **{name: wrong})


@pytest.mark.parametrize(
    "data",
    [
        {},
        {**KEY.to_json(), "more": 1},
        {**KEY.to_json(), "profiles": "512x512"},
        {**KEY.to_json(), "flags": None},
        {**KEY.to_json(), "dtype": "x"},
        [],
        None,
    ],
)
def test_other_json_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="is out of range or of the wrong type"):
        EngineKey.from_json(data)


@pytest.mark.parametrize("data", [float("nan"), object(), {"a": b"bytes"}])
def test_what_json_cannot_express_has_no_hash(data: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical_sha256(data)


def test_a_reason_shows_both_values_and_only_what_differs_of_a_list() -> None:
    near = replace(changed("backend_version"), profiles=OTHER["profiles"], weights="")
    assert miss_reason(KEY, [near]) == (
        f"the nearest engine, of unet, differs in weights (none there, {KEY.weights[:12]}… here),"
        " backend_version (1.7.1 there, 1.6.0 here), profiles (1024x1024:b1 there, 768x768:b1 here)"
    )
    swapped = replace(KEY, profiles=KEY.profiles[::-1])
    assert "768x768:b1 512x512:b1-4 there, 512x512:b1-4 768x768:b1 here" in miss_reason(KEY, [swapped])
    assert f"gpu ({'x' * 59}… there" in miss_reason(KEY, [replace(KEY, gpu="x" * 99)])


def test_the_nearest_engine_explains_a_miss() -> None:
    far = replace(changed("backend_version"), driver="any")
    assert "driver" not in miss_reason(KEY, [far, changed("backend_version")])
    unrelated = replace(changed("net"), graph=OTHER["graph"])
    elsewhere = replace(changed("backend"), graph=OTHER["graph"])
    none = "no engine of unet for tensorrt-rtx has been built yet"
    assert miss_reason(KEY, [unrelated, elsewhere]) == miss_reason(KEY, []) == none
