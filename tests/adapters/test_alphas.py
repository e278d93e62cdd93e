"""Alphas and ranks of whole files, against PEFT's own merged weights in float64.

diffusers reads such files otherwise (per-module alphas of attention are lost), so PEFT gets its patterns here
by hand; what it holds is then written in each trainer's names.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from latentrt.adapters.binding import BoundAdapter, check_alphas
from latentrt.adapters.files import read_adapter
from latentrt.adapters.keys import flat
from latentrt.adapters.merging import merged
from latentrt.engines.errors import AdapterError
from tests.adapters.tiny import assert_near, bound, modules, normal, targets, weights, write
from tests.export.ldm_files import unet_to_ldm

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
Q, K, V, OUT = (f"{BLOCK}.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
CONV = "down_blocks.0.resnets.0.conv1"
LAYER = "encoder.layers.0.self_attn"
PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


class Trained:
    """A net with PEFT's layers of random weights, in float64."""

    def __init__(
        self,
        family: str,
        part: str,
        ranks: dict[str, int],
        alphas: dict[str, float] | None = None,
        **more: Any,
    ) -> None:
        self.part, alphas = part, alphas or {}
        self.net = copy.deepcopy(modules(family)[part])
        names = dict(self.net.named_modules())
        # transformers' own names may lack the checkpoint's `text_model.`
        self.own = {name if name in names else name.removeprefix("text_model."): name for name in ranks}
        config = peft.LoraConfig(
            r=1,
            rank_pattern={own: ranks[name] for own, name in self.own.items()},
            alpha_pattern={own: alphas[name] for own, name in self.own.items() if name in alphas},
            target_modules=list(self.own),
            **more,
        )
        self.net = peft.inject_adapter_in_model(config, self.net).double()
        self.layers: dict[str, LoraLayer] = {
            self.own[name]: layer for name, layer in self.net.named_modules() if name in self.own
        }
        with torch.no_grad():
            for i, layer in enumerate(self.layers.values()):
                for j, tensor in enumerate((*layer.lora_A.parameters(), *layer.lora_B.parameters())):
                    tensor.copy_(normal(*tensor.shape, seed=2 * i + j))

    def arrays(self, name: str) -> dict[str, torch.Tensor]:
        a, b = self.layers[name].lora_A["default"], self.layers[name].lora_B["default"]
        found = {"lora_A.weight": a.weight, "lora_B.weight": b.weight}
        if b.bias is not None:
            found["lora_B.bias"] = b.bias
        return {key: x.detach().float() for key, x in found.items()}

    def kohya(self, name: str, module: str = "") -> dict[str, torch.Tensor]:
        arrays = self.arrays(name)
        stem = PREFIX[self.part] + flat(module or name)
        return {
            f"{stem}.lora_down.weight": arrays["lora_A.weight"],
            f"{stem}.lora_up.weight": arrays["lora_B.weight"],
        }

    def merged(self, name: str) -> dict[str, torch.Tensor]:
        layer: Any = copy.deepcopy(self.layers[name])
        layer.merge()
        base = layer.get_base_layer()
        return {
            f"{name}.{end}": x for end, x in (("weight", base.weight), ("bias", base.bias)) if x is not None
        }


def check(family: str, trained: Trained, adapter: BoundAdapter, names: list[str]) -> None:
    assert adapter.unused == ()
    assert adapter.applied == adapter.total
    changes = adapter.changes[trained.part]
    assert {name.rpartition(".")[0] for name in changes} == set(names)
    for name in names:
        for tensor, expected in trained.merged(name).items():
            base = weights(family)[trained.part][tensor].numpy()
            found = merged(base, [(changes[tensor], 1.0)] if tensor in changes else [])
            assert_near(found, expected)


