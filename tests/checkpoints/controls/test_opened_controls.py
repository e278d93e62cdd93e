"""Controls that are known and cannot be used yet, and where ControlNets do not run yet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.engines.errors import BackendError, CheckpointError
from latentrt.runtime.loop.open import LoopOptions, open_control_loop
from tests.checkpoints.controls.control_files import t2i_adapter, write

OTHERS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "T2I-Adapter": lambda: t2i_adapter("full").state_dict(),
    "T2I-Adapter .light": lambda: t2i_adapter("light").state_dict(),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_controls_are_refused_by_name(what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "control.safetensors", OTHERS[what]())
    options = Options(dtype="fp32", reads=BACKENDS["onnxruntime"].reads)
    with pytest.raises(CheckpointError, match=rf"is a {what}.*, which cannot be used yet"):
        open_control(path, options, store=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_loop_on_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = ("onnxruntime-cuda", object())
    monkeypatch.setattr("latentrt.runtime.loop.open.choose_backend", lambda *_: found)
    with pytest.raises(BackendError, match="onnxruntime-cuda draws without ControlNets"):
        open_control_loop(Mock(), LoopOptions())
