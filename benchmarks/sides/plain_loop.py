"""The loop that a user writes around exported graphs: the UNet as it is, everything between nets in NumPy.

Nothing is hoisted out of the UNet and nothing is lowered; the sampler's table and guidance are latentrt's
own, so that whatever differs from ours is the engine's doing and the graph's. The sides here are around plain
ONNX Runtime sessions, as anyone would open them; other engines share the loop.

On a GPU what lies between two nets goes through the host's memory. A latent at 512x512 has 64 KB, which takes
microseconds beside a UNet's milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.device import Shapes
from ...engines.errors import BackendError
from ...engines.onnxruntime import session as onnxruntime
from ...engines.onnxruntime.nets import CPU, CUDA, cuda_available
from ...engines.package import Package
from ...engines.processors import thread_count
from ...engines.spec import DTYPES, Array
from ...runtime.loop.calls import answered, at_once
from ...runtime.loop.denoise import denoise, guide, guided_batch, narrow
from ...runtime.loop.device.programs import input_shapes
from ..case import Case, inputs_of, schedule_of, sizes_of, whole_inputs
from .contract import OpenSide, Task, Work, makers_of, missing_modules, not_available, open_plain_package

PLAIN_NETS = ("text_encoder", "unet_whole", "vae_decoder")
# From inputs by name to outputs by name, which stay as they are at the next call.
Net = Callable[[Mapping[str, Array]], Mapping[str, Array]]
OpenNet = Callable[[str, Shapes], Net]  # one of PLAIN_NETS, for inputs of these shapes


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    return missing_modules("onnxruntime")


def open_side(task: Task) -> OpenSide:
    """A session for each net: default options but for the threads. Raises NotAvailableError, PackageError."""
    return _onnxruntime_side("onnxruntime", task, CPU, {})


class OnCuda:
    """ONNX Runtime's CUDA provider, a side of its own: `session.run`, from arrays to arrays."""

    # TF32 would be another arithmetic than everyone else's in fp32. The search measures convolutions in the
    # first run of a shape, and is the library's default; ours take its quick choice.
    SETTINGS: Mapping[str, str] = {"cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"}

    @staticmethod
    def available(task: Task) -> str | None:
        """None if it can run here, else the reason."""
        return cuda_available()

    @classmethod
    def open_side(cls, task: Task) -> OpenSide:
        """A session for each net. Raises NotAvailableError, PackageError, MemoryLimitError, BackendError."""
        return _onnxruntime_side("onnxruntime-cuda", task, CUDA, cls.SETTINGS)


def _onnxruntime_side(name: str, task: Task, provider: str, settings: Mapping[str, str]) -> OpenSide:
    package = open_plain_package(task)
    options = onnxruntime.library().SessionOptions()  # what a user gets: not the settings of our own sessions
    options.log_severity_level = 3
    options.intra_op_num_threads = thread_count(task.threads)
    nets: dict[str, Net] = {}
    for net in PLAIN_NETS:
        file = package.manifest.nets[net]
        # Weights of an opened checkpoint are not beside the graph.
        options.add_session_config_entry(onnxruntime.WEIGHTS_FOLDER, str(package.weights_folder(net)))
        session = open_on(provider, package.path(file.graph), options, settings, culprit=net)
        nets[net] = partial(_run, session, [output.name for output in file.spec.outputs])
    versions = {
        "onnxruntime": str(onnxruntime.library().__version__),
        "provider": provider,
        "threads": str(options.intra_op_num_threads),
        "graph_optimization": str(options.graph_optimization_level.name),
        **settings,
    }
    return plain_side(name, package, lambda net, shapes: nets[net], versions)


def open_on(
    provider: str,
    path: Path,
    options: Any,
    settings: Mapping[str, str],
    *,
    culprit: str,
    content: bytes | None = None,
) -> Any:
    """`open_session` on the CPU or on CUDA, where `settings` are the provider's.

    Raises PackageError, MemoryLimitError, and BackendError where the CUDA provider does not load.
    """
    providers: list[Any] = [CPU]
    if provider == CUDA:
        onnxruntime.library().preload_dlls()  # CUDA's and cuDNN's, where pip put them
        providers = [(CUDA, dict(settings)), CPU]  # the CPU computes shapes
    session = onnxruntime.open_session(path, options, providers, culprit=culprit, content=content)
    if provider not in session.get_providers():
        raise BackendError(
            "onnxruntime's CUDA provider did not load, and the CPU would run the net",
            expected="the CUDA and cuDNN libraries of its own version",
            fix='Install them: pip install "onnxruntime-gpu[cuda,cudnn]"',
        )
    return session