def alphas_of(trained: Trained, alphas: dict[str, float], part: str) -> dict[str, torch.Tensor]:
    return {f"{PREFIX[part]}{flat(name)}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}


CASES: dict[str, tuple[str, str, dict[str, int], dict[str, float]]] = {
    "t1": ("sd1", "unet", {Q: 4, K: 4, V: 4}, {Q: 2, K: 1, V: 3}),
    "t2": (
        "sd1",
        "text_encoder",
        dict.fromkeys((f"text_model.{LAYER}.{x}_proj" for x in ("q", "k", "v", "out")), 4),
        {
            f"text_model.{LAYER}.{x}_proj": a
            for x, a in zip(("q", "k", "v", "out"), (4, 1, 2, 2), strict=True)
        },
    ),
    "t3": ("sd1", "unet", {Q: 4, K: 2, V: 8}, {Q: 4, K: 2, V: 4}),
    "t3 without alphas": ("sdxl", "unet", {"mid_block.attentions.0.proj_in": 64, CONV: 16}, {}),
    "t4": ("sd1", "unet", {CONV: 4, Q: 4, OUT: 4}, {CONV: 2, Q: 4, OUT: 4}),
    "t5": ("sd1", "unet", {Q: 4, K: 4, V: 2}, {Q: 1}),
    "t22": ("sd2", "unet", {CONV: 2, f"{BLOCK}.ff.net.0.proj": 3, "time_embedding.linear_1": 1}, {CONV: 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_t1_to_t5_each_module_has_its_own_alpha_and_rank(case: str, tmp_path: Path) -> None:
    """T1, T2, T3, T4, T5."""
    family, part, ranks, alphas = CASES[case]
    known = {name: alphas.get(name, rank) for name, rank in ranks.items()}  # PEFT has no "as the rank"
    trained = Trained(family, part, ranks, known)
    tensors = {key: x for name in ranks for key, x in trained.kohya(name).items()}
    path = write(tmp_path / "a.safetensors", tensors | alphas_of(trained, alphas, part))
    check(family, trained, bound(path, targets(family)), list(ranks))


@pytest.mark.parametrize("form", [(), (1,)])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.int64])
def test_an_alpha_of_any_type(kind: torch.dtype, form: tuple[int, ...], tmp_path: Path) -> None:
    trained = Trained("sd1", "unet", {Q: 4}, {Q: 3})
    alpha = {f"lora_unet_{flat(Q)}.alpha": torch.full(form, 3, dtype=kind)}
    path = write(tmp_path / "a.safetensors", trained.kohya(Q) | alpha)
    check("sd1", trained, bound(path, targets("sd1")), [Q])


def test_an_alpha_of_0_is_taken_as_it_is_and_logged(tmp_path: Path, logged: list[str]) -> None:
    trained = Trained("sd1", "unet", {Q: 4})
    alpha = {f"lora_unet_{flat(Q)}.alpha": torch.tensor(0.0)}
    found = bound(write(tmp_path / "a.safetensors", trained.kohya(Q) | alpha), targets("sd1"))
    base = weights("sd1")["unet"][f"{Q}.weight"].numpy()
    assert (merged(base, [(found.changes["unet"][f"{Q}.weight"], 1.0)]) == base).all()
    assert any("1 modules have alpha 0" in line and flat(Q) in line for line in logged)


@pytest.mark.parametrize("bias", [True, False])
def test_t10_t33_pefts_names_with_what_diffusers_notes(bias: bool, tmp_path: Path) -> None:
    trained = Trained(
        "sd1",
        "unet",
        {OUT: 4, CONV: 2} if bias else {Q: 4, CONV: 2},  # to_q has no bias of its own
        {CONV: 5},
        lora_alpha=3,
        use_rslora=not bias,
        lora_bias=bias,
    )
    names = list(trained.layers)
    tensors = {f"unet.{name}.{key}": x for name in names for key, x in trained.arrays(name).items()}
    noted = {"unet.r": 1, "unet.lora_alpha": 3, "unet.alpha_pattern": {CONV: 5}, "unet.use_rslora": not bias}
    metadata = {"lora_adapter_metadata": json.dumps(noted)}
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    check("sd1", trained, bound(path, targets("sd1")), names)


@pytest.mark.parametrize(
    ("noted", "message"),
    [
        ("{", "that is not JSON"),
        ("[" * 100_000, "that is not JSON"),
        ("[]", "that is no object"),
        ('{"unet.lora_alpha": "x"}', "with unet.lora_alpha = x"),
        ('{"unet.lora_alpha": NaN}', "with unet.lora_alpha = nan"),
        ('{"unet.alpha_pattern": [1]}', r"with unet.alpha_pattern = \[1\]"),
        ('{"unet.alpha_pattern": {"(a+)+$": 1}}', "which is no name"),
        ('{"unet.alpha_pattern": {"a": true}}', "with a = True"),
    ],
)
def test_notes_that_are_not_diffusers(noted: str, message: str, tmp_path: Path) -> None:
    trained = Trained("sd1", "unet", {Q: 4})
    path = write(tmp_path / "a.safetensors", trained.kohya(Q), {"lora_adapter_metadata": noted})
    with pytest.raises(AdapterError, match=message):
        bound(path, targets("sd1"))


def test_t33_what_peft_writes_beside_its_file(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=3, alpha_pattern={K: 5}, target_modules=[Q, K], init_lora_weights=False
    )
    model: Any = peft.get_peft_model(copy.deepcopy(modules("sd1")["unet"]), config)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    adapter = bound(path, targets("sd1"))
    for name, layer in model.double().base_model.model.named_modules():
        if name in (Q, K):
            base = weights("sd1")["unet"][f"{name}.weight"]
            found = merged(base.numpy(), [(adapter.changes["unet"][f"{name}.weight"], 1.0)])
            assert_near(found, base.double() + layer.get_delta_weight("default"))
    before = adapter.sha256
    beside = tmp_path / "adapter_config.json"
    beside.write_text(beside.read_text().replace('"lora_alpha": 3', '"lora_alpha": 4'))
    assert bound(path, targets("sd1")).sha256 != before
    beside.write_text("{")
    with pytest.raises(AdapterError, match=r"has an adapter_config\.json that is not JSON"):
        bound(path, targets("sd1"))
    beside.unlink()
    assert bound(path, targets("sd1")).changes["unet"][f"{Q}.weight"].scale == 1


def test_a_configuration_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained("sd1", "unet", {Q: 4})
    path = write(tmp_path / "adapter_model.safetensors", trained.kohya(Q))
    (tmp_path / "adapter_config.json").write_text("{}")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read \(Permission denied\)"):
        bound(path, targets("sd1"))


GRAMMARS = {
    "kohya": ("lora_unet_{flat}", "lora_down.weight", "lora_up.weight"),
    "sgm": ("lora_unet_{sgm_flat}", "lora_down.weight", "lora_up.weight"),
    "peft": ("unet.{name}", "lora_A.weight", "lora_B.weight"),
    "peft with a name": ("unet.{name}", "lora_A.default.weight", "lora_B.default.weight"),
    "peft dump": ("base_model.model.{name}", "lora_A.weight", "lora_B.weight"),
    "peft dump of a pipeline": ("base_model.model.unet.{name}", "lora_A.weight", "lora_B.weight"),
    "wrapped twice": ("unet.{name}.base_layer", "lora_A.weight", "lora_B.weight"),
    "diffusers": ("unet.{name}", "lora.down.weight", "lora.up.weight"),
    "OneTrainer": ("diffusion_model.{sgm}", "lora_down.weight", "lora_up.weight"),
    "SimpleTuner": ("lycoris_{flat}", "lora_down.weight", "lora_up.weight"),
    "bare": ("{name}", "lora_down.weight", "lora_up.weight"),
    "underscores": ("unet_{flat}", "lora.down.weight", "lora.up.weight"),
    "underscores to the end": ("lora_unet_{flat}", "_lora.down.weight", "_lora.up.weight"),
    "without weight": ("unet.{name}", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_t10_t33_every_grammar_of_the_unet(family: str, grammar: str, tmp_path: Path) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    trained = Trained(family, "unet", {name: 2, "conv_in": 2})
    tensors = unet_to_ldm(weights(family)["unet"], modules(family)["unet"].config)
    sgm = dict(zip(weights(family)["unet"], tensors, strict=True))
    stem, down, up = GRAMMARS[grammar]
    stored: dict[str, torch.Tensor] = {}
    for module in trained.layers:
        original = sgm[f"{module}.weight"].removesuffix(".weight")
        start = stem.format(name=module, flat=flat(module), sgm=original, sgm_flat=flat(original))
        arrays = trained.arrays(module)
        start += "" if down.startswith("_") else "."
        stored |= {f"{start}{down}": arrays["lora_A.weight"], f"{start}{up}": arrays["lora_B.weight"]}
    found = bound(write(tmp_path / "a.safetensors", stored), targets(family))
    trained = Trained(family, "unet", {name: 2, "conv_in": 2}, lora_alpha=2)  # alpha as the rank
    check(family, trained, found, list(trained.layers))


def test_t8_t9_both_spellings_in_one_file_and_what_sdxl_reads_once_a_step(tmp_path: Path) -> None:
    """Some of latent-diffusion's names, some of diffusers': each is applied, and none goes before another."""
    spelled = {
        "add_embedding.linear_1": "label_emb_0_0",
        "add_embedding.linear_2": "add_embedding_linear_2",
        "time_embedding.linear_1": "time_embed_0",
        "time_embedding.linear_2": "time_embedding_linear_2",
        "conv_in": "input_blocks_0_0",
        "conv_out": "out_2",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "mid_block.attentions.0.proj_out": "mid_block_attentions_0_proj_out",
        "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_4_0_emb_layers_1",
        "down_blocks.2.attentions.0.proj_in": "down_blocks_2_attentions_0_proj_in",
    }
    alphas = {name: 1.0 + index for index, name in enumerate(spelled)}
    trained = Trained("sdxl", "unet", dict.fromkeys(spelled, 2), alphas)
    stored = {key: x for name, module in spelled.items() for key, x in trained.kohya(name, module).items()}
    stored |= {f"lora_unet_{spelled[name]}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
    found = bound(write(tmp_path / "a.safetensors", stored), targets("sdxl"))
    assert found.total == 3 * len(spelled)
    check("sdxl", trained, found, list(spelled))


OLD = {
    "unet": f"unet.{BLOCK}.attn1.processor.{{}}_lora",
    "text_encoder": f"text_encoder.text_model.{LAYER}.{{}}_lora",
}


@pytest.mark.parametrize("part", OLD)
def test_t33_attention_before_peft(part: str, tmp_path: Path) -> None:
    old = ("to_q", "to_k", "to_v", "to_out")
    now = (Q, K, V, OUT)
    if part == "text_encoder":
        now = tuple(f"text_model.{LAYER}.{name}_proj" for name in ("q", "k", "v", "out"))
    trained = Trained("sd1", part, dict.fromkeys(now, 2), lora_alpha=1)
    stored: dict[str, torch.Tensor] = {}
    for before, module in zip(old, now, strict=True):
        stem, arrays = OLD[part].format(before), trained.arrays(module)
        stored[f"{stem}.down.weight"] = arrays["lora_A.weight"]
        stored[f"{stem}.up.weight"] = arrays["lora_B.weight"]
        stored[f"{stem}.alpha"] = torch.tensor(1.0)
    check("sd1", trained, bound(write(tmp_path / "a.safetensors", stored), targets("sd1")), list(now))


@pytest.mark.parametrize(
    ("part", "stem", "down"),
    [
        ("text_encoder", "text_encoder.text_model.{}", "lora_linear_layer.down.weight"),
        ("text_encoder_2", "text_encoder_2.text_model.{}", "lora_linear_layer.down.weight"),
        ("text_encoder_2", "text_encoder_2.{}", "lora_A.weight"),
        ("text_encoder", "clip_l.text_model.{}", "lora_down.weight"),
        ("text_encoder_2", "text_encoders.clip_g.transformer.text_model.{}", "lora_down.weight"),
        ("text_encoder_2", "text_encoder_2_text_model_{flat}", "lora_linear_layer.down.weight"),
        ("text_encoder", "text_encoder_text_model_{flat}", "lora.down.weight"),
    ],
)
def test_t10_text_encoders(part: str, stem: str, down: str, tmp_path: Path) -> None:
    names = [f"text_model.encoder.layers.1.{end}" for end in ("mlp.fc1", "self_attn.q_proj")]
    trained = Trained("sdxl", part, dict.fromkeys(names, 2), lora_alpha=2)
    up = down.replace("down", "up").replace("lora_A", "lora_B")
    stored: dict[str, torch.Tensor] = {}
    for name in names:
        inside, arrays = name.removeprefix("text_model."), trained.arrays(name)
        start = stem.format(inside, flat=flat(inside))
        stored |= {f"{start}.{down}": arrays["lora_A.weight"], f"{start}.{up}": arrays["lora_B.weight"]}
    check("sdxl", trained, bound(write(tmp_path / "a.safetensors", stored), targets("sdxl")), names)


@pytest.mark.parametrize("stem", ["lora_te2_text_projection", "text_encoder_2.text_projection"])
def test_t6_t11_the_projection_of_the_second_encoder_alone(stem: str, tmp_path: Path) -> None:
    trained = Trained("sdxl", "text_encoder_2", {"text_projection": 2}, lora_alpha=2)
    arrays = trained.arrays("text_projection")
    stored = {
        f"{stem}.lora_down.weight": arrays["lora_A.weight"],
        f"{stem}.lora_up.weight": arrays["lora_B.weight"],
    }
    found = bound(write(tmp_path / "a.safetensors", stored), targets("sdxl"))
    check("sdxl", trained, found, ["text_projection"])


def test_t20_dora_of_peft(tmp_path: Path) -> None:
    names = {Q: 4, CONV: 2}
    trained = Trained("sd1", "unet", names, lora_alpha=3, use_dora=True)
    stored: dict[str, torch.Tensor] = {}
    for name, layer in trained.layers.items():
        vector: Any = layer.lora_magnitude_vector["default"]
        with torch.no_grad():
            vector.weight.mul_(1 + 0.1 * normal(*vector.weight.shape, seed=5).abs())
        stored |= {f"unet.{name}.{key}": x for key, x in trained.arrays(name).items()}
        stored[f"unet.{name}.lora_magnitude_vector"] = vector.weight.detach().float()
        vector.weight.data = stored[f"unet.{name}.lora_magnitude_vector"].double()
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3})}
    found = bound(write(tmp_path / "a.safetensors", stored, metadata), targets("sd1"))
    assert found.kinds == {"lora-dora": 2}
    check("sd1", trained, found, list(names))


def said_of(path: Path, check: Callable[[], object]) -> str:
    """What an AdapterError found and expects, without the tensor of the model."""
    with pytest.raises(AdapterError, match="has an alpha of") as caught:
        check()
    return f"{caught.value.found}; {caught.value.expected.split(', for ')[0]}; {caught.value.fix}"


RANKED = {
    "lora": {"lora_up.weight": (8, 2), "lora_down.weight": (2, 8)},
    "loha": {f"hada_w{one}_{end}": (8, 2) if end == "a" else (2, 8) for one in "12" for end in "ab"},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
    "glora": {"a1": (8, 2), "a2": (2, 8), "b1": (8, 2), "b2": (2, 8)},
    "glora before": {"a1": (2, 8), "a2": (8, 2), "b1": (2, 8), "b2": (8, 2)},
}


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize("alpha", [2.1e6, 1.9e6])
def test_without_a_model_the_same_is_said_of_an_alpha(kind: str, alpha: float, tmp_path: Path) -> None:
    """`inspect` knows of no model, and refuses what `bind` refuses."""
    stored = {f"lora_unet_layer.{part}": normal(*shape) for part, shape in RANKED[kind].items()}
    path = write(tmp_path / "x.safetensors", stored | {"lora_unet_layer.alpha": torch.tensor(alpha)})
    shapes = {"unet": {"layer.weight": (8, 8)}}
    if alpha < 2e6:
        check_alphas(read_adapter(path))
        bound(path, shapes)
    else:
        assert said_of(path, lambda: check_alphas(read_adapter(path))) == said_of(
            path, lambda: bound(path, shapes)
        )


@pytest.mark.parametrize("stem", ["unet.{}", "lora_unet_{flat}"])
def test_without_a_model_the_same_is_said_of_what_peft_noted(stem: str, tmp_path: Path) -> None:
    trained = Trained("sd1", "unet", {Q: 2})
    start = stem.format(Q, flat=flat(Q))
    stored = {f"{start}.{key}": x for key, x in trained.arrays(Q).items()}
    noted = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1e9})}
    path = write(tmp_path / "x.safetensors", stored, noted)
    assert said_of(path, lambda: check_alphas(read_adapter(path))) == said_of(
        path, lambda: bound(path, targets("sd1"))
    )


