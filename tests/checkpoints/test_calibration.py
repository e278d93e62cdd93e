"""The picture that ranges are measured on: its prompts, its steps, and what each net is called with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.files.tokenizers import write_clip_tokenizer
from latentrt.checkpoints.precision.calibration import CALIBRATIONS, PROMPTS, STEPS, Calibration, token_ids
from latentrt.checkpoints.precision.ddim import Ddim
from latentrt.engines.errors import SamplerError
from latentrt.engines.noise_schedule import BETA_SCHEDULES
from latentrt.engines.spec import Array, guidance_embedding
from latentrt.export.nets import clip
from latentrt.runtime.prompts.tokenizer import ClipTokenizer
from tests.recipes import FAMILIES, make_checkpoint


def tokenize(folder: Path, texts: Sequence[str], length: int) -> Array:
    return ClipTokenizer.open(folder).encode(texts, length).ids


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("length", [77, 20])
def test_the_runtimes_tokenizer_gives_the_ids_of_transformers(
    tmp_path: Path, pad_token: str, length: int
) -> None:
    folder = write_clip_tokenizer(tmp_path / "tokenizer", pad_token)
    wanted = clip.tokenize(folder, PROMPTS, length)
    assert wanted.shape == (len(PROMPTS), length)
    assert np.array_equal(tokenize(folder, PROMPTS, length), wanted)


@pytest.mark.parametrize("predicted", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", [*BETA_SCHEDULES, "trained"])
@pytest.mark.parametrize(("train", "steps"), [(1000, STEPS), (77, 5)])
@pytest.mark.usefixtures("rounded_sqrt")
def test_every_step_is_diffusers_to_the_bit(predicted: str, betas: str, train: int, steps: int) -> None:
    config: dict[str, Any] = {"num_train_timesteps": train, "prediction_type": predicted}
    if betas == "trained":
        config["trained_betas"] = np.linspace(0.001, 0.02, train).tolist()
    else:
        config |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": betas}
    theirs = diffusers.DDIMScheduler(**config, clip_sample=False, timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    ours = Ddim.of({**config, "_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}, steps)
    assert list(ours.timesteps) == theirs.timesteps.tolist()
    random = np.random.default_rng(0)
    sample = random.standard_normal((1, 4, 8, 8), np.float32)
    for timestep in ours.timesteps:
        output = random.standard_normal(sample.shape, np.float32)
        found = ours.step(output, timestep, sample)
        moved = theirs.step(torch.from_numpy(output), timestep, torch.from_numpy(sample))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, moved.prev_sample.numpy())
        sample = found


def test_without_options_it_is_diffusers_default() -> None:
    ours = Ddim.of({"beta_start": None, "trained_betas": None, "prediction_type": None}, STEPS)
    theirs = diffusers.DDIMScheduler()
    np.testing.assert_array_equal(ours.alpha_bar, theirs.alphas_cumprod.numpy())
    assert ours.prediction_type == theirs.config["prediction_type"]


def test_betas_that_no_schedule_has() -> None:
    with pytest.raises(SamplerError, match=r"3 betas between 0.1 and 0.3"):
        Ddim.of({"trained_betas": [0.1, 0.2, 0.3]}, STEPS)


class Recorded:
    """Stands in for a net: remembers its inputs and returns what it is told."""

    def __init__(self, output: Any) -> None:
        self.output, self.calls = output, []

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self.calls.append(dict(arrays))
        return [self.output(arrays)]


def test_calibration_draws_a_picture(checkpoint: Path) -> None:
    calibration = Calibration(Checkpoint.open(checkpoint), tokenize)
    contexts = np.arange(4, dtype=np.float32)[:, None, None] * np.ones((4, 77, 80), np.float32)
    text, unet = Recorded(lambda _: contexts), Recorded(lambda arrays: arrays["sample"] * 0.5)
    vae = Recorded(lambda _: None)
    for component, net in {"text_encoder": text, "unet": unet, "vae_decoder": vae}.items():
        CALIBRATIONS[component](calibration, net)
    (ids,) = (call["input_ids"] for call in text.calls)
    assert (ids.shape, ids.dtype) == ((4, 77), np.int32)
    assert (ids[:, 0] == 698).all()
    assert [call["timestep"].tolist() for call in unet.calls] == [[t, t] for t in (999, 666, 333, 0)]
    assert len(unet.calls) == STEPS
    assert [call["encoder_hidden_states"][:, 0, 0].tolist() for call in unet.calls] == [
        [0, 1],
        [0, 2],
        [0, 3],
        [0, 1],
    ]
    for call in unet.calls:
        assert call["sample"].shape == (2, 4, 8, 8)
        assert 0.1 < call["sample"].std() <= 1.001
        assert np.array_equal(*call["sample"])
    assert [call["latent"].shape for call in vae.calls] == [(1, 4, 8, 8)] * 2


def test_calibration_without_the_net_before(checkpoint: Path) -> None:
    unet, vae = Recorded(lambda arrays: arrays["sample"]), Recorded(lambda _: None)
    Calibration(Checkpoint.open(checkpoint), tokenize).denoise(unet)
    assert unet.calls[0]["encoder_hidden_states"].shape == (2, 77, 80)
    Calibration(Checkpoint.open(checkpoint), tokenize).decode(vae)
    assert 0.9 < vae.calls[0]["latent"].std() < 1.1


def test_the_prompts_of_calibration(checkpoint: Path) -> None:
    source = Checkpoint.open(checkpoint)
    ids = token_ids(source, "text_encoder", tokenize)
    assert ids.shape == (len(PROMPTS), 77)
    words = json.loads((checkpoint / "tokenizer" / "vocab.json").read_text())
    first, last = words["<|startoftext|>"], words["<|endoftext|>"]
    assert ids[0].tolist() == [first, *[last] * 76]
    assert list(ids[:, 0]) == [first] * 3
    assert last not in ids[2, :-1]  # the long one fills it


@pytest.mark.parametrize("width", [24, 25, 256])
def test_the_guidance_embedding_is_diffusers(width: int) -> None:
    pipeline = diffusers.LatentConsistencyModelPipeline
    wanted = pipeline.get_guidance_scale_embedding(None, torch.tensor([7.5]), embedding_dim=width)
    # torch rounds each frequency to float32, times 7500: angles are off by up to 2 units in the last place.
    atol = 2 * float(np.spacing(np.float32(7500)))
    np.testing.assert_allclose(guidance_embedding(8.5, width)[None], wanted, atol=atol)


def test_calibration_drives_the_nets_of_pictures(tmp_path: Path) -> None:
    source = Checkpoint.open(make_checkpoint(FAMILIES["unclip-tiny"], tmp_path / "unclip"))
    calls: list[dict[str, np.ndarray]] = []

    def net(output: Any) -> Any:
        return lambda arrays: [calls.append(arrays) or output(arrays)]

    alone = Calibration(source, tokenize)
    alone.noise_embeddings(net(lambda arrays: arrays["noise"]))
    assert [call["image_embeds"].shape for call in calls] == [(4, 40)] * 2
    calls.clear()
    calibration = Calibration(source, tokenize)
    calibration.embed_pictures(net(lambda arrays: np.full((4, 40), 0.5, np.float32)))
    assert (calls[0]["image"].shape, calls[0]["image"].dtype) == ((4, 28, 28, 3), np.uint8)
    labels = np.arange(4, dtype=np.float32)[:, None] * np.ones((4, 80), np.float32)
    calibration.noise_embeddings(net(lambda _: labels))
    assert (calls[1]["image_embeds"] == 0.5).all()
    for call in calls[1:3]:
        assert call["alpha"] ** 2 + call["sigma"] ** 2 == pytest.approx(1)
    calls.clear()
    calibration.denoise(net(lambda arrays: arrays["sample"]))
    assert [call["class_labels"][:, 0].tolist() for call in calls] == [[0, 1], [0, 1], [0, 1], [0, 1]]
    calls.clear()
    calibration.encode_pictures(net(lambda _: None))
    assert [int(call["mask"].any()) for call in calls] == [0, 1, 0, 1]
    assert {call["image"].shape for call in calls} == {(1, 16, 16, 3)}
