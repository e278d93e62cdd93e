"""ONNX Runtime on CUDA as a backend: nets on a device, each in the layout that was measured as the fastest.

Opening never measures. It takes what `latentrt build PACKAGE --backend onnxruntime-cuda` has left in the
engine store (`tuning/cuda.py`), and without that the package's own graph, which needs no choice.

"auto" asks this backend first at every start, so the modules of CUDA and of the store are imported only where
ONNX Runtime has a CUDA provider.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..device import Device, DeviceNet
from ..errors import BackendError
from ..installed import install_command
from ..package import Package
from .lowering.files import lowering_missing
from .nets import cuda_refusal, open_onnxruntime_net
from .session import library

if TYPE_CHECKING:
    from ..store.engine_store import EngineStore
    from .tuning.cuda_layouts import StoredLayout

_LOG = logging.getLogger(__name__)


class OnnxRuntimeCudaBackend:
    """`DeviceBackend` of ONNX Runtime's CUDA provider."""

    def refusal(self) -> BackendError | None:
        """None if ONNX Runtime can run nets on a CUDA device here, else the error. Never raises."""
        return cuda_refusal()

    def describe(self, index: int = 0) -> str:
        """Version and device, for people. Raises BackendError where `refusal` has an error."""
        from ..cuda.facts import facts

        gpu = facts(index)
        return f"onnxruntime {library().__version__} CUDA ({gpu.name}, {gpu.sm})"

    def open_device(
        self,
        package: Package,
        names: Sequence[str],
        *,
        index: int = 0,
        store: EngineStore | None = None,
        capture: bool = False,
        profile: Path | None = None,
    ) -> tuple[Device, Mapping[str, DeviceNet]]:
        """A device of the caller's own, and nets of the package on it.

        One line is logged on the nets without a layout in the store, with the command that measures them.

        Args:
            package: the package.
            names: of its nets.
            index: of the device, as CUDA_VISIBLE_DEVICES numbers them.
            store: where layouts are remembered; the user's own unless given.
            capture: let runs be captured, see `open_onnxruntime_net`.
            profile: a folder for the library's profiles.

        Raises:
            BackendError: no library, driver or device.
            LatentrtError: whatever `open_onnxruntime_net` raises. Nothing stays open then.
        """
        from ..cuda.device import CudaDevice
        from ..store.engine_store import EngineStore
        from .tuning.choice import TUNED_NETS
        from .tuning.cuda_layouts import stored_layout

        device = CudaDevice(index)
        with ExitStack() as stack:
            stack.callback(device.close)
            gpu, place = device.facts, store or EngineStore()
            stored = {name: stored_layout(package, name, place, gpu) for name in names if name in TUNED_NETS}
            nets: dict[str, DeviceNet] = {}
            for name in names:
                opened = partial(
                    open_onnxruntime_net, package, name, device, capture=capture, profile=profile
                )
                nets[name] = _open_net(opened, name, stored.get(name))
                stack.callback(nets[name].close)
            stack.pop_all()
        if hint := _hint(package, stored):
            _LOG.info(hint)
        return device, nets


def _open_net(opened: Callable[..., DeviceNet], name: str, stored: StoredLayout | None) -> DeviceNet:
    if stored is None or stored.graph is None:
        return opened()
    # The library takes a path and the store has hashed bytes, so these very bytes go to a folder of our own.
    with TemporaryDirectory() as folder:
        graph = Path(folder) / f"{name}.onnx"
        graph.write_bytes(stored.graph)
        return opened(graph=graph, prefer_nhwc=stored.layout.prefer_nhwc)


def _hint(package: Package, stored: Mapping[str, StoredLayout]) -> str:
    """Why nets run as they were exported, and what to do about it; "" if every layout is known."""
    unknown = {name: item.why for name, item in stored.items() if item.why}
    if not unknown:
        return ""
    why = next(iter(unknown.values()))
    missing = lowering_missing()
    first = f" (first: {install_command('cuda')}, for {missing})" if missing else ""
    return (
        f"{' and '.join(unknown)} run in the layout `plain`: {why};"
        f" measure which is the fastest here: latentrt build {package.root} --backend onnxruntime-cuda{first}"
    )


ONNXRUNTIME_CUDA = OnnxRuntimeCudaBackend()
