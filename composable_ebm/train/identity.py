"""Which training a run is: everything that shapes what it learns, as plain values.

A checkpoint and the card of an expert hold it. A training that agrees goes on from the checkpoint; one that
differs would take up another's work, and is refused with the difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from composable_ebm.data import LabelledImages
from composable_ebm.experts.card import CheckpointError
from composable_ebm.experts.catalogue import find_folder
from composable_ebm.experts.store import CONFIG, read_card
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.export import UNFINISHED

__all__ = [
    "PICTURES",
    "START",
    "STARTED_FROM",
    "check_expert",
    "check_identity",
    "first_stage",
    "identity",
    "run_digest",
]

UNSHAPING = {
    *(
        "family",
        "name",
        "models",
        "runs",
        "fresh",
        "push_to_hub",
        "licence",
        "weight",
        "words",
        "half",
        "cpu",
    ),
    *("num_iterations", "minutes", "log_every", "evaluate_every", "save_every", "largest_gap"),
    *("contrast", "keep_best"),
    *("generation", "init", "data"),
}
"""Settings that say where things go, how long or how often, which may change between two starts of a run."""

PICTURES = "digest of the pictures and their labels"
STARTED_FROM = "started_from"
STAGE = ("objective", "iterations", "best_iteration", "minutes")
"""What a card keeps of an earlier stage."""
START = "digest of the expert it starts from"
SHOWN = 12  # digits of a digest, in messages


def identity(
    config: TrainConfig,
    data: tuple[LabelledImages, LabelledImages],
    values: tuple[str, ...],
    processes: int = 1,
) -> dict[str, object]:
    """What makes a training this one.

    Args:
        config: Its configuration; how many iterations, and where files go, do not matter.
        data: Images that are learned from, and held-out ones.
        values: Those of the attribute, in the order of the network's outputs.
        processes: How many train.
    """
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    for part in ("network", "objective"):
        plain[part] = {"type": type(getattr(config, part)).__name__, **plain[part]}
    settings: dict[str, object] = {}
    for name, value in plain.items():
        if name not in UNSHAPING:
            nested = value if isinstance(value, dict) else {"": value}
            settings |= {f"{name}.{key}" if key else name: setting for key, setting in nested.items()}
    settings |= {f"data.{k}": v for k, v in plain["data"].items() if k != "root"}
    learned, held_out = data
    return {
        **settings,
        "processes": processes,
        "values": list(values),
        "pictures": len(learned),
        "held-out pictures": len(held_out),
        PICTURES: _data_digest(data, config.data.attribute),
        START: _digest_of_init(config),
    }


def _data_digest(data: tuple[LabelledImages, LabelledImages], attribute: str) -> str:
    digest = hashlib.sha256()
    for part in data:
        tensors = [part.images, part.labels[attribute]] if attribute else [part.images]
        for tensor in tensors:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest_of_init(config: TrainConfig) -> str:
    """Of its weights; "" where a training starts from none."""
    init = config.init
    if not init:
        return ""
    folder = Path(init) if (Path(init) / CONFIG).exists() else find_folder(init)
    card = read_card(folder)
    digest = str(card.weights.get("sha256", ""))
    if folder.resolve() != config.model_folder.resolve():
        return digest
    if UNFINISHED in card.training:  # a first stage, wherever that started
        return digest
    return str(card.training.get(STARTED_FROM, digest))  # it went on from what it has replaced since


def first_stage(config: TrainConfig) -> dict[str, object]:
    """What the card says of the stage that this one goes on from, in the same expert, if any."""
    if not config.init or Path(config.init).resolve() != config.model_folder.resolve():
        return {}
    training = read_card(config.model_folder).training
    return training.get("first_stage") or {name: training[name] for name in STAGE if name in training}


def check_identity(where: Path, stored: Mapping, wanted: Mapping) -> None:
    """Refuses to go on from the checkpoint of another training.

    Args:
        where: The folder of the run.
        stored: `identity` of the training that wrote it; what it does not say may be anything.
        wanted: That of the training that would go on from it.
    Raises:
        ValueError: If they differ; the message says where.
    """
    differing = [
        f"{name} = {_short(stored[name])} (now {_short(wanted[name])})"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"{where} holds another training, with {'; '.join(differing)}. Put that back to go on with it, "
            "or add --fresh to throw it away and start anew, or give this one another --name or --family."
        )


def run_digest(who: Mapping) -> str:
    """One digest of an `identity`."""
    return hashlib.sha256(json.dumps(who, sort_keys=True).encode()).hexdigest()


def check_expert(folder: Path, wanted: Mapping) -> None:
    """Refuses to write over an expert that was trained on other pictures.

    Args:
        folder: Where the expert would go.
        wanted: `identity` of the training that would write it.
    Raises:
        ValueError: If there is one.
    """
    try:
        card = read_card(folder)
    except CheckpointError:
        return  # none there, or one that nobody can use
    stored = card.training.get("pictures")
    if stored not in (None, wanted[PICTURES]):
        raise ValueError(
            f"{folder} holds an expert that was trained on other pictures ({card.data}). Give this one "
            "another --name or --family, or add --fresh to replace it."
        )


def _short(value: object) -> str:
    text = repr(value)
    is_digest = isinstance(value, str) and len(value) == 2 * hashlib.sha256().digest_size
    return f"{text[1 : SHOWN + 1]}…" if is_digest else text
