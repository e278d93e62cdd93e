"""Thousands of requests of all kinds: nothing grows, nothing is lost, and the books balance.

The server keeps little here (`KEPT`), so that what it may keep does not look like what it should not.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from latentrt import Pipeline
from latentrt.serve.jobs.bounds import Bounds
from tests.serve.live import Live, live, open_demo

REQUESTS = int(os.environ.get("LATENTRT_SOAK", "5000"))
CLIENTS = 6
KEPT = Bounds(records=128, result_bytes=2 * 2**20, result_seconds=5)
PROMPT = "a red circle on a blue background"
SAMPLERS = ("euler", "euler_a", "ddim", "dpmpp_2m")
POISON: list[dict[str, Any]] = [
    {"num_inference_steps": 0},
    {"image": "!", "strength": 0.5},
    {"nothing": 1},
    {"width": 65},
    {"loras": [{"name": "../x"}]},
]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


def resident() -> float:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Client(threading.Thread):
    """Sends its share: nine of ten wait for a picture, the rest cancel, leave, or send what is wrong."""

    def __init__(self, url: str, seed: int, share: int) -> None:
        super().__init__(daemon=True)
        self.outcomes = Counter[str]()
        self.errors: list[str] = []
        self._url, self._share, self._chance = url, share, random.Random(seed)

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            for _ in range(self._share):
                try:
                    self.outcomes[self._one(client)] += 1
                except Exception as error:
                    self.errors.append(repr(error))

    def _one(self, client: httpx.Client) -> str:
        chance, fate = self._chance, self._chance.random()
        fields: dict[str, Any] = {
            "prompt": PROMPT,
            "width": 64,
            "height": chance.choice([64, 64, 96]),
            "num_inference_steps": chance.randint(1, 3),
            "sampler": chance.choice(SAMPLERS),
            "guidance_scale": chance.choice([1.0, 5.0]),
            "seed": chance.randrange(2**32),
        }
        if fate < 0.01:
            answer = client.post("/v1/jobs", json={**fields, **chance.choice(POISON)})
            assert answer.status_code == 400, answer.text
            return "poison"
        if fate < 0.06:
            return self._cancel(client, {**fields, "num_inference_steps": 30})
        if fate < 0.11:
            return self._leave(client, fields)
        answer = client.post("/v1/jobs", json=fields, headers={"prefer": "wait=60"})
        job = answer.json()
        assert job["status"] == "completed", job
        assert job["images"][0]["seed"] == fields["seed"]
        picture = client.get(job["images"][0]["href"])
        assert picture.content.startswith(b"\x89PNG") or picture.status_code in (404, 410), "it gave room"
        return "picture"

    def _cancel(self, client: httpx.Client, fields: dict[str, Any]) -> str:
        job = client.post("/v1/jobs", json=fields).json()
        time.sleep(self._chance.random() * 0.05)
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
        return "cancel"

    def _leave(self, client: httpx.Client, fields: dict[str, Any]) -> str:
        """In the middle of its events."""
        job = client.post("/v1/jobs", json=fields).json()
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
            next(answer.iter_lines())
        return "left"


@pytest.mark.slow
def test_nothing_grows_and_nothing_is_lost(pipe: Pipeline) -> None:
    with live(pipe, bounds=KEPT) as at:
        clients = [Client(at.url, seed, REQUESTS // CLIENTS) for seed in range(CLIENTS)]
        began, samples = time.monotonic(), list[tuple[float, float]]()
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            time.sleep(0.5)
            samples.append((time.monotonic() - began, resident()))
        outcomes = sum((client.outcomes for client in clients), Counter[str]())
        assert [error for client in clients for error in client.errors] == []
        assert outcomes.total() == REQUESTS // CLIENTS * CLIENTS
        assert min(outcomes[name] for name in ("picture", "cancel", "left", "poison")) > 0
        _books_balance(at, outcomes)
        later = np.array(samples[len(samples) // 4 :])  # arenas, pools and caches have their size by then
        slope = float(np.polyfit(later[:, 0] / 60, later[:, 1], 1)[0])
        grown = f"{later[0, 1]:.1f} to {later[-1, 1]:.1f} MiB, {slope:.2f} a minute"
        print(f"{dict(outcomes)} in {samples[-1][0]:.0f} s; {grown}")
        assert slope < 1.0, samples


def _books_balance(at: Live, outcomes: Counter[str]) -> None:
    until = time.monotonic() + 60
    while at.server.jobs.counts().queued + at.server.jobs.counts().running:
        assert time.monotonic() < until, at.server.jobs.counts()
        time.sleep(0.01)
    counts = at.server.jobs.counts()
    assert counts.accepted == outcomes.total() - outcomes["poison"]
    assert counts.accepted == counts.completed + counts.failed + counts.cancelled
    assert counts.failed == 0
    assert counts.cancelled <= outcomes["cancel"]
    assert at.server.queue.load.jobs == 0
    counted = {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(at.client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "latentrt_requests_total"
    }
    assert counted == {"completed": counts.completed, "failed": 0, "cancelled": counts.cancelled}
    assert at.server.jobs.records <= 128
