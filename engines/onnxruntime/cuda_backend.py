"""ONNX Runtime on CUDA as a backend: nets on a device, each in the fastest layout that is known.

Opening never measures. It takes what `latentrt build PACKAGE --backend onnxruntime-cuda` has left in the
engine store (`tuning/cuda.py`), and without that lowers the package's graph to `nhwc`, which has far fewer
kernels than `plain`: there GroupNormalization has none of its own, and falls apart into 25.

"auto" asks this backend first at every start, so the modules of CUDA and of the store are imported only where
ONNX Runtime has a CUDA provider.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..device import Device, DeviceNet
from ..errors import BackendError, PackageError
from ..package import Package
from .nets import cuda_refusal, open_onnxruntime_net
from .session import library

if TYPE_CHECKING:
    from ..cuda.device import CudaDevice
    from ..store.engine_store import EngineStore

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
        profile: Path | None = None,
    ) -> tuple[Device, Mapping[str, DeviceNet]]:
        """A device of the caller's own, and nets of the package on it.

        UNet and decoder are opened in the layout that was measured as the fastest here; where nothing was,
        they are in `nhwc`, as encoders always are, which is made now. A line is logged where it cannot be.

        Args:
            package: the package.
            names: of its nets.
            index: of the device, as CUDA_VISIBLE_DEVICES numbers them.
            store: where layouts are remembered; the user's own unless given.
            profile: a folder for the library's profiles.

        Raises:
            BackendError: no library, driver or device.
            LatentrtError: whatever `open_onnxruntime_net` raises. Nothing stays open then.
        """
        from ..cuda.device import CudaDevice
        from ..store.engine_store import EngineStore

        device, place = CudaDevice(index), store or EngineStore()
        nets, plain = dict[str, DeviceNet](), dict[str, str]()
        with ExitStack() as stack:
            stack.callback(device.close)
            for name in names:
                nets[name], plain[name] = _open_net(package, name, device, place, profile)
                stack.callback(nets[name].close)
            stack.pop_all()
        if slow := {name: why for name, why in plain.items() if why}:
            why = next(iter(slow.values()))
            _LOG.warning("%s run in the layout `plain`, which is slower: %s", " and ".join(slow), why)
        return device, nets

    def open_another(
        self, device: Device, package: Package, name: str, *, store: EngineStore | None = None
    ) -> DeviceNet:
        """See `AdaptingBackend`; in the layout that `open_device` opens it in with the same `store`."""
        from ..cuda.device import CudaDevice
        from ..store.engine_store import EngineStore

        assert isinstance(device, CudaDevice)
        return _open_net(package, name, device, store or EngineStore(), None)[0]


def _open_net(
    package: Package, name: str, device: CudaDevice, store: EngineStore, profile: Path | None
) -> tuple[DeviceNet, str]:
    """A net in the fastest layout that is known or can be made, and why none but `plain` can be."""
    from ..tuning.choice import TUNED_NETS
    from .lowering.lower import lower
    from .tuning.cuda_layouts import LOWERED_NETS, stored_graph

    opened = partial(open_onnxruntime_net, package, name, device, profile=profile)
    if name not in LOWERED_NETS:
        return opened(), ""
    # The library takes a path and the store has hashed bytes, so these very bytes go to a folder of our own.
    with TemporaryDirectory() as folder:
        if name in TUNED_NETS and (known := stored_graph(package, name, store, device.facts)):
            layout, content = known
            graph = Path(folder) / f"{name}.onnx"
            graph.write_bytes(content)
            return opened(graph=None if layout == "plain" else graph), ""
        try:
            return opened(graph=lower(package, name, Path(folder))), ""
        except (BackendError, PackageError) as error:
            return opened(), f"{error.found}; {error.fix}"


ONNXRUNTIME_CUDA = OnnxRuntimeCudaBackend()
