"""A signal ends the block, once, however it is met, and nothing behind the block."""

import subprocess
import sys

import pytest

from latentrt.cli.signals import stoppable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

# In processes of their own: what is tested is whether they live.
PROGRAM = """
import os, signal, sys, time
from latentrt.cli import signals

signals._LOST_S = {lost}
before, hook = {{number: signal.getsignal(number) for number in (2, 15)}}, sys.unraisablehook

def stop():
    signal.raise_signal(signal.{name})

class Finalised:
    __del__ = lambda _: stop()

{setup}

began = time.monotonic()
try:
    with signals.stoppable():
        {block}
        time.sleep(60)
except signals.StoppedError as stopped:
    took = time.monotonic() - began
    assert before == {{number: signal.getsignal(number) for number in before}}
    assert sys.unraisablehook is hook
    time.sleep(1.2)
    print("alive behind", stopped, "soon" if took < 10 else "late")
"""

SLOW_START = """
class Slow(signals.Timer):
    def start(self):
        super().start()
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            pass

signals.Timer = Slow
"""
SLOW_KILL = """
def slowly(pid, number, kill=os.kill):
    time.sleep(0.4)
    kill(pid, number)

signals.os.kill = slowly
"""


def run(block: str, setup: str = "", name: str = "SIGTERM", lost: float = 0.5) -> str:
    """What is printed. `lost` seconds after a signal it is sent again; a program looks on for 1.2 s."""
    program = PROGRAM.format(block=block, setup=setup, name=name, lost=lost)
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_block(name: str) -> None:
    assert run("stop()", name=name) == f"alive behind {name} soon"


def test_in_a_finaliser() -> None:
    """Python drops what is raised there, so it is sent again, and much sooner than what might be heard."""
    for lost in (0.5, 30.0):
        assert run("Finalised()", name="SIGINT", lost=lost) == "alive behind SIGINT soon"


def test_sent_again_while_python_drops_the_first() -> None:
    """A loaded machine takes longer to start a timer than the timer waits."""
    for lost in (0.5, 30.0):
        assert run("Finalised()", SLOW_START, lost=lost) == "alive behind SIGTERM soon"


def test_a_library_takes_it_for_one_of_its_own_errors() -> None:
    wrapped = "\n        ".join(("try: stop()", "except BaseException: pass"))
    assert run(wrapped, lost=0.5) == "alive behind SIGTERM soon"


def test_sent_again_while_the_block_is_left() -> None:
    assert run("stop()", SLOW_KILL, lost=0.0) == "alive behind SIGTERM soon"


def test_what_else_finalisers_raise_is_printed_as_ever() -> None:
    class Raises:
        def __del__(self) -> None:
            raise ZeroDivisionError("there")

    met: list[object] = []
    before = sys.unraisablehook
    sys.unraisablehook = met.append
    try:
        with stoppable():
            Raises()
    finally:
        sys.unraisablehook = before
    assert [type(one.exc_value) for one in met] == [ZeroDivisionError]
