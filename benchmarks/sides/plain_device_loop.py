"""The plain loop on a device: nets are bound once, tensors stay there, and a picture is waited for once.

The UNet is the one before hoisting. Guidance and the row update are the package's net `step`, so that nothing
has to come back to the host between steps: the most that a user of the engine could ask of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import numpy as np

from ...engines.device import BoundNet, Device, DeviceNet
from ...engines.package import Package
from ...engines.spec import ROW, Array, TensorSpec
from ...runtime.loop import guidance
from ...runtime.loop.denoise import narrow
from ...runtime.loop.device.buffers import Block, Layout, Sizes, aligned
from ...runtime.loop.device.programs import input_shapes
from ...runtime.prompts.tokenizer import ClipTokenizer
from ..case import Case, net_inputs, sizes_of, whole_inputs
from .contract import Prepared, not_available
from .ours import schedule_of
from .ours_device import DeviceWork
from .plain_loop import PLAIN_NETS, check_drawable

DEVICE_NETS = (*PLAIN_NETS, "step")
# What lies at one address: where the UNet reads, `step` writes and the decoder reads in the end.
_SAME = {
    "step/prediction": "unet_whole/out_sample",
    "step/latent": "unet_whole/sample",
    "vae_decoder/latent": "unet_whole/sample",
}


class PlainDeviceSide:
    """Nets of an engine on a device, and the loop around them.

    Args:
        name: of the side, for errors.
        package: the graphs are from.
        device: where the nets are.
        nets: DEVICE_NETS.
        versions: of the engine, and what was set.
        resources: what is freed at the end.
    """

    def __init__(
        self,
        name: str,
        package: Package,
        device: Device,
        nets: Mapping[str, DeviceNet],
        versions: Mapping[str, str],
        resources: ExitStack,
    ) -> None:
        self._name, self._package, self._device, self._nets = name, package, device, nets
        self._versions, self._resources = versions, resources
        self._tokenizer = ClipTokenizer.open(package.root / "tokenizer")

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the engine, and what was set."""
        return self._versions

    def memory(self) -> Mapping[str, object]:
        """The nets' ledger."""
        return {"ledger": {name: vars(net.memory) for name, net in self._nets.items()}}

    def close(self) -> None:
        """Free what was prepared, then nets and device. May be called twice."""
        self._resources.close()

    def prepare(self, workload: str, case: Case) -> Prepared:
        """Raises NotAvailableError, MemoryLimitError."""
        makers: Mapping[str, Callable[[Case, ExitStack], DeviceWork]] = {
            "text_encoder": self._text_encoder,
            "unet": self._unet,
            "vae_decoder": self._vae_decoder,
            "picture": self._picture,
        }
        if workload not in makers:
            raise not_available(self._name, workload)
        with ExitStack() as stack:
            work = makers[workload](case, stack)
            self._device.synchronize()
            work.held = stack.pop_all()
        self._resources.callback(work.close)
        return work

    # ── one net ────────────────────────────────────────────────────────────────────────────────

    def _text_encoder(self, case: Case, stack: ExitStack) -> DeviceWork:
        inputs = self._inputs("text_encoder", case)
        return self._net(stack, "text_encoder", case, inputs, {"context": "context"})

    def _unet(self, case: Case, stack: ExitStack) -> DeviceWork:
        feeds = whole_inputs(case, self._package.manifest, self._inputs("unet", case))
        return self._net(stack, "unet_whole", case, feeds, {"prediction": "out_sample"})

    def _vae_decoder(self, case: Case, stack: ExitStack) -> DeviceWork:
        inputs = self._inputs("vae_decoder", case)
        return self._net(stack, "vae_decoder", case, inputs, {"image": "image"})

    def _inputs(self, workload: str, case: Case) -> dict[str, Array]:
        return net_inputs(workload, case, self._package.manifest, self._tokenizer)

    def _net(
        self,
        stack: ExitStack,
        name: str,
        case: Case,
        feeds: Mapping[str, Array],
        outputs: Mapping[str, str],
    ) -> DeviceWork:
        """One call of a net, timed by the device too; `outputs` are canonical names -> the net's own."""
        sizes = sizes_of(case, self._package.manifest)
        block, bound = self._bind(stack, [name], sizes)
        for tensor, array in feeds.items():
            block.upload(f"{name}/{tensor}", array)
        watch, device = self._device.stopwatch(), self._device
        stack.callback(watch.close)

        def call() -> Mapping[str, Array]:
            watch.start()
            bound[name].enqueue()
            watch.stop()
            device.synchronize()
            return {}

        def download() -> Mapping[str, Array]:
            found = {ours: block.download(f"{name}/{theirs}") for ours, theirs in outputs.items()}
            device.synchronize()
            return found

        return DeviceWork(call=call, told=lambda: {"device_s": watch.seconds()}, download=download)

    def _bind(
        self, stack: ExitStack, names: Iterable[str], sizes: Sizes, more: Iterable[TensorSpec] = ()
    ) -> tuple[Block, dict[str, BoundNet]]:
        """A block with every tensor of these nets under "net/tensor", and the nets bound to it."""
        layout = Layout()
        names = tuple(names)
        tensors = {name: (*self._nets[name].spec.inputs, *self._nets[name].spec.outputs) for name in names}
        for name in names:
            own = [item for item in tensors[name] if _place(name, item, names) == f"{name}/{item.name}"]
            layout.add_tensors(own, sizes, f"{name}/")
        layout.add_tensors(more, sizes)
        block = Block(self._device, layout)
        stack.callback(block.close)
        found: dict[str, BoundNet] = {}
        for name in names:
            addresses = {item.name: block.address(_place(name, item, names)) for item in tensors[name]}
            spec = self._nets[name].spec
            found[name] = self._nets[name].bind(input_shapes(spec, sizes), addresses, 0)
            stack.callback(found[name].close)
        return block, found

    # ── all of it ──────────────────────────────────────────────────────────────────────────────

    def _picture(self, case: Case, stack: ExitStack) -> DeviceWork:
        manifest = self._package.manifest
        check_drawable(self._name, manifest)
        sizes = sizes_of(case, manifest)
        table, noise = schedule_of(case, manifest)
        schedule = {"rows": 4 * len(ROW), "timesteps": 4 * case.batch, "noises": noise().nbytes}
        more = [
            TensorSpec(name=name, dtype="uint8", shape=(len(table), aligned(size)))
            for name, size in schedule.items()
        ]
        block, bound = self._bind(stack, DEVICE_NETS, sizes, more)
        drawing = _Drawing(self._package, self._tokenizer, self._device, block, bound, case)
        images: dict[str, Array] = {}

        def call() -> Mapping[str, Array]:
            images["image"] = drawing.draw()
            return {}

        return DeviceWork(call=call, download=lambda: images)


