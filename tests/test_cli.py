"""The command line: what it prints, what it writes, and how it refuses."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import card, network
from PIL import Image

import composable_ebm as ceb
from composable_ebm import cli
from composable_ebm.experts import page as models_page

ROOT = Path(__file__).parents[1]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with two experts, looked in first; the working folder is empty."""
    folder = tmp_path / "models"
    for seed, description in enumerate((_digit(), card("thick", ("thin", "thick")))):
        ceb.save_expert(folder / description.full_name, network(description, seed), description)
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def _digit():
    return card(
        data="Toy | digits",
        training={
            "command": "composable-ebm train toy.toml",
            "machine": "an abacus",
            "minutes": 3.5,
            "seed": 4,
        },
        metrics={"accuracy": 0.87654, "gap": {"mean": -0.03}},
        failures="Confuses 1 and 2.",
        licence="CC0",
    )


# -- sample -----------------------------------------------------------------------------------------


def test_sample_writes_a_picture_that_says_how_it_was_made(models, capsys):
    command = [
        "sample",
        "toys/digit[1] + 2*toys/thick",
        "--num-chains",
        "4",
        "--seed",
        "3",
        "--out",
        "deep/grid.png",
    ]
    assert cli.main(command) == 0
    texts = Image.open("deep/grid.png").text
    assert texts["recipe"] == "toys/digit[1] + 2*toys/thick"
    assert (texts["seed"], texts["num_chains"], texts["num_steps"]) == ("3", "4", "12")
    assert json.loads(texts["sampler"])["kernel"] == "Langevin"
    printed = capsys.readouterr()
    assert "4 chains, 12 steps" in printed.out
    assert printed.out.endswith("deep/grid.png\n")
    assert printed.err == ""


@pytest.mark.usefixtures("models")
def test_sample_takes_settings_from_the_command_line(capsys):
    assert cli.main(["sample", "toys/digit", "--num-steps", "5", "--no-report", "--num-threads", "1"]) == 0
    assert Image.open("grid.png").text["num_steps"] == "5"
    assert capsys.readouterr().out == "grid.png\n"


