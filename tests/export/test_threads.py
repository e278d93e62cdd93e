"""An export keeps to the processors that may be used, whatever torch and ONNX Runtime take by themselves."""

import pytest
import torch

from latentrt.checkpoints.precision.islands import open_session
from latentrt.engines import processors
from latentrt.engines.package import Package
from latentrt.export.nets.torch_net import torch_threads
from latentrt.runtime.model import SHIPPED


def test_torch_and_onnxruntime_share_what_a_quota_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "processor_quota", lambda: 1.5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch_threads():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    session = open_session(Package.open(SHIPPED["demo"]).path("unet/time.onnx"))
    assert session.get_session_options().intra_op_num_threads == 1
