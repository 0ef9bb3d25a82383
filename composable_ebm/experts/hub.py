"""Experts on the Hugging Face Hub: a repository is an expert's folder, with a page that presents it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from composable_ebm.experts.card import Card
from composable_ebm.experts.catalogue import find_folder
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.store import BASE, CODEC, CONFIG, WEIGHTS, load_folder, save_expert

PAGE = "README.md"

__all__ = ["hub_page", "hub_token", "push_to_hub"]


def push_to_hub(
    expert: Expert | str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Uploads an expert, from where `load_expert(repository)` loads it; returns the address.

    Weights and description go as they are stored, checked against each other first, with a page made
    from the description. The repository is made if there is none.

    Args:
        expert: A name ("faces/smile"), a folder that holds an expert, or an expert in memory.
        repository: "user/name" on the Hub.
        private: Whether a repository that is made can be seen by its owner alone.
        token: Token with the right to write; that of `hf auth login` or $HF_TOKEN unless given.
    Raises:
        ValueError: If there is no token or no such repository can be.
        KeyError: If there is no such expert.
        CheckpointError: If its files are damaged.
        OSError: If the Hub cannot be reached or refuses.
    Example:
        >>> push_to_hub("faces/smile", "alice/smile")
        >>> smile = load_expert("alice/smile")
    """
    from huggingface_hub import HfApi  # slow to load, and only needed here

    check_repository(repository)
    token = hub_token(token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if isinstance(expert, Expert):
            card = save_expert(folder, expert.network, expert.card)
        else:
            source = find_folder(expert)
            card = load_folder(source).card  # damaged files are not spread
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(source / name, folder / name)
            for part in [*([CODEC] if card.codec else []), *([BASE] if card.base else [])]:
                place = source / part if (source / part).exists() else source.parent / part
                (folder / part).mkdir()
                for name in (CONFIG, WEIGHTS):
                    shutil.copyfile(place / name, folder / part / name)
        (folder / PAGE).write_text(hub_page(card, repository), encoding="utf-8")
        api = HfApi(token=token)
        # A repository that exists stays as visible as it is.
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {card.full_name}")
    return f"https://huggingface.co/{repository}"


def check_repository(repository: str) -> None:
    """Raises ValueError unless `repository` may name a repository of the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{repository!r} names no repository of the Hub: {error}") from error
    if repository.count("/") != 1:
        raise ValueError(f"a repository of the Hub is named user/name, got {repository!r}.")


def hub_token(token: str | None = None) -> str:
    """The token given, or else the one that is stored.

    Raises:
        ValueError: If there is none.
    """
    from huggingface_hub import get_token

    found = token or get_token()
    if not found:
        raise ValueError(
            "uploading needs a Hugging Face token with the right to write: run `hf auth login`, or set "
            "HF_TOKEN. Tokens are made at https://huggingface.co/settings/tokens."
        )
    return found


def hub_page(card: Card, repository: str) -> str:
    """The README.md of an expert's repository, with the header that the Hub reads."""
    what = "p(x)" if len(card.values) == 1 else f"p(x, {card.attribute}), {', '.join(card.values)}"
    header = [
        "---",
        "library_name: composable_ebm",
        "license: other",
        f"license_name: {json.dumps(card.licence or 'unknown', ensure_ascii=False)}",
        "pipeline_tag: unconditional-image-generation",
        "tags: [energy-based-model, composable-generation, pytorch]",
        "---",
    ]
    digest = card.weights.get("sha256", "")
    sizes = [f"{card.weights[key]:,} {key}" for key in ("parameters", "bytes") if key in card.weights]
    details = {
        "States": card.states,
        "Data": card.data,
        "Network": ", ".join((str(card.network.get("type")), *sizes)),
        "Weights": digest and f"SHA-256 `{digest}`",
        "Temperature": "" if card.temperature is None else f"{card.temperature:g}",
        "Training": ", ".join(f"{k} {v}" for k, v in card.training.items()),
        "Known failures": card.failures,
        "Licence": card.licence,
    }
    value = "" if len(card.values) < 3 else f'["{card.values[0]}"]'
    code = [
        "```python",
        "import composable_ebm as ceb",
        "",
        f'{card.name} = ceb.load_expert("{repository}")',
        f"out = ceb.sample({card.name}{value}, num_chains=16, seed=0)",
        'out.save("samples.png")',
        "```",
    ]
    lines = [
        *header,
        "",
        f"# {card.full_name}",
        "",
        f"A trained energy for the Python package composable_ebm: {what}. Energies of one image space are",
        "added, weighted and negated like numbers; sums of them are sampled by one engine.",
        "",
        *code,
        "",
        *(f"- **{label}:** {text}" for label, text in details.items() if text),
        "",
    ]
    if card.metrics:
        lines += ["| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in card.metrics.items()]
        lines.append("")
    return "\n".join(lines)