@pytest.mark.usefixtures("models")
def test_sample_with_the_same_seed_writes_the_same_picture():
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert cli.main(["sample", "toys/digit", "--seed", seed, "--out", f"{name}.png", "--no-report"]) == 0
    pixels = {name: Image.open(f"{name}.png").tobytes() for name in "abc"}
    assert pixels["a"] == pixels["b"] != pixels["c"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["toys/digti"], "unknown expert 'toys/digti'; did you mean toys/digit"),
        (["toys/digit[7]"], "toys/digit has no value '7'"),
        (["2*"], "expected an expert"),
        (["0.5*toys/digit - toys/digit[1]", "--num-chains", "0"], "`num_chains` must be a whole number"),
        (["toys/digit", "--num-steps", "-1"], "`num_steps` must be a whole number"),
        (["toys/digit", "--out", "grid.jpg"], "`--out` must name a .png file, got grid.jpg"),
        (["toys/digit", "--device", "abacus"], "cannot run on device 'abacus'"),
        (["toys/digit", "--num-threads", "0"], "`--num-threads` must be at least 1, got 0"),
        (["toys/thick - toys/thick"], "no term with a positive weight"),
    ],
)
@pytest.mark.usefixtures("models")
def test_sample_refuses_in_a_sentence(command, message, capsys):
    assert cli.main(["sample", *command]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("composable-ebm: ")
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not list(Path().glob("*.png"))


def test_sample_refuses_a_damaged_expert(models, capsys):
    weights = models / "toys/thick/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert cli.main(["sample", "toys/thick"]) == 2
    assert "is truncated (100 of" in capsys.readouterr().err


def test_sample_says_when_chains_diverge(models, capsys):
    description = card("broken", ("no", "yes"))
    net = network(description)
    torch.nn.init.constant_(net.head.weight, 3e38)
    ceb.save_expert(models / "toys/broken", net, description)
    assert cli.main(["sample", "toys/broken"]) == 1
    assert "16 of 16 chains diverged" in capsys.readouterr().err


# -- models -----------------------------------------------------------------------------------------


def test_models_lists_experts_and_why_others_are_damaged(models, capsys):
    assert cli.main(["models", "--folder", str(models)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:5] == ["toys/digit", "digit", "0,", "1,", "2"]
    assert "accuracy 0.8765, gap (mean -0.03)" in lines[1]

    (models / "toys/thick/config.json").write_text("{")
    assert cli.main(["models"]) == 1
    printed = capsys.readouterr().out
    assert "toys/digit" in printed
    assert "DAMAGED  toys/thick: " in printed


def test_models_says_so_where_there_are_none(tmp_path, capsys):
    assert cli.main(["models", "--folder", str(tmp_path)]) == 0
    assert "no experts found" in capsys.readouterr().out
    assert cli.main(["models", "--folder", str(tmp_path / "nowhere")]) == 2


def test_models_page_says_what_the_cards_say(models, capsys):
    assert cli.main(["models", "--folder", str(models), "--markdown"]) == 0
    page = capsys.readouterr().out
    described = json.loads((models / "toys/digit/config.json").read_text())
    for fact in (
        "## toys",
        "| [toys/digit](#toysdigit) | digit | 0, 1, 2 |",
        described["weights"]["sha256"],
        "Toy | digits",
        "`composable-ebm train toy.toml`",
        "an abacus, 3.5 minutes",
        "seed 4",
        "kernel Langevin, step_size 0.1, num_steps 12",
        "Confuses 1 and 2.",
        "CC0",
    ):
        assert fact in page


def test_models_page_refuses_damaged_experts(models, capsys):
    (models / "toys/thick/model.safetensors").unlink()
    assert cli.main(["models", "--folder", str(models), "--markdown"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "a page lists only experts that can be loaded" in printed.err


def test_committed_models_page_is_up_to_date():
    cards, damaged = models_page.read(ROOT / "models")
    assert damaged == {}
    assert (ROOT / "MODELS.md").read_text() == models_page.page(cards), (
        "run: composable-ebm models --folder models --markdown > MODELS.md"
    )


# -- train ------------------------------------------------------------------------------------------


def test_train_hands_over_its_arguments(monkeypatch):
    received = []
    trainer = SimpleNamespace(main=lambda argv: received.append(argv) or 7)
    monkeypatch.setitem(sys.modules, "composable_ebm.train.__main__", trainer)
    assert cli.main(["train", "toy.toml", "--num-iterations", "3"]) == 7
    assert cli.main(["train", "--help"]) == 7
    assert received == [["toy.toml", "--num-iterations", "3"], ["--help"]]


# -- mixer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached by others: give --auth user:password"),
        (["--host", "example.org"], "can be reached by others"),
        (["--host", "::"], "can be reached by others"),
        (["--auth", "user"], "`--auth` must be user:password"),
        (["--auth", ":secret"], "`--auth` must be user:password"),
        (["--port", "99999"], "`--port` must be between 1 and 65535"),
        (["--max-chains", "0"], "`--max-chains` must be at least 1"),
        (["--device", "abacus"], "cannot run on device 'abacus'"),
    ],
)
def test_mixer_refuses_in_a_sentence(options, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_mixer_page", lambda: pytest.fail("the page was opened"))
    assert cli.main(["mixer", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"host": "127.0.0.1", "port": 7860, "auth": None, "max_chains": 64}),
        (["--host", "localhost"], {"host": "localhost"}),
        (["--host", "::1"], {"host": "::1"}),
        (["--host", "0.0.0.0", "--auth", "me:a:b"], {"host": "0.0.0.0", "auth": ("me", "a:b")}),
        (["--port", "80", "--max-chains", "3"], {"port": 80, "max_chains": 3}),
    ],
)
def test_mixer_is_served_as_asked(options, expected, monkeypatch):
    received = {}
    monkeypatch.setattr(cli, "_mixer_page", lambda: SimpleNamespace(serve=received.update))
    assert cli.main(["mixer", *options]) == 0
    assert expected.items() <= received.items()


# -- all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["smaple"], ["sample"], ["sample", "a", "--num-chains", "many"]])
def test_unreadable_command_lines_exit_with_2(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2
