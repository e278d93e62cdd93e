"""Peers against ours, on one small size of the shipped model: no time counts unless the picture is ours.

diffusers is the oracle that nobody here wrote; `test_another_seed_is_another_picture` is the control.
"""

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import latentrt.demo
from latentrt.benchmarks.case import Case
from latentrt.benchmarks.likeness import difference, psnr
from latentrt.benchmarks.sides import contract
from latentrt.benchmarks.sides.contract import NotAvailableError, OpenSide, Task
from latentrt.engines.spec import Array

# diffusers' schedulers call np.array(tensor), and it announces what will move
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

DEMO = Path(latentrt.demo.__path__[0])
TASK = Task(package=DEMO / "package", checkpoint=DEMO / "checkpoint", threads=1)
# Large enough for pictures that depend on their seed: at 56x40 all unguided ones are alike, to 42 dB.
GUIDED = Case(width=96, height=72, guidance_scale=3.0, steps=4, pictures=2, sampler="dpmpp_2m")
UNGUIDED = Case(width=96, height=72, guidance_scale=1.0, steps=4, sampler="euler_a", seed=11)
CASES = {"guided": GUIDED, "unguided": UNGUIDED}
WORKLOADS = ("text_encoder", "unet", "vae_decoder", "picture")
BAR = 45.0  # dB
PEERS = ("onnxruntime", "openvino", "diffusers")


def opened(name: str) -> OpenSide:
    return contract.side(name).open_side(TASK)


def run(side: OpenSide, workload: str, case: Case) -> Mapping[str, Array]:
    prepared = side.prepare(workload, case)
    prepared.run()
    return prepared.outputs()


@pytest.fixture(scope="module")
def ours() -> Mapping[tuple[str, str], Mapping[str, Array]]:
    with closing(opened("latentrt")) as side:
        return {(w, name): run(side, w, case) for name, case in CASES.items() for w in WORKLOADS}


@pytest.fixture(scope="module", params=PEERS)
def peer(request: pytest.FixtureRequest) -> Generator[OpenSide]:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    with closing(opened(request.param)) as side:
        yield side


@pytest.mark.parametrize("name", CASES)
def test_every_output_is_ours(
    peer: OpenSide, ours: Mapping[tuple[str, str], Mapping[str, Array]], name: str
) -> None:
    for workload in WORKLOADS:
        found, wanted = run(peer, workload, CASES[name]), ours[workload, name]
        (output,) = found
        assert found[output].dtype == wanted[output].dtype, workload
        if wanted[output].dtype == np.uint8:
            assert wanted[output].std() > 10, "too flat to compare"
            assert psnr(found[output], wanted[output]) >= BAR, workload
        else:
            assert difference(output, found[output], wanted[output])["relative_l2"] <= 1e-4, workload


def test_another_seed_is_another_picture(
    peer: OpenSide, ours: Mapping[tuple[str, str], Mapping[str, Array]]
) -> None:
    for name, case in CASES.items():
        other = run(peer, "picture", replace(case, seed=case.seed + 100))["image"]
        assert psnr(other, ours["picture", name]["image"]) < 30


def test_what_is_prepared_stays_beside_something_else(peer: OpenSide) -> None:
    first, second = (peer.prepare("unet", case) for case in CASES.values())
    first.run()
    before = np.array(first.outputs()["prediction"])
    second.run()
    np.testing.assert_array_equal(first.outputs()["prediction"], before)
    first.run()
    np.testing.assert_allclose(first.outputs()["prediction"], before, atol=1e-6)


def test_it_tells_who_it_is_and_what_took_how_long(peer: OpenSide) -> None:
    assert all(isinstance(text, str) and text for text in peer.versions.values())
    assert "1" in (peer.versions.get("threads") or peer.versions["INFERENCE_NUM_THREADS"])
    assert peer.versions.get("memory_format", "channels_last") == "channels_last"
    prepared = peer.prepare("picture", UNGUIDED)
    prepared.run()
    prepared.run()
    stages = prepared.figures()["stages_s"]
    assert {"text_encoder", "unet", "vae_decoder"} <= set(stages)
    assert peer.memory() == {}


def test_other_workloads_are_not_available(peer: OpenSide) -> None:
    for workload in ("invariants", "update", "dance"):
        with pytest.raises(NotAvailableError, match=workload):
            peer.prepare(workload, GUIDED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own import
def test_compiled_outputs_are_ours(ours: Mapping[tuple[str, str], Mapping[str, Array]]) -> None:
    with closing(opened("diffusers-compile")) as side:
        test_every_output_is_ours(side, ours, "guided")
