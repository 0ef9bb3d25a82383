"""Experts to the Hub and back, with the network calls replaced."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import binary, points

import composable_ebm as ceb
from composable_ebm.cli import main as command_line
from composable_ebm.experts import catalogue as catalogue_module
from composable_ebm.experts.hub import hub_page

X = points(4, (1, 4, 4))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder of experts with one in it, and nothing else to be found."""
    folder = tmp_path / "models"
    made = binary()
    ceb.save_expert(folder / "toys" / "thick", made.network, made.card)
    monkeypatch.setattr(catalogue_module, "model_folders", lambda: [folder])
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that is a folder on this machine."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token):
            assert token == "hf_secret"

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            (root / "private").write_text(str(private))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            (root / "message").write_text(commit_message)

    def download(repository, allow_patterns):
        if not (root / repository).exists():
            raise FileNotFoundError(f"no repository {repository}")
        return str(root / repository)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return root


def test_an_expert_that_was_pushed_loads_from_its_repository(models, hub):
    address = ceb.push_to_hub("toys/thick", "alice/thick-strokes")
    assert address == "https://huggingface.co/alice/thick-strokes"
    assert sorted(p.name for p in (hub / "alice/thick-strokes").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (hub / "message").read_text() == "Upload toys/thick"
    loaded = ceb.load_expert("alice/thick-strokes")
    torch.testing.assert_close(loaded(X), binary()(X))
    # The very bytes of the shipped file, so that its hash still stands.
    assert loaded.card.weights == ceb.load_expert("toys/thick").card.weights


def test_an_expert_in_memory_is_pushed_too(models, hub):
    ceb.push_to_hub(binary(seed=3), "alice/other", private=True)
    torch.testing.assert_close(ceb.load_expert("alice/other")(X), binary(seed=3)(X))
    assert (hub / "private").read_text() == "True"


def test_a_repository_may_be_named_much_like_an_expert_here(models, hub):
    """ "joys/thick" is likely a slip, "alice/thick" is a repository."""
    ceb.push_to_hub("toys/thick", "alice/thick")
    assert ceb.load_expert("alice/thick").card.full_name == "toys/thick"
    with pytest.raises(KeyError) as caught:
        ceb.load_expert("toyz/thick")
    assert "Did you mean toys/thick?" in str(caught.value)
    assert "Hub" not in str(caught.value)


def test_pushing_without_a_token_says_how_to_get_one(models, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"run `hf auth login`, or set HF_TOKEN"):
        ceb.push_to_hub("toys/thick", "alice/thick")


@pytest.mark.parametrize("name", ["thick", "a/b/c", "alice/", "alice/th ick", "../thick"])
def test_impossible_repositories_are_refused_before_anything_is_sent(models, hub, name):
    with pytest.raises(ValueError, match="repository of the Hub"):
        ceb.push_to_hub("toys/thick", name)
    assert not Path(hub).exists()


def test_damaged_experts_are_not_uploaded(models, hub):
    weights = models / "toys/thick/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ceb.CheckpointError, match="is truncated"):
        ceb.push_to_hub("toys/thick", "alice/thick")
    assert not Path(hub).exists()


def test_the_command_line_pushes_and_prints_the_address(models, hub, capsys):
    assert command_line(["push", "toys/thick", "alice/thick", "--private"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/alice/thick\n"
    assert ceb.load_expert("alice/thick").card.full_name == "toys/thick"
    assert (hub / "private").read_text() == "True"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toys/thik", "alice/thick"], "no expert named 'toys/thik'. Did you mean toys/thick?"),
        (["toys/thick", "thick"], "named user/name, got 'thick'"),
    ],
)
def test_the_command_line_says_why_it_does_not_push(models, hub, capsys, arguments, message):
    assert command_line(["push", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("composable-ebm: ")
    assert message in printed.err
    assert printed.out == ""
    assert not Path(hub).exists()


def test_the_page_has_the_header_the_hub_reads_and_code_that_loads_it():
    card = binary().card
    page = hub_page(card, "alice/thick")
    front = page.split("---")[1]
    assert "library_name: composable_ebm" in front
    assert "license: other" in front
    assert 'thick = ceb.load_expert("alice/thick")' in page
    assert "# toys/thick" in page
