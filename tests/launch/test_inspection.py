"""`longstride inspect` from the command line."""

import re
import sys
from pathlib import Path

import pytest
import torch

from launch import cli
from models.language.checkpoint import save_pretrained
from models.language.decoder import Decoder
from models.language.inspection import inspect_model
from models.language.packing import Packing
from tests.models.language.policies import DENSE

SMALL = ("--sequences", "2", "--length", "16", "--png")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(("inspect", *arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_recipe_as_table_and_picture(command) -> None:
    code, out, err = command("quickstart", *SMALL, "p.png")
    assert (code, err) == (0, "")
    assert out.startswith("1.91M parameters, loss")
    assert re.findall(r"(\d) (linear|full)", out) == [("0", "linear"), ("1", "full"), ("2", "linear"), ("3", "full")]
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")


def test_variants_side_by_side(command) -> None:
    vary = ("--vary", "norm_placement=pre,post", "--depth", "6", "--set", "initializer=xavier", "qk_norm=false")
    code, out, _ = command("quickstart", *SMALL, "p.png", *vary)
    assert code == 0
    titles = re.findall(r"^(norm_placement=\w+): .*M parameters", out, re.MULTILINE)
    assert titles == ["norm_placement=pre", "norm_placement=post"]
    assert len(re.findall(r"5 full", out)) == 2


def test_a_wider_model_keeps_its_head_dim(command) -> None:
    code, out, _ = command("quickstart", *SMALL, "p.png", "--vary", "width=64,256")
    narrow, wide = map(float, re.findall(r"([\d.]+)M parameters", out))
    assert code == 0
    assert 8 < wide / narrow < 16


def test_a_folders_own_weights_unless_its_shape_is_changed(command) -> None:
    model = Decoder(DENSE).init_weights(7)
    save_pretrained(model, "folder")
    losses = [
        re.findall(r"loss ([\d.]+)", command("folder", *SMALL, "p.png", *more)[1])[0] for more in ((), ("--depth", "3"))
    ]
    tokens_T = torch.randint(0, 97, (32,), generator=torch.Generator().manual_seed(0))
    expected = inspect_model(model, tokens_T, Packing.of([16, 16]), lr=1e-3).loss
    assert losses[0] == f"{expected:.3f}" != losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "inspect nowhere: neither a model folder nor a recipe; recipes are .*quickstart"),
        (("quickstart", "--set", "initializer=xavir"), "unknown initializer `xavir`: did you mean `xavier`"),
        (("quickstart", "--set", "norm=pre"), "unknown field of the model's config `norm`"),
        (("quickstart", "--set", "norm_type"), "write FIELD=VALUE"),
        (("quickstart", "--set", "hidden_size=wide"), "hidden_size is 'wide'; it must be of type int"),
        (("quickstart", "--set", "hidden_size=64.5"), "hidden_size is 64.5; it must be of type int"),
        (("quickstart", "--set", "hidden_size=true"), "hidden_size is True; it must be of type int"),
        (("quickstart", "--set", "layer_types=3"), "layer_types is 3; it must be of type tuple"),
        (("quickstart", "--set", "norm_type=3"), "norm_type is 3; it must be of type str"),
        (("quickstart", "--set", "qk_norm=2"), "qk_norm is 2; it must be of type bool"),
        (("quickstart", "--vary", "lr=abc"), "--vary lr: 'abc' is no positive number"),
        (("quickstart", "--vary", "depth=1.5"), "--vary depth: '1.5' is no positive whole number"),
        (("quickstart", "--vary", "vocab_size=[1"), "vocab_size=.1: write the value as YAML has it"),
        (("quickstart", "--vary", "norm_type"), "write FIELD=VALUE,VALUE"),
        (("quickstart", "--width", "100"), "use a multiple of 64"),
        (("quickstart", "--length", "1"), "length is 1"),
        (("quickstart", "--lr", "0"), "lr is 0"),
        (("quickstart", "--batch", "x.txt"), "--batch needs a model folder"),
        (("quickstart", "--dept", "3"), "--depth"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, command) -> None:
    code, _, err = command(*arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)


def test_a_recipe_of_another_job(command) -> None:
    Path("control.yaml").write_text("job: a2c\nsteps: 3\n")
    code, _, err = command("control.yaml")
    assert code == 2
    assert "recipe for the job a2c, which trains no language model" in err


def test_without_matplotlib(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = command("quickstart")
    assert code == 2
    assert "pip install 'longstride[plots]'" in err
