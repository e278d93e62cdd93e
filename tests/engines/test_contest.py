"""Which backend draws the fastest on the host: measured, remembered, and taken by "auto"."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from latentrt.engines.backends import BACKENDS
from latentrt.engines.contest import fastest
from latentrt.engines.contest.fastest import HOSTS, Standing, fastest_host, hosts_of, standing
from latentrt.engines.contest.hosts import measure_hosts, open_net
from latentrt.engines.errors import BackendError
from latentrt.engines.package import Package
from latentrt.engines.spec import DTYPES, output_shapes
from latentrt.engines.store.engine_store import EngineStore
from latentrt.engines.tolerances import PICTURE_DB, decibels
from latentrt.engines.tuning import runs
from latentrt.runtime.loop import open as loops
from latentrt.runtime.loop.open import LoopOptions, open_loop
from latentrt.runtime.model import SHIPPED
from latentrt.runtime.pipeline import Pipeline

pytest.importorskip("openvino")

DEMO = Package.open(SHIPPED["demo"])


class Clock:
    """The real one, and what was slept through: a loaded machine takes milliseconds, the sleepers seconds."""

    def __init__(self) -> None:
        self.slept = 0.0

    def perf_counter(self) -> float:
        return perf_counter() + self.slept


CLOCK = Clock()


class Sleeper:
    """A net that takes a while, by the clock above, for outputs that are all alike."""

    def __init__(self, package: Package, net: str, seconds: float, value: float = 1.0) -> None:
        self.spec = package.manifest.nets[net].spec
        self.seconds, self.value, self.closed = seconds, value, 0

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        CLOCK.slept += self.seconds
        shapes = output_shapes(self.spec, {name: array.shape for name, array in arrays.items()})
        return {
            item.name: np.full(shapes[item.name], self.value, DTYPES[item.dtype])
            for item in self.spec.outputs
        }

    def close(self) -> None:
        self.closed += 1


class Opener:
    """Opens sleepers: (seconds, value) by backend."""

    def __init__(self, **sleepers: tuple[float, float]) -> None:
        self.sleepers = sleepers
        self.opened: list[Sleeper] = []

    def __call__(self, backend: str, package: Package, net: str) -> Any:
        self.opened.append(Sleeper(package, net, *self.sleepers[backend]))
        return self.opened[-1]


def time_sleepers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one sample of each net, by the clock above."""
    monkeypatch.setattr(runs, "LONG", 0.0)
    monkeypatch.setattr(runs, "time", CLOCK)


