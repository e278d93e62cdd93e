"""Text encoders with embeddings beyond their vocabulary, against transformers with a larger table."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from latentrt.checkpoints.graphs.extra_embeddings import add_extra_embeddings
from latentrt.checkpoints.precision.islands import run_in_fp32
from latentrt.engines import spec
from latentrt.engines.errors import CheckpointError
from latentrt.engines.tolerances import NET_RELATIVE_L2
from latentrt.export.nets.clip import ClipText
from tests.export.conftest import relative_l2
from tests.export.traced import runner, traced

VOCABULARY, WIDTH, POOLED, END = 60, 32, 24, 59
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
NUMPY = {"fp32": np.float32, "fp16": np.float16}
OLD_END = 2  # of published configs: such an encoder ends a prompt at its largest id


def encoder(end: int, vocabulary: int = VOCABULARY) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=POOLED,
        bos_token_id=0,
        pad_token_id=end,
        eos_token_id=end,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    net = CLIPTextModelWithProjection(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def graph_of(net: Any, folder: Path, dtype: str) -> tuple[ir.Model, spec.NetSpec]:
    contract = spec.text_encoder(
        tokens=77, width=WIDTH, pooled=POOLED, float_dtype=str(DTYPES[dtype]).removeprefix("torch.")
    )
    return traced(ClipText(net, 3, normalised=False), contract, folder, DTYPES[dtype]), contract


def prompts(*, extra: int) -> np.ndarray:
    """Prompts of 20 and of 75 tokens, with ids up to `extra` beyond the vocabulary."""
    random = np.random.default_rng(0)
    ids = random.integers(0, END, (2, 77)).astype(np.int32)
    if extra:
        ids[0, [3, 4, 11]] = VOCABULARY, VOCABULARY + extra - 1, VOCABULARY
        ids[1, [0, 70]] = VOCABULARY + extra - 1, VOCABULARY + 1
    ids[0, 21:], ids[1, 76:] = END, END
    return ids


def wanted(net: Any, ids: np.ndarray, extra: np.ndarray) -> Any:
    """transformers' answer, with the extra rows behind its own table. It finds a prompt's end by its id."""
    larger = encoder(END)
    larger.load_state_dict({name: value.float() for name, value in net.state_dict().items()})
    larger.resize_token_embeddings(VOCABULARY + len(extra), mean_resizing=False)
    with torch.no_grad():
        larger.get_input_embeddings().weight[VOCABULARY:] = torch.from_numpy(extra).float()
        return larger.eval()(torch.from_numpy(ids).long(), output_hidden_states=True)


def check(found: dict[str, Any], reference: Any, dtype: str) -> None:
    assert relative_l2(found["context"], reference.hidden_states[-2]) < NET_RELATIVE_L2[dtype]
    assert relative_l2(found["pooled"], reference.text_embeds) < NET_RELATIVE_L2[dtype]


@pytest.mark.parametrize(
    ("end", "dtype", "island"),
    [(END, "fp32", False), (OLD_END, "fp32", False), (OLD_END, "fp16", False), (END, "fp16", True)],
)
def test_ids_beyond_the_vocabulary_read_the_extra_rows(
    tmp_path: Path, end: int, dtype: str, island: bool
) -> None:
    net = encoder(end)
    model, contract = graph_of(net, tmp_path, dtype)
    if island:
        run_in_fp32(
            model, [node.name or "" for node in model.graph if "token_embedding" in (node.name or "")]
        )
    run = runner(model, add_extra_embeddings(model, contract), tmp_path / "model.onnx")
    extra = np.random.default_rng(1).standard_normal((5, WIDTH)).astype(NUMPY[dtype]) / 4
    ids = prompts(extra=5)
    found = run(input_ids=ids, clip_skip=np.zeros(1, np.int32), extra_embeddings=extra)
    check(found, wanted(net, ids, extra), dtype)
    others = wanted(net, ids, extra[::-1].copy())
    assert relative_l2(found["context"], others.hidden_states[-2]) > 0.05, "which row does not matter"


@pytest.mark.parametrize(("end", "dtype"), [(END, "fp32"), (OLD_END, "fp32"), (OLD_END, "fp16")])
def test_without_such_ids_no_bit_changes(tmp_path: Path, end: int, dtype: str) -> None:
    model, contract = graph_of(encoder(end), tmp_path, dtype)
    arrays: dict[str, Any] = {"input_ids": prompts(extra=0), "clip_skip": np.zeros(1, np.int32)}
    plain = runner(model.clone(), contract, tmp_path / "plain.onnx")(**arrays)
    wider = add_extra_embeddings(model, contract)
    run = runner(model, wider, tmp_path / "model.onnx")
    unread = np.full((3, WIDTH), np.nan, NUMPY[dtype])
    for extra in (spec.no_extra_embeddings(wider), {"extra_embeddings": unread}):
        found = run(**arrays, **extra)
        assert all(np.array_equal(found[name], plain[name]) for name in plain)


def test_the_contract_has_the_input_behind_its_own(tmp_path: Path) -> None:
    model, contract = graph_of(encoder(OLD_END), tmp_path, "fp32")
    wider = add_extra_embeddings(model, contract)
    assert wider.inputs[:-1] == contract.inputs
    assert wider.outputs == contract.outputs
    assert wider.inputs[-1] == spec.TensorSpec(name="extra_embeddings", dtype="float32", shape=("E", WIDTH))
    assert {name: array.shape for name, array in spec.no_extra_embeddings(wider).items()} == {
        "extra_embeddings": (1, WIDTH)
    }
    assert spec.no_extra_embeddings(contract) == {}, "a package of before has none"


def test_a_graph_without_a_table_is_refused() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["":23]>
        g (int32[P, 77] input_ids) => (float[P, 77] context) { context = Cast <to = 1> (input_ids) }""")
    contract = spec.text_encoder(tokens=77, width=8, float_dtype="float32")
    with pytest.raises(CheckpointError, match="looks its ids up in 0 tables; expected one table"):
        add_extra_embeddings(model, contract)
