"""The plain loop on a device: nets are bound once, tensors stay there, and a picture is waited for once.

The UNet is the one before hoisting. Guidance and the row update are the package's net `step`, so that nothing
has to come back to the host between steps: the most that a user of the engine could ask of it.

The side here is ONNX Runtime on CUDA, on one stream, as the library is by default but for TF32, which would
be another arithmetic than everyone else's in fp32. Its convolutions are searched by measuring, in the first
run of a shape; ours take its quick choice. TensorRT shares the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial

import numpy as np

from ...engines.device import BoundNet, Device, DeviceNet
from ...engines.onnxruntime.nets import CUDA, cuda_available, open_onnxruntime_net
from ...engines.onnxruntime.session import library
from ...engines.package import Package
from ...engines.spec import ROW, Array, TensorSpec
from ...runtime.loop.denoise import guided_batch, narrow
from ...runtime.loop.device.programs import Block, aligned
from ...runtime.prompts.tokenizer import ClipTokenizer
from ..case import Case, net_inputs, schedule_of, sizes_of, whole_inputs
from .contract import OpenSide, Task, Work, makers_of, open_plain_package
from .device_work import DeviceNets, upload
from .plain_loop import PLAIN_NETS, check_drawable

DEVICE_NETS = (*PLAIN_NETS, "step")
_SEARCH = "EXHAUSTIVE"


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    del task
    return cuda_available()


def open_side(task: Task) -> OpenSide:
    """A session for each net. Raises BackendError, PackageError, MemoryLimitError."""
    versions = {
        "onnxruntime": str(library().__version__),
        "provider": CUDA,
        "io_binding": "one stream, one wait for a picture",
        "cudnn_conv_algo_search": _SEARCH,
        "prefer_nhwc": "0",
        "use_tf32": "0",
    }
    open_net = partial(open_onnxruntime_net, conv_search=_SEARCH, threads=task.threads)
    return open_on_cuda("onnxruntime-cuda", task, open_net, versions)


def open_on_cuda(
    name: str,
    task: Task,
    open_net: Callable[[Package, str, Device], DeviceNet],
    versions: Mapping[str, str],
) -> OpenSide:
    """The nets that `open_net` opens on the first CUDA device. Raises NotAvailableError, LatentrtError."""
    from ...engines.cuda.device import CudaDevice

    package = open_plain_package(task)
    with ExitStack() as stack:
        device = stack.enter_context(closing(CudaDevice()))
        nets = {net: stack.enter_context(closing(open_net(package, net, device))) for net in DEVICE_NETS}
        found = {**versions, "device": device.name}
        return plain_device_side(name, package, device, nets, found, stack.pop_all())


def plain_device_side(
    name: str,
    package: Package,
    device: Device,
    nets: Mapping[str, DeviceNet],
    versions: Mapping[str, str],
    resources: ExitStack,
) -> OpenSide:
    """Nets of an engine on a device, DEVICE_NETS, and the loop around them; arguments as of `plain_side`."""
    return OpenSide(
        name=name,
        versions=versions,
        makers=makers_of(_PlainDeviceLoop(name, package, DeviceNets(device=device, nets=nets))),
        resources=resources,
        memory=lambda: {"ledger": {name: vars(net.memory) for name, net in nets.items()}},
    )


class _PlainDeviceLoop:
    """The workloads, by the names of the contract."""

    def __init__(self, name: str, package: Package, nets: DeviceNets) -> None:
        self._name, self.manifest, self.nets = name, package.manifest, nets
        self.tokenizer = ClipTokenizer.open(package.root / "tokenizer")

    def _one_call(self, net: str, output: str, case: Case, stack: ExitStack) -> Work:
        inputs = net_inputs(net, case, self.manifest, self.tokenizer)
        return self.nets.one_call(stack, net, sizes_of(case, self.manifest), inputs, output)

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_call("text_encoder", "context", case, stack)

    def unet(self, case: Case, stack: ExitStack) -> Work:
        inputs = net_inputs("unet", case, self.manifest, self.tokenizer)
        feeds = whole_inputs(case, self.manifest, inputs)
        feeds["latent"] = feeds.pop("sample")  # the block has our names
        return self.nets.one_call(stack, "unet_whole", sizes_of(case, self.manifest), feeds, "prediction")

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_call("vae_decoder", "image", case, stack)

    def picture(self, case: Case, stack: ExitStack) -> Work:
        check_drawable(self._name, self.manifest)
        sizes = sizes_of(case, self.manifest)
        table, noise = schedule_of(case, self.manifest)
        # What differs from row to row, each row's at an aligned place of its own.
        schedule = {"rows": len(ROW), "timesteps": case.batch, "noises": noise().size}
        lines = [
            TensorSpec(name=name, dtype="float32", shape=(len(table), aligned(4 * size) // 4))
            for name, size in schedule.items()
        ]
        block, bound = self.nets.bind(stack, *((name, sizes) for name in DEVICE_NETS), more=lines)
        drawing = _Drawing(self, block, dict(zip(DEVICE_NETS, bound, strict=True)), case)
        return Work(call=lambda: {"image": drawing.draw()})


class _Drawing:
    """A picture's buffers, and how it is drawn in them."""

    def __init__(
        self, loop: _PlainDeviceLoop, block: Block, bound: Mapping[str, BoundNet], case: Case
    ) -> None:
        self._manifest, self._tokenizer, self._device = loop.manifest, loop.tokenizer, loop.nets.device
        self._block, self._bound, self._case = block, bound, case

    def draw(self) -> Array:
        """Prompt to (N, H, W, 3) uint8."""
        block, device = self._block, self._device
        for row, noisy in enumerate(self._start()):
            self._copy("timesteps", row, "timestep")
            self._copy("rows", row, "row")
            if noisy:
                self._copy("noises", row, "noise")
            self._bound["unet_whole"].enqueue()
            self._bound["step"].enqueue()
            device.copy(block.address("state"), block.address("next_state"), block.place("state").size)
        self._bound["vae_decoder"].enqueue()
        image = block.download("image")
        device.synchronize()
        return image

    def _start(self) -> list[bool]:
        """Upload all that a picture needs, and encode the prompts; which rows draw noise."""
        case, block = self._case, self._block
        table, noise = schedule_of(case, self._manifest)
        start = table.init * noise()
        upload(block, net_inputs("text_encoder", case, self._manifest, self._tokenizer))
        self._bound["text_encoder"].enqueue()
        self._spread_context()
        state = np.zeros(block.place("state").shape, np.float32)
        state[0] = start
        block.upload("state", state)
        block.upload("latent", narrow(guided_batch(start, case.guided), np.float32))
        self._upload_lines("rows", table.packed_rows(case.guidance_scale, 0.0)[:, : len(ROW)])
        self._upload_lines("timesteps", np.repeat(table.t[:, None], case.batch, axis=1))
        if table.draws.any():
            noises = [noise() if drawn else np.zeros_like(start) for drawn in table.draws]
            self._upload_lines("noises", np.stack(noises))
        return [bool(drawn) for drawn in table.draws]

    def _spread_context(self) -> None:
        """(P, T, D) -> (B, T, D): a text's context for each of the pictures."""
        block, place = self._block, self._block.place("context")
        source, target = block.address("context"), block.address("encoder_hidden_states")
        width = place.size // place.shape[0]
        for row in range(self._case.batch):
            self._device.copy(target + row * width, source + row // self._case.pictures * width, width)

    def _upload_lines(self, name: str, lines: Array) -> None:
        """(S, …), each line at its aligned place."""
        padded = np.zeros(self._block.place(name).shape, np.float32)
        padded[:, : lines[0].size] = np.reshape(lines, (len(lines), -1))
        self._block.upload(name, padded)

    def _copy(self, lines: str, row: int, to: str) -> None:
        block, place = self._block, self._block.place(lines)
        source = block.address(lines) + row * (place.size // place.shape[0])
        self._device.copy(block.address(to), source, block.place(to).size)