FASTER = {"onnxruntime": (30, 1.0), "openvino": (3, 1.0)}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineStore:
    """The user's own."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "store"))
    time_sleepers(monkeypatch)
    return EngineStore()


def test_the_faster_one_is_remembered(store: EngineStore) -> None:
    assert fastest_host(DEMO) is None
    opener = Opener(**FASTER)
    found = measure_hosts(DEMO, store, rounds=2, opened=opener)
    assert [item.net for item in found] == ["unet", "vae_decoder"]
    assert [net.closed for net in opener.opened] == [1] * 4
    winner = fastest_host(DEMO)
    assert winner is not None
    assert winner == fastest_host(DEMO, store)
    assert winner.name == "openvino"
    assert winner.milliseconds["openvino"] < winner.milliseconds["onnxruntime"]
    assert winner.reason.startswith("a picture takes ")
    again = measure_hosts(DEMO, store, opened=Opener())
    assert [item.why for item in again] == ["", ""], "nothing is opened"


def test_each_backend_for_real_draws_the_same(store: EngineStore) -> None:
    found = measure_hosts(DEMO, store, rounds=1)
    for item in found:
        assert item.entry.facts["rejected"] == {}
        assert set(item.entry.facts["milliseconds"]) == set(HOSTS)
        assert 0 < item.entry.facts["relative_l2"]["openvino"] < 1e-4


def test_one_that_computes_something_else_is_out(store: EngineStore) -> None:
    opener = Opener(**{**FASTER, "openvino": (3, 2.0)})
    found = measure_hosts(DEMO, store, rounds=1, opened=opener)
    assert all("relative L2" in item.entry.facts["rejected"]["openvino"] for item in found)
    winner = fastest_host(DEMO)
    assert winner is not None
    assert (winner.name, list(winner.milliseconds)) == ("onnxruntime", ["onnxruntime"])


def test_other_releases_and_layouts_are_measured_anew(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_hosts(DEMO, store, rounds=1, opened=Opener(**FASTER))
    for name, value in (("version", lambda _: "2027.1"), ("known_layout", lambda *_: "winograd")):
        with monkeypatch.context() as patched:
            patched.setattr(fastest, name, value)
            assert fastest_host(DEMO) is None
    assert fastest_host(replace(DEMO, manifest=replace(DEMO.manifest, dtype="fp16"))) is None


def test_whatever_is_wrong_with_the_store_is_no_error(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_hosts(DEMO, store, rounds=1, opened=Opener(**FASTER))
    for entry in (store.root / "engines").iterdir():
        (entry / "engine.bin").write_bytes(b"")
    assert fastest_host(DEMO) is None

    def gone(_: str) -> str:
        raise ModuleNotFoundError("openvino")

    monkeypatch.setattr(fastest, "version", gone)
    assert fastest_host(DEMO) is None


@pytest.mark.parametrize(
    ("onnxruntime", "openvino", "backend"),
    [
        ((100, 500), (90, 505), "openvino"),  # of a picture of 20 steps 2.5 s against 2.3 s
        ((100, 500), (99.5, 500), "onnxruntime"),  # within the margin the simpler one
        ((100, 500), (110, 400), "onnxruntime, vae_decoder on openvino"),
        ((90, 600), (100, 500), "onnxruntime, vae_decoder on openvino"),
        ((100, 400), (90, 500), "openvino, vae_decoder on onnxruntime"),
        ((100, 500), (110, 478), "onnxruntime"),  # another library for less than a hundredth of a picture
        ((100, 500), (None, 1), "onnxruntime, vae_decoder on openvino"),
        ((100, 500), (99.5, None), "onnxruntime"),
    ],
)
def test_a_picture_is_what_counts(
    onnxruntime: tuple[float, float], openvino: tuple[float | None, float | None], backend: str
) -> None:
    defaults = replace(DEMO.manifest.defaults, num_inference_steps=20)
    package = replace(DEMO, manifest=replace(DEMO.manifest, defaults=defaults))
    facts: dict[str, Mapping[str, Any]] = {}
    for index, net in enumerate(("unet", "vae_decoder")):
        times = {"onnxruntime": onnxruntime[index], "openvino": openvino[index]}
        facts[net] = {"milliseconds": {name: took for name, took in times.items() if took is not None}}
    found = standing(package, facts)
    assert found.name == backend
    assert (" on " in backend) == (len(set(found.nets.values())) == 2) == (backend not in HOSTS)
    assert found.name in found.milliseconds
    assert found.milliseconds["onnxruntime"] == 20 * onnxruntime[0] + onnxruntime[1]


# ── packages in fewer bits ───────────────────────────────────────────────────────────────────────────


ROUNDED = replace(DEMO, manifest=replace(DEMO.manifest, quantised={"format": "int8", "relative_l2": 0.01}))
COARSE = "openvino-bf16"


def test_who_may_draw_what(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, wanted in ((True, (*HOSTS, COARSE)), (False, HOSTS)):
        monkeypatch.setattr(fastest, "multiplies_bfloat16", lambda there=there: there)
        assert hosts_of(DEMO) == HOSTS == ("onnxruntime", "openvino")
        assert hosts_of(ROUNDED) == wanted


@pytest.mark.parametrize(("value", "winner"), [(1.03, COARSE), (1.04, f"openvino, vae_decoder on {COARSE}")])
def test_bfloat16_has_its_own_bar_beside_the_packages(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch, value: float, winner: str
) -> None:
    """The UNet's is 0.015 + 0.02; the decoder's outputs are all alike."""
    monkeypatch.setattr(fastest, "multiplies_bfloat16", lambda: True)

    class OfUNets(Opener):
        def __call__(self, backend: str, package: Package, net: str) -> Any:
            opened = super().__call__(backend, package, net)
            opened.value = opened.value if net == "unet" else 1.0
            return opened

    opener = OfUNets(**FASTER, **{COARSE: (1, value)})
    measure_hosts(ROUNDED, store, rounds=1, opened=opener)
    found = fastest_host(ROUNDED)
    assert found is not None
    assert found.name == winner
    monkeypatch.setattr(fastest, "multiplies_bfloat16", lambda: False)
    assert fastest_host(ROUNDED) is None, "without it, it is another contest"


# ── "auto" ───────────────────────────────────────────────────────────────────────────────────────────

TIMES = {"onnxruntime": 9000.0, "openvino": 8000.0}
WINNER = Standing(nets=dict.fromkeys(("unet", "vae_decoder"), "openvino"), milliseconds=TIMES)
MIXED = {"unet": "openvino", "vae_decoder": "onnxruntime"}


def description(options: LoopOptions) -> str:
    loop, text = open_loop(DEMO, options)
    loop.close()
    return text


def test_auto_takes_what_was_measured_and_says_why(store: EngineStore, logged: list[str]) -> None:
    assert description(LoopOptions()).startswith("onnxruntime ")
    measure_hosts(DEMO, store, rounds=1, opened=Opener(**FASTER))
    assert description(LoopOptions()).startswith("openvino ")
    assert any("auto takes openvino in place of onnxruntime: a picture takes " in line for line in logged)
    assert description(LoopOptions(backend="onnxruntime")).startswith("onnxruntime ")


def test_auto_without_it_draws_all_the_same(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    monkeypatch.setattr(fastest, "fastest_host", lambda _: WINNER)
    gone = BackendError("openvino is not installed", expected="it", fix="Install it.")
    kind = type(BACKENDS["openvino"].load())
    with monkeypatch.context() as patched:
        patched.setattr(kind, "refusal", lambda _: gone)
        assert description(LoopOptions()).startswith("onnxruntime ")
        assert "openvino was measured to be faster and cannot run any more: openvino is not" in str(logged)

    def fails(*_: object, **__: object) -> Any:
        raise BackendError("it does not compile", expected="it", fix="Leave it.")

    monkeypatch.setattr(kind, "open_net", fails)
    assert description(LoopOptions()).startswith("onnxruntime ")
    assert "openvino does not open: it does not compile" in str(logged)


def test_each_net_is_where_it_is_the_fastest(store: EngineStore, logged: list[str]) -> None:
    class ByNet(Opener):
        def __call__(self, backend: str, package: Package, net: str) -> Any:
            opened = super().__call__(backend, package, net)
            opened.seconds = 1 if MIXED[net] == backend else 10
            return opened

    measure_hosts(DEMO, store, rounds=1, opened=ByNet(**FASTER))
    loop, text = open_loop(DEMO, LoopOptions())
    with closing(loop):
        assert text.startswith("openvino ")
        assert "; vae on onnxruntime " in text
        assert any("auto takes openvino, vae_decoder on onnxruntime in place of" in line for line in logged)
        assert loop.fixed_shapes
        for net, backend in {**MIXED, "vae_encoder": "onnxruntime", "text_encoder": "openvino"}.items():
            assert backend in type(loop.net(net)).__module__


def test_a_mixture_draws_the_same_picture(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"prompt": "a green square", "num_inference_steps": 4, "seed": 3, "output_type": "np"}
    with Pipeline.open("demo", backend="onnxruntime") as pipe:
        usual = pipe(**wanted).images
    mixed = Standing(nets=MIXED, milliseconds=TIMES)
    monkeypatch.setattr(fastest, "fastest_host", lambda _: mixed)
    with Pipeline.open("demo") as pipe:
        assert pipe.backend.startswith("openvino ")
        assert decibels(pipe(**wanted).images, usual) > PICTURE_DB["fp32"]


def test_a_mixture_of_which_one_cannot_run_any_more(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    gone = BackendError("openvino is not installed", expected="it", fix="Install it.")
    kind = type(BACKENDS["openvino"].load())
    monkeypatch.setattr(kind, "refusal", lambda _: gone)
    for nets in (MIXED, {"unet": "onnxruntime", "vae_decoder": "openvino"}):
        mixed = Standing(nets=nets, milliseconds=TIMES)
        monkeypatch.setattr(fastest, "fastest_host", lambda _, mixed=mixed: mixed)
        assert description(LoopOptions()) == BACKENDS["onnxruntime"].load().describe()
        assert f"{mixed.name} was measured to be faster and cannot run any more" in str(logged)


def test_what_is_on_a_gpu_is_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "fastest_host", lambda _: WINNER)
    engine: Any = object()
    assert loops._measured(DEMO, "onnxruntime-cuda", engine, {}) == ("onnxruntime-cuda", engine)


def test_nets_are_opened_by_the_backend_of_that_name() -> None:
    for name in HOSTS:
        with_it: Any = open_net(name, DEMO, "unet_time")
        assert name in type(with_it).__module__
        with_it.close()
