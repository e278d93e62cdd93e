"""What goes from one process to another: requests and results do, whatever holds open nets does not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from latentrt.runtime import Pipeline

AGAIN = [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy]


@pytest.mark.parametrize("again", AGAIN, ids=["pickle", "copy"])
@pytest.mark.parametrize("kind", ["pil", "np", "latent"])
def test_requests_and_results_travel(kind: str, again: Callable[[Any], Any]) -> None:
    with Pipeline.open("demo", threads=1) as pipe:
        result = pipe(["a red circle", "a star"], num_inference_steps=1, seed=[1, 2], output_type=kind)
    found = again(result)
    assert found.record(1) == result.record(1)
    assert found.infotext() == result.infotext()
    assert found.request.seeds == result.request.seeds
    assert found.seconds == result.seconds
    for one, other in zip(found.images, result.images, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
