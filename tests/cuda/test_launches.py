"""The table of launches, without counting any."""

from __future__ import annotations

import pytest

from tests.cuda import launches


def test_a_number_that_rises_is_a_change_and_so_is_one_that_falls() -> None:
    known = {"unet/nhwc": 170, "step/plain": 42, "gone/plain": 1}
    changed = launches.changes("demo", {"unet/nhwc": 171, "step/plain": 41, "new/plain": 3}, known)
    assert changed == [
        "demo gone/plain: 1 launches are recorded, None were counted",
        "demo new/plain: None launches are recorded, 3 were counted",
        "demo step/plain: 42 launches are recorded, 41 were counted",
        "demo unet/nhwc: 170 launches are recorded, 171 were counted",
    ]
    assert launches.changes("demo", known, known) == []


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    launches.print_launches(launches.environment.ROOT)
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split()[-len(launches.PACKAGES) :] == list(launches.PACKAGES)
    (unet,) = (row.split() for row in rows if row.startswith("unet/nhwc "))
    assert unet == ["unet/nhwc", *(str(launches.recorded()[name]["unet/nhwc"]) for name in launches.PACKAGES)]