class _Drawing:
    """A picture's buffers, and how it is drawn in them."""

    def __init__(
        self,
        package: Package,
        tokenizer: ClipTokenizer,
        device: Device,
        block: Block,
        bound: Mapping[str, BoundNet],
        case: Case,
    ) -> None:
        self._manifest, self._tokenizer, self._device = package.manifest, tokenizer, device
        self._block, self._bound, self._case = block, bound, case

    def draw(self) -> Array:
        """Prompt to (N, H, W, 3) uint8."""
        case, block, device = self._case, self._block, self._device
        draws = self._start()
        for row, noisy in enumerate(draws):
            self._copy("timesteps", row, "unet_whole/timestep")
            self._copy("rows", row, "step/row")
            if noisy:
                self._copy("noises", row, "step/noise")
            self._bound["unet_whole"].enqueue()
            self._bound["step"].enqueue()
            state = block.place("step/state").size
            device.copy(block.address("step/state"), block.address("step/next_state"), state)
        self._bound["vae_decoder"].enqueue()
        image = block.download("vae_decoder/image")
        device.synchronize()
        assert len(image) == case.pictures
        return image

    def _start(self) -> list[bool]:
        """Upload all that a picture needs, and encode the prompts; which rows draw noise."""
        case, block = self._case, self._block
        table, noise = schedule_of(case, self._manifest)
        start = table.init * noise()
        inputs = net_inputs("text_encoder", case, self._manifest, self._tokenizer)
        for name, array in inputs.items():
            block.upload(f"text_encoder/{name}", array)
        self._bound["text_encoder"].enqueue()
        self._spread_context()
        state = np.zeros(block.place("step/state").shape, np.float32)
        state[0] = start
        block.upload("step/state", state)
        block.upload("unet_whole/sample", narrow(guidance.batch(start, case.guided), np.float32))
        draws = [bool(drawn) for drawn in table.draws]
        noises = np.zeros((len(table), *start.shape), np.float32)
        for row in np.flatnonzero(table.draws):
            noises[row] = noise()
        self._upload_lines("rows", table.packed_rows(case.guidance_scale, 0.0)[:, : len(ROW)])
        self._upload_lines("timesteps", np.repeat(table.t.astype(np.float32)[:, None], case.batch, axis=1))
        if any(draws):
            self._upload_lines("noises", noises)
        return draws

    def _spread_context(self) -> None:
        """(P, T, D) -> (B, T, D): a text's context for each of the pictures."""
        block, pictures = self._block, self._case.pictures
        place = block.place("text_encoder/context")
        width = place.size // place.shape[0]
        source, target = (
            block.address("text_encoder/context"),
            block.address("unet_whole/encoder_hidden_states"),
        )
        for row in range(self._case.batch):
            self._device.copy(target + row * width, source + row // pictures * width, width)

    def _upload_lines(self, name: str, lines: Array) -> None:
        """(S, …) float32, each line at an aligned place of its own."""
        padded = np.zeros(self._block.place(name).shape, np.uint8)
        for place, line in zip(padded, lines, strict=True):
            content = np.frombuffer(np.ascontiguousarray(line, np.float32).data, np.uint8)
            place[: content.size] = content
        self._block.upload(name, padded)

    def _copy(self, lines: str, row: int, to: str) -> None:
        block = self._block
        source = block.address(lines) + row * block.place(lines).shape[1]
        self._device.copy(block.address(to), source, block.place(to).size)


def _place(net: str, tensor: TensorSpec, names: tuple[str, ...]) -> str:
    """Where a tensor of a net lies, in the company of these nets."""
    own = f"{net}/{tensor.name}"
    other = _SAME.get(own, own)
    return other if other.partition("/")[0] in names else own
