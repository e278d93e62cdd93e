from dataclasses import dataclass, field
from typing import Any

from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.rounds import Pace, interleave


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Side:
    """Takes `seconds` for a run, on a clock that all sides share; fails in its turn number `fails`."""

    name: str
    seconds: float
    clock: Clock
    calls: list[str]
    fails: int | None = None
    turns: int = 0
    runs: list[int] = field(default_factory=list[int])

    def time(self, runs: int) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        self.turns += 1
        if self.turns == self.fails:
            raise SideError("FAILED", "it broke")
        self.calls.append(self.name)
        self.runs.append(runs)
        self.clock.now += runs * self.seconds
        return (self.seconds,) * runs, [{"turn": self.turns}] * runs


def _sides(*seconds: float, **more: Any) -> tuple[list[Side], Clock, list[str]]:
    clock, calls = Clock(), list[str]()
    return [Side("abc"[i], value, clock, calls, **more) for i, value in enumerate(seconds)], clock, calls


PACE = Pace(runs=50, rounds=4, budget=100.0, turn=0.25, most=40, warm_up=5)


def test_sides_take_turns_in_an_order_that_flips() -> None:
    sides, clock, calls = _sides(0.01, 0.02)
    found = interleave(sides, {"a": 0.01, "b": 0.02}, PACE, clock=clock)
    assert calls == ["a", "b", *"abbabaabab"], "warm-up, then as many rounds as 50 runs of b take"
    assert [len(turn) for turn in found["a"].rounds] == [25] * 5, "a quarter of a second"
    assert [len(turn) for turn in found["b"].rounds] == [12] * 5
    assert len(found["a"].figures) == 125, "one for each sample, without the warm-up's"
    assert {item["turn"] for item in found["a"].figures} == {2, 3, 4, 5, 6}


def test_long_runs_get_as_many_rounds_as_runs_or_the_budget_allow() -> None:
    sides, clock, _ = _sides(1.0, 1.0)
    found = interleave(sides, {"a": 1.0, "b": 1.0}, PACE, clock=clock)
    assert len(found["a"].rounds) == 50
    sides, clock, _ = _sides(10.0, 10.0)
    found = interleave(sides, {"a": 10.0, "b": 10.0}, PACE, clock=clock)
    assert len(found["a"].rounds) == len(found["b"].rounds) == 5, "100 s: five rounds, besides a warm-up"
    sides, clock, _ = _sides(1000.0)
    assert len(interleave(sides, {"a": 1000.0}, PACE, clock=clock)["a"].rounds) == 3, "never fewer"


def test_a_turn_has_a_limit_and_a_slow_first_run_does_not_shorten_it() -> None:
    lines: list[str] = []
    sides, clock, _ = _sides(0.01)
    found = interleave(sides, {"a": 5.0}, PACE, said=lines.append, clock=clock)
    assert [len(turn) for turn in found["a"].rounds] == [25] * 4
    assert lines == [f"round {i} of at most 4" for i in (1, 2, 3, 4)]
    sides, clock, _ = _sides(1e-6)
    interleave(sides, {"a": 1e-6}, PACE, clock=clock)
    assert sides[0].runs == [6, 41, 41, 41, 41], "the first of a turn is not counted"
    assert interleave([], {}, PACE) == {}
    assert Pace.quick().budget < Pace().budget


def test_a_side_that_fails_drops_out() -> None:
    sides, clock, calls = _sides(0.01, 0.01)
    sides[0].fails = 3
    found = interleave(sides, {"a": 0.01, "b": 0.01}, PACE, clock=clock)
    assert (found["a"].status, found["a"].reason, len(found["a"].rounds)) == ("FAILED", "it broke", 1)
    assert (found["b"].status, len(found["b"].rounds)) == ("ok", 4)
    assert calls == ["a", "b", "a", *"bbbb"]
