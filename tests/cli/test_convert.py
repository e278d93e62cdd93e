"""`latentrt convert`, as a person or a script calls it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentrt import cli
from latentrt.adapters.binding import bind
from latentrt.adapters.files import read_adapter


@pytest.fixture
def latentrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Call the command in a folder with one checkpoint: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(2, 3), "step": 1}}, tmp_path / "x.ckpt")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_convert_writes_beside_the_source(latentrt: Any) -> None:
    code, out, err = latentrt("convert", "x.ckpt")
    assert (code, err) == (0, "")
    assert out == "x.safetensors  (1 tensors, 0.0 MB, 1 entries that are no tensors left out)\n"
    assert torch.equal(load_file("x.safetensors")["w"], torch.ones(2, 3))


def test_convert_as_json(latentrt: Any) -> None:
    code, out, _ = latentrt("convert", "x.ckpt", "-o", "y.safetensors", "--json")
    size = Path("y.safetensors").stat().st_size
    assert code == 0
    assert json.loads(out) == {"path": "y.safetensors", "tensors": 1, "size": size, "left_out": 1}


def test_overwrite(latentrt: Any) -> None:
    Path("x.safetensors").write_text("mine")
    code, out, err = latentrt("convert", "x.ckpt")
    assert (code, out) == (2, "")
    assert "x.safetensors exists" in err
    assert latentrt("convert", "x.ckpt", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.ckpt"], 3, "No such file"),
        (["x.ckpt", "-o", "y.ckpt"], 2, "expected a .safetensors file"),
        (["x.ckpt", "-o", "none/y.safetensors"], 7, "cannot be written"),
        (["evil.ckpt"], 3, "asks for os.system, which can run code"),
        (["evil.ckpt", "--json"], 3, ""),
    ],
)
def test_errors(latentrt: Any, arguments: list[str], code: int, message: str) -> None:
    Path("evil.ckpt").write_bytes(b"\x80\x02cos\nsystem\n.")
    found, out, err = latentrt("convert", *arguments)
    assert found == code
    assert message in err
    assert "Traceback" not in err
    if "--json" in arguments:
        assert json.loads(out)["error"]["type"] == "CheckpointError"
    assert sorted(path.name for path in Path().iterdir()) == ["evil.ckpt", "x.ckpt"]


def test_help_and_conversion_need_no_torch(latentrt: Any) -> None:
    """Whoever has the lean install can convert."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_ir', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "from latentrt import cli\n"
        "cli.main()\n"
    )
    for arguments in (["--help"], ["x.ckpt", "-o", "y.safetensors"]):
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code, "convert", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
        )
    assert Path("y.safetensors").is_file()


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt"])
@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors}])
def test_a_pickled_adapter_becomes_one_that_can_be_used(latentrt: Any, name: str, wrap: Any) -> None:
    module = "lora_unet_conv_in"
    tensors = {
        f"{module}.lora_down.weight": torch.randn(2, 4, 3, 3).half(),
        f"{module}.lora_up.weight": torch.randn(8, 2, 1, 1).bfloat16(),
        f"{module}.alpha": torch.tensor(1.0),
    }
    torch.save(wrap(tensors), name)
    Path("x.ckpt").unlink() if name != "x.ckpt" else None
    assert latentrt("convert", name)[0] == 0
    found = bind(read_adapter("x.safetensors"), {"unet": {"conv_in.weight": (8, 4, 3, 3)}})
    change = found.changes["unet"]["conv_in.weight"]
    assert (found.applied, change.rank, change.scale) == (3, 2, 0.5)
    assert torch.equal(
        load_file("x.safetensors")[f"{module}.lora_up.weight"], tensors[f"{module}.lora_up.weight"]
    )


def test_export_names_this_command(latentrt: Any) -> None:
    code, _, err = latentrt("export", "x.ckpt", "-o", "package")
    assert code == 3
    assert "latentrt convert x.ckpt -o x.safetensors" in err
