"""A checkpoint that fp16 cannot compute, and nets on ONNX Runtime that round where fp16 does."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.backend import MemoryLedger
from latentrt.engines.net_weights import changed_names, changed_values
from latentrt.engines.package import Package, write_manifest
from latentrt.engines.spec import Array, NetSpec
from tests.recipes import Recipe, make_checkpoint

# One level each, so that tracing takes seconds: a resnet, attention to itself and to the text, a resample.
RECIPE = Recipe(
    unet={
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 16,
    },
    text={
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 77,
        "vocab_size": 700,
        "bos_token_id": 698,
        "eos_token_id": 699,
        "projection_dim": 32,
        "hidden_act": "quick_gelu",
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModel"],
    },
    vae={
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.18215,
    },
)
FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}

# Component -> how its tensors' names end or begin -> factor. Every weight stays within fp16.
SCALED: dict[str, dict[str, float]] = {
    # The MLP's hidden values, and with them the residual stream; the final norm takes the factor out again.
    "text_encoder": {"mlp.fc1.": 1e5},
    "unet": {
        # A convolution before a norm; in the second block together with the time embedding that is added.
        "down_blocks.0.resnets.0.conv1.": 2e5,
        "up_blocks.0.resnets.0.conv1.": 5e5,
        "up_blocks.0.resnets.0.time_emb_proj.": 5e5,
        # Scores of both attentions.
        "attn1.to_q.": 400.0,
        "attn1.to_k.": 400.0,
        "attn2.to_q.": 400.0,
        "attn2.to_k.": 400.0,
    },
    # The whole residual stream, as in SDXL's VAE: all that writes to it. Each half's last norm takes
    # the factor out.
    "vae": {
        "coder.conv_in.": 1e5,
        "downsamplers.0.conv.bias": 1e5,
        ".conv2.": 1e5,
        "conv_shortcut.bias": 1e5,
        "upsamplers.0.conv.bias": 1e5,
        "to_out.0.": 1e5,
    },
}


def make_overflowing(root: Path) -> Path:
    """The checkpoint, stored in fp16."""
    make_checkpoint(RECIPE, root, dtype=torch.float32, old_names=False)
    for component, factors in SCALED.items():
        path = root / component / FILES[component]
        tensors = load_file(path)
        for name in tensors:
            for part, factor in factors.items():
                if part in name:
                    tensors[name] = tensors[name] * factor
        for name, tensor in tensors.items():
            tensors[name] = tensor.half()
            assert tensors[name].isfinite().all(), name
        save_file(tensors, path, metadata={"format": "pt"})
    return root


class Rounded:
    """A net whose every fp16 value is rounded to fp16.

    ONNX Runtime's CPU provider computes most fp16 operators in float32 between casts that it inserts, and
    drops casts that meet: fp16 -> fp32 -> fp16 -> fp32, even with all optimisations disabled. (300 * 100 * 9
    through Conv, then times 0.01, gives 2700 and not infinity.) Two Identity nodes behind each value keep
    those casts apart. One is not enough: a lone fp16 node between casts becomes a float32 one.
    `test_rounding_is_real` shows that they do what this says.
    """

    def __init__(self, graph: Path, spec: NetSpec, changed: Mapping[str, Array] | None = None) -> None:
        self.spec = spec
        model = ir.load(graph)
        for name, values in (changed or {}).items():
            weight = model.graph.initializers[name]
            assert weight.dtype is not None
            weight.const_value = ir.tensor(values.astype(weight.dtype.numpy()), name=name)
        keep_apart(model)
        path = graph.with_suffix(".rounded.onnx")
        ir.save(model, path)
        self._session = session(path)

    def __call__(self, **arrays: Any) -> dict[str, np.ndarray]:
        """Every output by name."""
        self.spec.check(arrays)
        names = [item.name for item in self.spec.outputs]
        return dict(zip(names, self._session.run(names, arrays), strict=True))

    @property
    def memory(self) -> MemoryLedger:
        return MemoryLedger(weights=0, activations=None, io=0)

    def close(self) -> None:
        pass

    def __enter__(self) -> "Rounded":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class RoundedBackend:
    """For `Pipeline`, in the place of a HostBackend."""

    def refusal(self) -> None:
        return None

    def describe(self) -> str:
        return "rounded"

    def open_net(self, package: Package, name: str, *, threads: int | None) -> Rounded:
        return rounded(package, name)[name]


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def keep_apart(model: ir.Model) -> None:
    """Put two Identity nodes behind every fp16 value that a node writes."""
    for node in list(model.graph):
        for value in node.outputs:
            assert value.dtype is not None, value
            if value.dtype != ir.DataType.FLOAT16 or value.is_graph_output():
                continue
            chain = [ir.node("Identity", [value], name=f"{value.name}/a")]
            chain.append(ir.node("Identity", chain[0].outputs, name=f"{value.name}/b"))
            uses = list(value.uses())
            for link in chain:
                link.outputs[0].name, link.outputs[0].type = f"{link.name}.out", ir.TensorType(value.dtype)
            for use in uses:
                if use.node is not chain[0]:
                    use.node.replace_input_with(use.idx, chain[1].outputs[0])
            model.graph.insert_after(node, chain)


def rounded(package: Package, *names: str) -> dict[str, Rounded]:
    """Nets of a package, all of them by default, with the weights that it has others for."""
    nets = package.manifest.nets
    return {
        name: Rounded(
            package.path(nets[name].graph),
            nets[name].spec,
            changed_values(package, name, changed_names(package, name)),
        )
        for name in names or nets
    }


def with_nets(package: Package, root: Path, nets: dict[str, Any]) -> Package:
    """`package` with other graphs, which are in `root` already."""
    write_manifest(root, replace(package.manifest, nets=nets))
    return Package.open(root)
