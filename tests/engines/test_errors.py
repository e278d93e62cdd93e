import copy
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.sides.contract import NotAvailableError
from latentrt.engines import errors
from latentrt.runtime.pipeline import Pipeline
from latentrt.serve.jobs.refusals import RefusedError


def classes() -> dict[str, type[errors.LatentrtError]]:
    found = dict(inspect.getmembers(errors, inspect.isclass))
    return {name: kind for name, kind in found.items() if issubclass(kind, errors.LatentrtError)}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = [line.strip(" │├└─") for line in (errors.__doc__ or "").splitlines() if "Error" in line][1:]
    table = {line.split()[0]: line.split() for line in drawn}
    assert set(table) == set(classes()) - ({"LatentrtError"} - set(table))
    for name, words in table.items():
        assert str(classes()[name].exit_code) in words[:5], name


def test_a_message_has_found_expected_and_fix() -> None:
    error = errors.UsageError("a is 3", expected="b", fix="Do c.")
    assert (error.found, error.expected, error.fix) == ("a is 3", "b", "Do c.")
    assert str(error) == "a is 3; expected b. Do c."


def test_the_advice_fits_the_package() -> None:
    assert "--dtype fp32" in errors.numeric_fix("fp16")
    assert "--dtype" not in errors.numeric_fix("fp32")
    assert "damaged" in errors.numeric_fix("fp32")


# ── between processes ───────────────────────────────────────────────────────────────────────────────────


def every_class(of: type[errors.LatentrtError] = errors.LatentrtError) -> Iterator[type[Any]]:
    """Also those outside the tree's own module; the imports above bring them in."""
    yield of
    for kind in of.__subclasses__():
        yield from every_class(kind)


def made(kind: type[Any]) -> Any:
    """An error with something in all that its class takes."""
    names = inspect.signature(kind).parameters
    if "found" not in names:  # SideError
        return kind("failed", "it went")
    extra = {name: name for name in set(names) - {"found", "expected", "fix"}}
    return kind("a is 3", expected="b", fix="Do c.", **extra)


@pytest.mark.parametrize("kind", list(dict.fromkeys(every_class())), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy], ids="pcd"
)
def test_every_error_can_be_copied(kind: type[Any], again: Callable[[Any], Any]) -> None:
    error = made(kind)
    error.add_note("a note") if sys.version_info >= (3, 11) else None
    error.__cause__ = KeyError("why")
    found = again(error)
    assert type(found) is kind
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    assert isinstance(found.__cause__, KeyError)
    assert found.__cause__.args == ("why",)


def test_the_list_of_classes_is_whole() -> None:
    assert {SideError, NotAvailableError, RefusedError, errors.MemoryLimitError} <= set(every_class())


def test_a_cause_that_does_not_pickle_leaves_its_text() -> None:
    class LocalError(Exception):
        pass

    error = errors.PackageError("a", expected="b", fix="c.")
    error.__cause__ = LocalError("the library's words")
    found = pickle.loads(pickle.dumps(error))
    assert repr(found.__cause__) == repr(RuntimeError("LocalError: the library's words"))


def _draw(steps: int) -> tuple[int, ...]:
    with Pipeline.open("demo", threads=1) as pipe:
        return pipe("a red circle", num_inference_steps=steps, seed=1, output_type="np").images.shape


def test_a_wrong_parameter_arrives_from_a_process_pool_and_breaks_nothing() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        wrong, right = pool.submit(_draw, 0), pool.submit(_draw, 1)
        with pytest.raises(errors.UsageError, match="num_inference_steps") as caught:
            wrong.result()
        assert caught.value.fix
        assert right.result() == (1, 128, 128, 3)
