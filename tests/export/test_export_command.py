"""What `latentrt export` hands to the exporter, and what it prints of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from latentrt.checkpoints import find
from latentrt.checkpoints.hub.download import DownloadProgress
from latentrt.checkpoints.precision.islands import Found
from latentrt.checkpoints.templates.archive import SHIPPED
from latentrt.cli import app
from latentrt.export import export as package_writer


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `export_package`, which exports nothing."""
    found: dict[str, Any] = {}

    def export(checkpoint: Path, package: Path, **options: Any) -> Any:
        found.update(checkpoint=checkpoint, package=package, **options)
        options["note"]("it does not say what its UNet predicts")
        options["report_islands"](Found(component="image_noiser", islands=(), largest=0.0, where=""))
        return SimpleNamespace(manifest=SimpleNamespace(files={}))

    monkeypatch.setattr(package_writer, "export_package", export)
    return found


@pytest.fixture
def there(tmp_path: Path) -> str:
    """A path that exists."""
    (tmp_path / "c").mkdir()
    return str(tmp_path / "c")


def test_every_option_arrives(given: dict[str, Any], there: str) -> None:
    options = ["--vae", "v", "--tiny-vae", "t", "--prediction-type", "v_prediction", "--dtype", "fp32"]
    options += ["--lora", "a.safetensors:0.8", "--lora", "b:1:-0.5", "--few-steps", "lcm"]
    flags = ["--verify", "--trace", "--overwrite", "--lora-lenient"]
    result = CliRunner().invoke(app, ["export", there, "-o", "p", *flags, *options])
    assert result.exit_code == 0, result.output
    wanted = {
        "checkpoint": Path(there),
        "package": Path("p"),
        "vae": Path("v"),
        "tiny_vae": Path("t"),
        "prediction_type": "v_prediction",
        "dtype": "fp32",
        "verify": True,
        "templates": None,
        "overwrite": True,
        "loras": [
            ("a.safetensors", 0.8),
            ("b", {"unet": 1.0, "text_encoder": -0.5, "text_encoder_2": -0.5}),
        ],
        "allow_unused": True,
        "few_steps": "lcm",
    }
    assert {name: given[name] for name in wanted} == wanted
    assert "it does not say what its UNet predicts\nimage_noiser: no fp32 islands\n" in result.output


def test_defaults_and_json(given: dict[str, Any], there: str) -> None:
    result = CliRunner().invoke(app, ["export", there, "-o", "p", "--json"])
    told = json.loads(result.output.strip().splitlines()[-1])
    assert told["notes"] == ["it does not say what its UNet predicts"]
    assert (given["vae"], given["tiny_vae"], given["prediction_type"]) == (None, None, None)
    assert (given["dtype"], given["verify"], given["overwrite"]) == ("fp16", False, False)
    assert given["templates"] == SHIPPED
    assert (given["loras"], given["allow_unused"], given["few_steps"]) == ((), False, None)


def test_a_model_of_a_hub_is_fetched(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetched(model: str, *, progress: Any) -> Path:
        progress(DownloadProgress(file="unet/config.json", done=1, total=2))
        return tmp_path / model.replace("/", "--")

    monkeypatch.setattr(find, "locate", fetched)
    result = CliRunner().invoke(app, ["export", "org/name", "-o", "p"])
    assert result.exit_code == 0, result.output
    assert given["checkpoint"] == tmp_path / "org--name"
