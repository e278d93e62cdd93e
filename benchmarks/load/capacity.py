"""How many machines a load takes: a formula for plans, from what `latentrt bench serve` measures of one.

    python -m latentrt.benchmarks.load.capacity --requests-per-second 20 --capacity 1.6 --stretch 3

A server gives all jobs that it draws equal turns. For Poisson arrivals at such a queue (M/G/1 with processor
sharing) a job of any size takes 1 / (1 - load) times as long as alone, on average, whatever the sizes are
(Kleinrock, "Queueing Systems", volume 2, 4.4). Behind a balancer that chooses at random each machine is one
of these; one that chooses the least busy is better, so the formula is a bound for it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ...engines.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """So many machines for a load.

    Attributes:
        machines: N.
        load: of each, the share of its time that it draws.
        stretch: how many times as long as alone a job takes, on average.
    """

    machines: int
    load: float
    stretch: float


def stretch_at(load: float) -> float:
    """How many times as long as alone a job takes at a load below 1."""
    return 1 / (1 - load)


def plan(requests_per_second: float, capacity: float, stretch: float, *, spare: int = 0) -> Plan:
    """The fewest machines with which jobs take at most `stretch` times as long as alone, on average.

    Args:
        requests_per_second: in all, at the busiest time.
        capacity: requests that one machine draws in a second when it has nothing else to do.
        stretch: above 1.
        spare: machines that may be away: rolled out, broken.

    Raises:
        UsageError: numbers that no load has.
    """
    for name, value, least in (
        ("requests_per_second", requests_per_second, 0.0),
        ("capacity", capacity, 0.0),
        ("stretch", stretch, 1.0),
    ):
        if not least < value < math.inf:
            raise UsageError(
                f"{name} is {value:g}", expected=f"a number above {least:g}", fix=f"Change {name}."
            )
    most = capacity * (1 - 1 / stretch)  # of each machine
    needed = max(1, math.ceil(round(requests_per_second / most, 9)))
    load = requests_per_second / (needed * capacity)
    return Plan(machines=needed + spare, load=load, stretch=stretch_at(load))


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m latentrt.benchmarks.load.capacity", description=__doc__)
    parser.add_argument("--requests-per-second", type=float, required=True)
    parser.add_argument("--capacity", type=float, required=True, help="pictures a second of one machine")
    parser.add_argument("--stretch", type=float, default=3.0, help="how many times as long as alone")
    parser.add_argument("--spare", type=int, default=1, help="machines that may be away")
    given = parser.parse_args(words)
    try:
        found = plan(given.requests_per_second, given.capacity, given.stretch, spare=given.spare)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(
        f"{found.machines} machines, {given.spare} of them spare: each draws {found.load:.0%} of the time,"
        f" and a job takes {found.stretch:.1f} times as long as alone\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