@pytest.mark.parametrize("alpha", [1e30, -1e30, 2.1e6])
def test_an_alpha_that_no_trainer_writes(alpha: float, tmp_path: Path) -> None:
    """It would draw noise. A whole LoKr has 1e10 for its "full dimension", and scales nothing."""
    name, width = f"lora_unet_{flat(Q)}", targets("sd1")["unet"][f"{Q}.weight"][0]
    pair = {f"{name}.lora_up.weight": normal(width, 2), f"{name}.lora_down.weight": normal(2, width)}
    path = write(tmp_path / "x.safetensors", pair | {f"{name}.alpha": torch.tensor(alpha)})
    with pytest.raises(
        AdapterError, match=rf"{name} has an alpha of .* for the rank 2.*at most 1e\+06 times"
    ):
        bound(path, targets("sd1"))
    noted = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha})}
    with pytest.raises(AdapterError, match="has an alpha of"):
        bound(write(path, pair, noted), targets("sd1"))
    whole = {f"{name}.lokr_w1": normal(2, 2), f"{name}.lokr_w2": normal(width // 2, width // 2)}
    found = bound(write(path, whole | {f"{name}.alpha": torch.tensor(1e10)}), targets("sd1"))
    check_alphas(read_adapter(path))
    assert found.changes["unet"][f"{Q}.weight"].scale == 1
