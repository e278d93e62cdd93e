"""The yardstick: one network, the same in every process."""

from hashlib import sha256

import numpy as np

from latentrt.benchmarks import skeletons
from latentrt.benchmarks.sides.contract import Task
from latentrt.benchmarks.sides.yardstick import GRAPH, SIZES, SKELETON, open_yardstick
from latentrt.runtime.pipeline import SHIPPED

# Times of documents that it stands in are alike only as long as its graph is.
FROZEN = "95b5dc17080686f98afbf7d3179d42f4707185d60f505cbe49fdcddaf0817cb5"


def test_it_is_what_it_always_was() -> None:
    assert sha256((skeletons.FOLDER / SKELETON / GRAPH).read_bytes()).hexdigest() == FROZEN


def test_it_computes_the_same_finite_numbers_in_every_process() -> None:
    task = Task(package=SHIPPED["demo"], threads=1)
    one, other = (open_yardstick(task) for _ in range(2))
    found, again = one.call()["prediction"], other.call()["prediction"]
    assert found.shape == (SIZES["B"], 4, SIZES["H/8"], SIZES["W/8"])
    assert np.array_equal(found, again)
    assert 0.01 < found.std() < 100
    assert one.figures() == {"sizes": SIZES}