def _run(session: Any, outputs: list[str], feeds: Any) -> dict[str, Any]:
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))


def plain_side(name: str, package: Package, open_net: OpenNet, versions: Mapping[str, str]) -> OpenSide:
    """Nets of an engine, and the loop around them."""
    return OpenSide(name=name, versions=versions, makers=makers_of(_PlainLoop(name, package, open_net)))


def pictures_of(package: Package, open_net: OpenNet, cases: Iterable[Case]) -> Iterator[Array]:
    """The loop's pictures of these cases, (N, H, W, 3) uint8."""
    loop = _PlainLoop("", package, open_net)
    for case in cases:
        with ExitStack() as stack:
            yield loop.picture(case, stack).call()["image"]


class _PlainLoop:
    """The workloads, by the names of the contract."""

    def __init__(self, name: str, package: Package, open_net: OpenNet) -> None:
        self._name, self._package, self._open_net = name, package, open_net
        self._manifest = package.manifest
        self._dtype = DTYPES[package.manifest.nets["unet_whole"].spec.inputs[0].dtype]
        self._latest: dict[str, tuple[Shapes, Net]] = {}  # by net: the shapes, and it open for them

    def _net(self, name: str, case: Case) -> Net:
        shapes = input_shapes(self._manifest.nets[name].spec, sizes_of(case, self._manifest))
        if name not in self._latest or self._latest[name][0] != shapes:
            self._latest.pop(name, None)  # before there are two in memory
            self._latest[name] = shapes, self._open_net(name, shapes)
        return self._latest[name][1]

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        return self._one_net("text_encoder", case)

    def text_encoder_2(self, case: Case, stack: ExitStack) -> Work:
        return self._one_net("text_encoder_2", case)

    def _one_net(self, name: str, case: Case) -> Work:
        inputs, net = inputs_of(self._package, name, case), self._net(name, case)
        return Work(call=lambda: net(inputs))

    def unet(self, case: Case, stack: ExitStack) -> Work:
        feeds = whole_inputs(case, self._manifest, inputs_of(self._package, "unet", case))
        for name in ("sample", "encoder_hidden_states"):  # the others stay float32
            feeds[name] = narrow(feeds[name], self._dtype)
        net = self._net("unet_whole", case)
        return Work(call=lambda: {"prediction": net(feeds)["out_sample"]})

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        feeds = {"latent": narrow(inputs_of(self._package, "vae_decoder", case)["latent"], self._dtype)}
        net = self._net("vae_decoder", case)
        return Work(call=lambda: {"image": net(feeds)["image"]})

    def picture(self, case: Case, stack: ExitStack) -> Work:
        if self._manifest.vectors or self._manifest.image_latents:  # it needs more than a prompt
            raise not_available(self._name, "picture")
        nets = {name: self._net(name, case) for name in PLAIN_NETS}
        return Work(call=lambda: {"image": self._draw(case, nets)})

    def _draw(self, case: Case, nets: Mapping[str, Net]) -> Array:
        """Prompt to (N, H, W, 3) uint8."""
        table, noise = schedule_of(case, self._manifest)
        start = noise()
        context = nets["text_encoder"](inputs_of(self._package, "text_encoder", case))["context"]  # (P, T, D)
        context = np.repeat(context, case.pictures, axis=0)  # (B, T, D)

        def predict(latent: Array, row: int) -> Array:
            feeds = {
                "sample": narrow(guided_batch(latent, case.guided), self._dtype),
                "timestep": np.full(case.batch, table.t[row], np.float32),
                "encoder_hidden_states": context,
            }
            prediction = nets["unet_whole"](feeds)["out_sample"]
            return guide(prediction, case.guidance_scale, 0.0, case.guided)

        *_, last = answered(denoise(table, noise, at_once(predict), table.init * start))
        return nets["vae_decoder"]({"latent": narrow(last.latent, self._dtype)})["image"]
