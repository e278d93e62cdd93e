import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from latentrt.checkpoints.graphs.hoist import hoist
from latentrt.engines.errors import CheckpointError
from tests.export.conftest import Exported

ATTENTION = r"\.attentions\.\d+\.transformer_blocks\.0\.attn2\.to_[kv]"


def latents(exported: Exported, rows: int, height: int, width: int, tokens: int) -> tuple[Any, Any]:
    random = np.random.default_rng(rows * height)
    manifest = exported.package.manifest
    dtype = np.float16 if manifest.dtype == "fp16" else np.float32
    latent = random.standard_normal((rows, 4, height, width)).astype(dtype)
    return latent, random.standard_normal((rows, tokens, manifest.context_width)).astype(dtype)


def by_invariants(exported: Exported, latent: Any, context: Any, times: Any, row: int) -> Any:
    invariants = exported.run("unet_context", context=context)
    table = exported.run("unet_time", timestep=times)
    one = {name: value[[row] * len(latent)] for name, value in table.items()}
    return exported.run("unet", latent=latent, **invariants, **one)["prediction"]


def test_invariants_are_named_after_modules_and_shaped(sd1: Exported) -> None:
    nets = sd1.package.manifest.nets
    context = nets["unet_context"].spec.outputs
    # One cross-attention in the down, one in the middle, two in the up blocks; keys and values of each.
    assert len(context) == 8
    blocks = r"context\.(down_blocks\.0|mid_block|up_blocks\.1)"
    assert all(re.fullmatch(blocks + ATTENTION, item.name) for item in context)
    first = context[0]
    assert first.name == "context.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert first.shape == ("B", 3, "T", 16)
    time = nets["unet_time"].spec.outputs
    assert len(time) == 8
    assert all(re.fullmatch(r"time\..*resnets\.\d\.time_emb_proj", item.name) for item in time)
    assert time[0].shape == ("S", 48)
    loop = nets["unet"].spec.inputs
    assert [item.name for item in loop] == ["latent", *(item.name for item in (*context, *time))]
    assert [item.shape for item in loop[-8:]] == [("B", *item.shape[1:]) for item in time]


def test_heads_by_block(sd2: Exported) -> None:
    shapes = {item.name: item.shape for item in sd2.package.manifest.nets["unet_context"].spec.outputs}
    prefix, suffix = "context.", ".transformer_blocks.0.attn2.to_v"
    assert shapes[f"{prefix}down_blocks.0.attentions.0{suffix}"] == ("B", 2, "T", 16)
    assert shapes[f"{prefix}down_blocks.1.attentions.0{suffix}"] == ("B", 3, "T", 16)
    assert shapes[f"{prefix}mid_block.attentions.0{suffix}"] == ("B", 1, "T", 48)


@pytest.mark.parametrize(
    ("rows", "height", "width", "tokens"), [(1, 8, 8, 77), (2, 7, 10, 154), (6, 5, 3, 77)]
)
def test_the_loop_equals_the_whole_bit_by_bit(
    sd1: Exported, rows: int, height: int, width: int, tokens: int
) -> None:
    latent, context = latents(sd1, rows, height, width, tokens)
    times = np.array([999.0, 501.5, 1.0], np.float32)
    found = by_invariants(sd1, latent, context, times, row=1)
    timestep = np.full(rows, 501.5, np.float32)
    whole = sd1.run("unet_whole", sample=latent, timestep=timestep, encoder_hidden_states=context)
    assert np.array_equal(found, whole["out_sample"])


def test_rows_at_different_timesteps_equal_calls_of_their_own_bit_by_bit(sd1: Exported) -> None:
    latent, context = latents(sd1, 3, 7, 10, 77)
    invariants = sd1.run("unet_context", context=context)
    invariants |= sd1.run("unet_time", timestep=np.array([999.0, 501.5, 1.0], np.float32))
    together = sd1.run("unet", latent=latent, **invariants)["prediction"]
    for row in range(3):
        one = slice(row, row + 1)
        alone = sd1.run(
            "unet", latent=latent[one], **{name: value[one] for name, value in invariants.items()}
        )
        assert np.array_equal(together[one], alone["prediction"])


def test_nothing_in_the_loop_can_be_hoisted_any_more(sd1: Exported) -> None:
    package = sd1.package
    model = ir.load(package.path(package.manifest.nets["unet"].graph))
    depends: set[ir.Value] = {model.graph.inputs[0]}
    left: list[str] = []
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if depends.intersection(inputs):
            depends.update(node.outputs)
        elif not all(value.is_initializer() or _from_weights(value) for value in inputs):
            left.append(node.op_type)
    # A broadcast axis behind each projection of the time embedding costs nothing.
    assert set(left) == {"Unsqueeze"}


def _from_weights(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return value.is_initializer()
    return all(item is None or _from_weights(item) for item in producer.inputs)


def test_a_mixture_of_context_and_timestep_is_refused() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["":23]>
        g (float[B,4] sample, float[B] timestep, float[B,T,4] encoder_hidden_states)
        => (float[B,T,4] out_sample) {
            axes = Constant <value = int64[2] {1,2}> ()
            t = Unsqueeze(timestep, axes)
            both = Mul(encoder_hidden_states, t)
            x = Unsqueeze(sample, axes)
            out_sample = Add(both, both)
        }""")
    body = model.graph[-1]
    body.replace_input_with(1, model.graph.inputs[0])
    with pytest.raises(CheckpointError, match="'both' from the context and the timestep together"):
        hoist(model)
