import json
from dataclasses import dataclass

from latentrt.engines.backend import MemoryLedger
from latentrt.engines.device import DeviceMemory
from latentrt.engines.ledger import Ledger, NetRow, take_ledger

MIB = 2**20


@dataclass
class Net:
    memory: MemoryLedger


NETS = {
    "text_encoder": Net(MemoryLedger(weights=3 * MIB, activations=None, io=MIB // 2)),
    "unet": Net(MemoryLedger(weights=1640 * MIB, activations=100 * MIB, io=2 * MIB)),
}
MEMORY = DeviceMemory(free=6000 * MIB, total=8192 * MIB, unified=False)


def test_sums() -> None:
    ledger = take_ledger("A GPU", NETS, MEMORY, process=2000 * MIB, scratch=50 * MIB)
    assert ledger.nets[0] == NetRow(name="text_encoder", weights=3 * MIB, activations=None, io=MIB // 2)
    assert [row.total for row in ledger.nets] == [3 * MIB + MIB // 2, 1742 * MIB]
    assert ledger.known == 1795 * MIB + MIB // 2
    assert ledger.rest == 204 * MIB + MIB // 2


def test_a_process_that_is_not_known_or_is_less_than_its_parts() -> None:
    assert take_ledger("A GPU", NETS, MEMORY).rest is None
    assert take_ledger("A GPU", NETS, MEMORY, process=5).rest == 0


def test_format() -> None:
    ledger = take_ledger("A GPU", NETS, MEMORY, process=2000 * MIB, scratch=50 * MIB)
    assert ledger.format().splitlines() == [
        "A GPU: 6000.0 of 8192.0 MiB free",
        "net                      weights  activations  in and out   total",
        "text_encoder                 3.0            ?         0.5     3.5",
        "unet                      1640.0        100.0         2.0  1742.0",
        "shared activations                       50.0                50.0",
        "all of this                                                1795.5",
        "the rest of the process                                     204.5",
        "the process                                                2000.0",
    ]
    shared = DeviceMemory(free=MIB, total=MIB, unified=True)
    empty = Ledger(device="A GPU", nets=(), scratch=0, process=None, memory=shared).format()
    assert empty.startswith("A GPU: 1.0 of 1.0 MiB free, shared with the host\n")
    assert empty.splitlines()[-1].split() == ["the", "process", "?"]


def test_json_round_trips() -> None:
    ledger = take_ledger("A GPU", NETS, MEMORY, scratch=50 * MIB)
    data = json.loads(json.dumps(ledger.to_json()))
    assert data["nets"][1] == {
        "name": "unet",
        "weights": 1640 * MIB,
        "activations": 100 * MIB,
        "io": 2 * MIB,
        "total": 1742 * MIB,
    }
    assert data["memory"] == {"free": 6000 * MIB, "total": 8192 * MIB, "unified": False}
    assert (data["process"], data["rest"], data["known"]) == (None, None, ledger.known)
