"""The server without a network: pictures are those of a pipeline alone, whatever happens beside them."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt import Pipeline, UsageError
from latentrt.serve.jobs.bounds import Bounds
from latentrt.serve.jobs.job import ANYONE, Job
from latentrt.serve.jobs.refusals import RefusedError, TooLargeError
from latentrt.serve.order import Order, Output, Previews, seeds_of
from latentrt.serve.server import RESTARTS, Options, Server, UnknownModelError

PROMPT = "a red circle on a blue background"
VALUES: dict[str, Any] = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open(backend="onnxruntime", device="cpu") as opened:
        yield opened


@pytest.fixture
def server(pipe: Pipeline) -> Iterator[Server]:
    made = Server({"demo": pipe}, options=Options(rows=8))
    made.start()
    yield made
    made.end(0)


def order(*, seed: int = 1, count: int = 1, **changes: Any) -> Order:
    own = {name: changes.pop(name) for name in ("output", "previews", "model") if name in changes}
    return Order(**{"model": "demo", "values": {**VALUES, **changes}, "seeds": seeds_of(seed, count), **own})


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def ended(server: Server, job: Job, owner: str = ANYONE) -> Job:
    until(lambda: server.jobs.get(job.id, owner).ended is not None)
    return server.jobs.get(job.id, owner)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["unclip-tiny", "inpaint-tiny"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_models_that_draw_nothing_without_a_picture(
    tmp_path_factory: pytest.TempPathFactory, recipe: str
) -> None:
    from tests.parity_pair import blob, exported, photo

    package = exported(tmp_path_factory, recipe) / "package"
    with Pipeline.open(package, backend="onnxruntime", device="cpu") as pipe:
        server = Server({"demo": pipe})
        server.start()
        values = {"prompt": PROMPT, "num_inference_steps": 2, "image": photo(64, 64)}
        if recipe != "unclip-tiny":
            values["mask_image"] = blob(64, 64)
        try:
            job = server.submit(ANYONE, Order(model="demo", values=values, seeds=(3,)))
            (picture,) = ended(server, job).pictures
        finally:
            server.end(0)
        wanted = np.asarray(pipe(**values, seed=3).images[0])
        np.testing.assert_array_equal(pixels(picture.data), wanted)


def test_pictures_are_those_of_a_pipeline(server: Server, pipe: Pipeline) -> None:
    orders = [
        order(seed=1, count=3),
        order(seed=5, sampler="euler_a", num_inference_steps=7),
        order(seed=9, guidance_scale=1.0, width=96),
    ]
    jobs = [server.submit(ANYONE, one) for one in orders]
    for one, job in zip(orders, jobs, strict=True):
        done = ended(server, job)
        assert done.state == "completed", done.error
        assert sorted(picture.index for picture in done.pictures) == list(range(len(one.seeds)))
        for picture in done.pictures:
            wanted = pipe(**{**one.values, "seed": picture.seed}).images[0]
            np.testing.assert_array_equal(pixels(picture.data), np.asarray(wanted))
            assert picture.made["seed"] == picture.seed == one.seeds[picture.index]
            assert f"Seed: {picture.seed}" in picture.infotext
            assert set(picture.seconds) >= {"text_encoder", "unet", "vae_decoder"}
    kinds = [event.kind for event in ended(server, jobs[1]).log.after(0).events]
    assert kinds[0] == "queued"
    assert kinds[-2:] == ["image", "completed"]


def test_steps_and_previews_are_told(server: Server) -> None:
    job = server.submit(ANYONE, order(num_inference_steps=30, previews=Previews(every=2)))
    told: dict[str, list[Any]] = {"step": [], "preview": []}
    number = 0
    while not (reading := job.log.after(number)).ended:
        for event in reading.events:
            number = event.number
            if event.kind in told:
                told[event.kind].append(event.data)
        time.sleep(0.002)
    assert {step["total"] for step in told["step"]} == {30}
    assert [step["index"] for step in told["step"]] == sorted({step["index"] for step in told["step"]})
    assert told["preview"]
    assert all(preview["step"] % 2 for preview in told["preview"])
    assert told["preview"][0]["media_type"] == "image/jpeg"


def test_other_formats(server: Server) -> None:
    done = ended(server, server.submit(ANYONE, order(output=Output(format="webp", metadata=False))))
    (picture,) = done.pictures
    assert picture.media_type == "image/webp"
    assert Image.open(io.BytesIO(picture.data)).format == "WEBP"
    failed = ended(server, server.submit(ANYONE, order(output=Output(format="png", quality=1000))))
    assert failed.error is not None


def test_a_running_job_is_cancelled_within_a_step(server: Server) -> None:
    job = server.submit(ANYONE, order(num_inference_steps=150))
    until(lambda: any(event.kind == "step" for event in job.log.after(0).events))
    other = server.submit(ANYONE, order(seed=3))
    server.jobs.cancel(job.id, ANYONE)
    done = ended(server, job)
    assert done.state == "cancelled"
    assert not done.pictures
    assert ended(server, other).state == "completed"
    until(lambda: not server.workers["demo"].busy)


def test_a_deadline_passes_while_it_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.paces["demo"], "seconds", lambda *_: None)  # else it is refused at once
    job = server.submit(ANYONE, order(num_inference_steps=150), timeout_s=0.2)
    done = ended(server, job)
    assert done.error is not None
    assert done.error.type == "deadline"


def test_a_picture_that_fails_leaves_the_others(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = server.workers["demo"].pipe
    whole = pipe.shared

    def shared(values: Any, **options: Any) -> Any:
        if values["seed"] == 2:
            raise ZeroDivisionError("/secret/path")
        return (yield from whole(values, **options))

    monkeypatch.setattr(pipe, "shared", shared)
    done = ended(server, server.submit(ANYONE, order(seed=1, count=3)))
    assert done.state == "completed"
    assert sorted(picture.seed for picture in done.pictures) == [1, 3]
    failed = ended(server, server.submit(ANYONE, order(seed=2)))
    assert failed.error is not None
    assert failed.error.type == "internal"
    assert "secret" not in str(failed.error)


def test_what_is_wrong_is_refused_before_it_waits(pipe: Pipeline) -> None:
    server = Server({"demo": pipe}, Bounds(jobs=2, request_steps=20))
    with pytest.raises(UsageError, match="num_inference_steps is 0"):
        server.submit(ANYONE, order(num_inference_steps=0))
    for changes, words in (
        ({"num_inference_steps": 21}, "21 steps"),
        ({"width": 4096, "height": 4096}, "pixels a picture"),
        ({"count": 11}, "11 pictures"),
    ):
        with pytest.raises(TooLargeError, match=words):
            server.submit(ANYONE, order(**changes))
    server.submit(ANYONE, order())
    server.submit(ANYONE, order())
    with pytest.raises(RefusedError, match="the queue is full"):
        server.submit(ANYONE, order())
    assert server.health == "starting"
    server.end(0)
    assert server.jobs.counts().cancelled == 2
    assert server.health == "draining"


def test_names_of_models(pipe: Pipeline) -> None:
    one = Server({"demo": pipe})
    assert one.find(None).model == one.find("gpt-image-1").model == "demo"
    strict = Server({"demo": pipe}, options=Options(strict_models=True))
    several = Server({"demo": pipe, "other": pipe})
    assert several.find("other").model == "other"
    for server in (strict, several):
        with pytest.raises(UnknownModelError, match="no model 'gpt-image-1' is served; expected one of demo"):
            server.find("gpt-image-1")


def test_several_models_draw_their_own_jobs(pipe: Pipeline) -> None:
    server = Server({"demo": pipe, "other": pipe}, options=Options(rows=2))
    server.start()
    try:
        jobs = [
            server.submit(ANYONE, order(seed=seed, model=("demo", "other")[seed % 2])) for seed in range(6)
        ]
        assert {ended(server, job).state for job in jobs} == {"completed"}
    finally:
        server.end(1)


def test_a_worker_that_dies_fails_its_jobs_and_is_started_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = server.workers["demo"]
    turn = worker._turn  # pyright: ignore[reportPrivateUsage]

    def dying(shared: Any) -> None:
        if len(shared):
            raise SystemExit
        turn(shared)

    assert server.health == "ready"
    monkeypatch.setattr(worker, "_turn", dying)
    jobs = [server.submit(ANYONE, order(num_inference_steps=100)) for _ in range(8)]
    for job in jobs:
        error = ended(server, job).error
        assert error is not None
        assert "has ended" in error.found
    until(lambda: not worker.alive)
    assert server.health == "unhealthy"
    monkeypatch.undo()
    server.look()
    assert server.health == "ready"
    assert ended(server, server.submit(ANYONE, order())).state == "completed"
    server.restarts["demo"] = RESTARTS
    worker.end()
    server.look()
    assert server.health == "unhealthy", "it is not started for ever"


def test_the_end_waits_for_what_runs_and_cancels_the_rest(pipe: Pipeline) -> None:
    server = Server({"demo": pipe}, options=Options(rows=2, at_once=1))
    server.start()
    short, long = server.submit(ANYONE, order()), server.submit(ANYONE, order(num_inference_steps=150))
    ending = threading.Thread(target=server.end, args=(60,))
    ending.start()
    assert ended(server, short).state == "completed"
    until(lambda: server.queue.draining)
    with pytest.raises(RefusedError, match="about to end"):
        server.submit(ANYONE, order())
    server.jobs.cancel(long.id, ANYONE)
    ending.join(60)
    assert not ending.is_alive()
    assert not server.workers["demo"].alive


def test_rows_are_measured_when_it_starts(pipe: Pipeline) -> None:
    server = Server({"demo": pipe})
    server.start()
    try:
        assert server.workers["demo"].rows in (2, 4, 8, 16)
        assert server.paces["demo"].seconds_per_pixel_step is not None
    finally:
        server.end(0)


def test_rows_may_be_of_one_number(pipe: Pipeline) -> None:
    """What the UNet is called with has all of them, and pictures are those of requests alone."""
    server = Server({"demo": pipe}, options=Options(rows=4, sizes=(4,)))
    server.start()
    try:
        net = pipe.loop.net("unet")  # pyright: ignore[reportAttributeAccessIssue]
        seen: set[int] = set()

        class Counted:
            """The net, and how many rows it is given."""

            def __call__(self, **inputs: Any) -> Any:
                seen.add(len(inputs["latent"]))
                return net(**inputs)

            def __getattr__(self, name: str) -> Any:
                return getattr(net, name)

        nets: Any = pipe.loop.nets
        nets["unet"] = Counted()
        try:
            jobs = [server.submit(ANYONE, order(seed=seed)) for seed in range(3)]
            done = [ended(server, job) for job in jobs]
        finally:
            nets["unet"] = net
        assert seen == {4}
    finally:
        server.end(0)
    for seed, job in enumerate(done):
        wanted = pipe(**VALUES, seed=seed).images[0]
        np.testing.assert_array_equal(pixels(job.pictures[0].data), np.asarray(wanted))


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_cancels_at_any_moment(server: Server, count: int) -> None:
    """Each ends with the step that runs, and once; what is drawn beside it and afterwards is drawn."""
    chance, turns, ends = random.Random(18), list[tuple[float, float]](), dict[str, float]()
    server.workers["demo"].turns.append(
        lambda _, seconds: turns.append((time.perf_counter() - seconds, time.perf_counter()))
    )
    server.jobs.watch(lambda job: ends.update({job.id: time.perf_counter()}) if job.ended else None)
    neighbours: list[Job] = []
    late: list[float] = []
    for number in range(count):
        if number % 3 == 0:
            neighbours.append(server.submit(ANYONE, order(seed=number)))
        job = server.submit(ANYONE, order(seed=number, num_inference_steps=150))
        time.sleep(0.03 * chance.random())
        asked = time.perf_counter()
        server.jobs.cancel(job.id, ANYONE)
        assert ended(server, job).state == "cancelled"
        ran = [end for _, end in turns if asked < end <= ends[job.id]]
        assert len(ran) <= 1, "a step began after the one that ran"
        late.append(ends[job.id] - max([asked, *ran]))
    assert {ended(server, one).state for one in neighbours} == {"completed"}
    assert ended(server, server.submit(ANYONE, order())).state == "completed"
    counts = server.jobs.counts()
    assert (counts.cancelled, counts.completed) == (count, len(neighbours) + 1)
    assert counts.accepted == counts.cancelled + counts.completed
    print(f"behind the step: median {1000 * sorted(late)[count // 2]:.2f} ms, most {1000 * max(late):.2f} ms")
    if count == 300:  # the others run beside other tests
        assert max(late) < 0.05
