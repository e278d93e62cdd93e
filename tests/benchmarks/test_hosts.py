"""What a server in between costs: beside a real one of this process, with others' pictures, and none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from latentrt import Pipeline
from latentrt.benchmarks import words
from latentrt.benchmarks.case import Case
from latentrt.benchmarks.load.callers import CALLERS, OpenAICaller, TritonCaller
from latentrt.benchmarks.records import Document
from latentrt.benchmarks.report.reading import Result
from latentrt.benchmarks.report.tables import full_tables
from latentrt.benchmarks.sides.contract import OURS
from latentrt.benchmarks.verbs.hosts import ASKED, AT_ONCE, HostRules, measure_hosts
from latentrt.engines.errors import BackendError
from tests.benchmarks.stand_in_side import PACKAGE, TASK
from tests.serve.live import live, open_demo

RULES = HostRules(rounds=2, requests=2, callers=2, warm_up=1)
ONE_ROUND = replace(RULES, rounds=1)
CASE = Case.of(PACKAGE.manifest, width=64, height=64, steps=3)

FIELDS = {name: value for name, value in CASE.parameters.items() if name != "num_images_per_prompt"}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


@pytest.fixture(scope="module")
def served(pipe: Pipeline) -> Iterator[str]:
    with live(pipe) as at:
        yield at.url


@pytest.fixture(scope="module")
def found(served: str) -> Document:
    servers = {"latentrt serve": served, "Ray Serve": served}
    return measure_hosts(PACKAGE, TASK, replace(CASE, seed=1), servers=servers, rules=RULES)


def test_every_side_has_a_row_of_one_caller_and_of_several(found: Document) -> None:
    assert [(row.workload, row.case["callers"], row.side) for row in found.rows] == [
        (workload, callers, side)
        for workload, callers in ((ASKED, 1), (AT_ONCE, 2))
        for side in (OURS, "latentrt serve", "Ray Serve")
    ]
    for row in found.rows:
        assert row.status == "ok"
        assert [len(turn) for turn in row.rounds] == [2 * row.case["callers"]] * 2
        taken = sum(row.samples) / row.case["callers"]
        assert row.figures["requests_per_s"] == pytest.approx(len(row.samples) / taken, rel=0.8)


def test_its_table_has_ratios_to_this_process(found: Document) -> None:
    settings = {**found.settings, "command": "latentrt bench hosts demo"}
    document = replace(found, settings=settings)
    table = full_tables([Result(name="hosts-demo", digest="", document=document)], {})
    assert "| drawn by | one caller: p50 [p99] | ÷ in process | pictures/s | 2 callers: p50 [p99]" in table
    line = next(line for line in table.splitlines() if line.startswith("| latentrt serve |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    row = document.rows[1]
    assert cells[1].startswith(words.seconds(row.summary["p50"]))
    assert cells[3] == words.number(row.figures["requests_per_s"])
    assert "×" in cells[2]
    assert "a request to a server ÷ in process" in table


def test_a_server_of_another_model_has_no_times(served: str) -> None:
    class Other(OpenAICaller):
        def draw(self, fields: Any) -> Any:
            return super().draw({**fields, "seed": 99})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dict_of_callers(), "Triton", Other)
        found = measure_hosts(PACKAGE, TASK, CASE, servers={"Triton": served}, rules=RULES)
    ours, other = found.rows[:2]
    assert ours.status == "ok"
    assert other.status == "FAILED"
    assert "its picture is not the one that is drawn in this process" in other.reason
    table = full_tables([Result(name="hosts-demo", digest="", document=found)], {})
    assert "its picture is not the one" in table


def dict_of_callers() -> dict[str, Any]:
    assert isinstance(CALLERS, dict)
    return CALLERS


def test_a_server_that_refuses_has_no_times(served: str) -> None:
    case = replace(CASE, width=60)
    with closing(OpenAICaller(served)) as caller, pytest.raises(BackendError, match="answers: 400"):
        caller.draw({"prompt": "a", **case.parameters})


def test_a_connection_that_the_server_let_go_is_made_anew(served: str) -> None:
    with closing(OpenAICaller(served)) as caller:
        caller.draw({"prompt": "a", **FIELDS})
        sock = caller._connection.sock
        sock.shutdown(socket.SHUT_RDWR)
        found = caller.draw({"prompt": "a", **FIELDS})
        assert found.shape == (64, 64, 3)
        assert caller._connection.sock is not sock


def test_no_server_is_an_error_with_what_to_start() -> None:
    with pytest.raises(BackendError, match="answers: ConnectionRefusedError") as raised:
        TritonCaller("127.0.0.1:9")
    assert "docs/scale.md" in raised.value.fix


class Stream(BaseHTTPRequestHandler):
    """Answers as Triton does: what its README of `generate_stream` shows."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        models, answer = self.server.answers  # type: ignore[attr-defined]
        body = models if self.path.endswith("/index") else answer
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def ask_triton(url: str) -> None:
    with closing(TritonCaller(url)) as caller:
        caller.draw({"prompt": "a"})


@pytest.mark.parametrize(
    ("models", "answer", "words"),
    [
        ([], b"", "no model that is ready"),
        ([{"name": "m"}], b'data: {"error": "there is no sampler"}\n\n', "there is no sampler"),
        (
            [{"name": "m"}],
            b'data: {"event": "{\\"event\\": \\"queued\\"}"}\n\n',
            "a stream without a picture",
        ),
    ],
)
def test_what_triton_says_instead_of_a_picture(models: Any, answer: bytes, words: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stream) as server:
        server.answers = json.dumps(models).encode(), answer  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(BackendError, match=words):
                ask_triton(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()


def test_in_process_callers_get_their_own_pictures(pipe: Pipeline) -> None:
    from latentrt.benchmarks.verbs.hosts import InProcess

    requests = [{"prompt": "a", **CASE.parameters, "seed": seed} for seed in range(3)]
    for values in requests:
        values["sampler"] = "no such"
    with pytest.raises(Exception, match="no such"):
        InProcess(pipe).turn(requests, 2)
    assert np.asarray(InProcess(pipe).draw({"prompt": "a", **CASE.parameters})).shape == (64, 64, 3)
