"""How much of a long random or exhaustive test runs: a tenth by default, all of it in the slow tests."""

import pytest

EVERY_TENTH = pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])


def a_tenth_of(count: int) -> pytest.MarkDecorator:
    """Run a test with `count` = a tenth of the number; its slow twin with all of it."""
    return pytest.mark.parametrize("count", [count // 10, pytest.param(count, marks=pytest.mark.slow)])
