"""The loop that a user writes around exported graphs: the UNet as it is, everything between nets in NumPy.

Nothing is hoisted out of the UNet and nothing is lowered; the sampler's table and guidance are latentrt's
own, so that whatever differs from ours is the engine's doing and the graph's. The sides here are around plain
ONNX Runtime sessions, as anyone would open them; other engines share the loop.

On a GPU the loop is the same: every net gets arrays and returns arrays, so what lies between two nets goes
through the host's memory. A latent at 512x512 has 64 KB, which takes microseconds beside a UNet's
milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.errors import BackendError
from ...engines.onnxruntime import session as onnxruntime
from ...engines.onnxruntime.nets import CPU, CUDA, cuda_available
from ...engines.package import Package
from ...engines.spec import DTYPES, Array
from ...runtime.loop.denoise import denoise, guide, guided_batch, narrow
from ...runtime.prompts.tokenizer import ClipTokenizer
from ..case import Case, net_inputs, schedule_of, whole_inputs
from .contract import OpenSide, Task, Work, makers_of, missing_modules, not_available, open_plain_package

PLAIN_NETS = ("text_encoder", "unet_whole", "vae_decoder")
Net = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # inputs by name -> outputs by name
OpenNet = Callable[[str, Case], Net]  # of PLAIN_NETS, for the shapes of a case


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    del task
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
        del task
        return cuda_available()

    @classmethod
    def open_side(cls, task: Task) -> OpenSide:
        """A session for each net. Raises NotAvailableError, PackageError, MemoryLimitError, BackendError."""
        return _onnxruntime_side("onnxruntime-cuda", task, CUDA, cls.SETTINGS)


def _onnxruntime_side(name: str, task: Task, provider: str, settings: Mapping[str, str]) -> OpenSide:
    package = open_plain_package(task)
    options = onnxruntime.library().SessionOptions()  # what a user gets: not the settings of our own sessions
    options.log_severity_level = 3
    options.intra_op_num_threads = task.threads or onnxruntime.usable_processors()
    nets: dict[str, Net] = {}
    for net in PLAIN_NETS:
        file = package.manifest.nets[net]
        session = open_on(provider, package.path(file.graph), options, settings, culprit=net)
        nets[net] = partial(_run, session, [output.name for output in file.spec.outputs])
    resources = ExitStack()
    resources.callback(nets.clear)
    versions = {
        "onnxruntime": str(onnxruntime.library().__version__),
        "provider": provider,
        "threads": str(options.intra_op_num_threads),
        "graph_optimization": str(options.graph_optimization_level.name),
        **settings,
    }
    return plain_side(name, package, lambda net, case: nets[net], versions, resources)


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
            fix='Install them: pip install "onnxruntime-gpu[cuda,cudnn]".',
        )
    return session


def _run(session: Any, outputs: list[str], feeds: Any) -> dict[str, Any]:
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))


def plain_side(
    name: str, package: Package, open_net: OpenNet, versions: Mapping[str, str], resources: ExitStack
) -> OpenSide:
    """Nets of an engine, and the loop around them.

    What a net of `open_net` returns must stay as it is at its next call; `resources` are freed at the end.
    """
    plain = _PlainLoop(name, package, open_net)
    return OpenSide(name=name, versions=versions, makers=makers_of(plain), resources=resources)


class _PlainLoop:
    """The workloads, by the names of the contract."""

    def __init__(self, name: str, package: Package, open_net: OpenNet) -> None:
        self._name, self._manifest, self._open_net = name, package.manifest, open_net
        self._tokenizer = ClipTokenizer.open(package.root / "tokenizer")
        self._dtype = DTYPES[package.manifest.nets["unet_whole"].spec.inputs[0].dtype]

    def _inputs(self, workload: str, case: Case) -> dict[str, Array]:
        return net_inputs(workload, case, self._manifest, self._tokenizer)

    def text_encoder(self, case: Case, stack: ExitStack) -> Work:
        inputs, net = self._inputs("text_encoder", case), self._open_net("text_encoder", case)
        return Work(call=lambda: net(inputs))

    def unet(self, case: Case, stack: ExitStack) -> Work:
        feeds = whole_inputs(case, self._manifest, self._inputs("unet", case))
        for name in ("sample", "encoder_hidden_states"):  # the others stay float32
            feeds[name] = narrow(feeds[name], self._dtype)
        net = self._open_net("unet_whole", case)
        return Work(call=lambda: {"prediction": net(feeds)["out_sample"]})

    def vae_decoder(self, case: Case, stack: ExitStack) -> Work:
        feeds = {"latent": narrow(self._inputs("vae_decoder", case)["latent"], self._dtype)}
        net = self._open_net("vae_decoder", case)
        return Work(call=lambda: {"image": net(feeds)["image"]})

    def picture(self, case: Case, stack: ExitStack) -> Work:
        if self._manifest.vectors or self._manifest.image_latents:  # it needs more than a prompt
            raise not_available(self._name, "picture")
        nets = {name: self._open_net(name, case) for name in PLAIN_NETS}
        return Work(call=lambda: {"image": self._draw(case, nets)})

    def _draw(self, case: Case, nets: Mapping[str, Net]) -> Array:
        """Prompt to (N, H, W, 3) uint8."""
        table, noise = schedule_of(case, self._manifest)
        start = noise()
        context = nets["text_encoder"](self._inputs("text_encoder", case))["context"]  # (P, T, D)
        context = np.repeat(context, case.pictures, axis=0)  # (B, T, D)

        def predict(latent: Array, row: int) -> Array:
            feeds = {
                "sample": narrow(guided_batch(latent, case.guided), self._dtype),
                "timestep": np.full(case.batch, table.t[row], np.float32),
                "encoder_hidden_states": context,
            }
            prediction = nets["unet_whole"](feeds)["out_sample"]
            return guide(prediction, case.guidance_scale, 0.0, case.guided)

        *_, last = denoise(table, noise, predict, table.init * start)
        return nets["vae_decoder"]({"latent": narrow(last.latent, self._dtype)})["image"]
