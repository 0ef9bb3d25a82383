"""What becomes of a training: what it writes, the verdict on it, and where it is published."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from tqdm.auto import tqdm

from composable_ebm.experts.card import CheckpointError
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.hub import push_to_hub
from composable_ebm.experts.networks.codec import PictureCodec
from composable_ebm.experts.store import check_folder, load_folder, read_card
from composable_ebm.files import write_atomic
from composable_ebm.train.codec import export_codec
from composable_ebm.train.config import TrainConfig
from composable_ebm.train.export import UNFINISHED, export, held_out_metrics
from composable_ebm.train.material import Material
from composable_ebm.train.verdict import judge

SHARP = 0.01  # of pixels in [-1, 1]; the shipped codecs have 0.004

__all__ = ["finished", "publish", "write", "write_with_verdict"]


def write(config: TrainConfig, material: Material, network: nn.Module, facts: dict) -> Expert:
    """Writes a network of `material`, expert or codec, with the facts of its training."""
    expert = material.expert(network)
    if isinstance(network, PictureCodec):
        export_codec(config, network, material.card, facts, material.held_out)
        tqdm.write(_of_codec(config))
        return expert
    return export(config, expert, facts, material.held_out)


def _of_codec(config: TrainConfig) -> str:
    """How well pictures come back, and where to see it."""
    card = read_card(config.model_folder)
    error = card.metrics["heldout_squared_error"]
    sheet = max(config.run_folder.glob("reconstruction-*.png"), default=config.run_folder)
    return (
        f"{card.full_name}: held-out pictures come back with a squared error of {error:.4f} "
        f"({SHARP:g} and less is sharp)\n  pictures, and what comes back of them: {sheet}"
    )


def write_with_verdict(config: TrainConfig, material: Material, network: nn.Module, facts: dict) -> Expert:
    """Writes an expert, and says what it is worth."""
    expert = material.expert(network)
    verdict = None
    if expert.has_value and not expert.binary:
        tqdm.write(f"{expert.card.full_name}: drawing samples for the verdict")
        both = material.held_out, material.labelled(config.data.attribute)
        held_out, known = (held_out_metrics(expert, data) for data in both)
        sheet, judged = config.run_folder / "verdict.png", facts.get("first_stage") or facts
        better = judged.get("best_iteration") == judged["iterations"]
        verdict = judge(expert, *material.pictures, held_out, known, sheet, better)
        write_atomic(config.run_folder / "verdict.txt", f"{verdict}\n".encode())
    expert = export(config, expert, facts, material.held_out, verdict.figures if verdict else None)
    if verdict:
        tqdm.write(str(verdict))
    return expert


def finished(config: TrainConfig, material: Material, network: nn.Module, facts: Mapping) -> Expert | None:
    """The expert that this very run has written, if it has come to its end before.

    Args:
        config: What is trained.
        material: What it learns from.
        network: As it was at the last checkpoint.
        facts: Of the run by then.
    """
    folder = config.model_folder
    try:
        training = read_card(folder).training
        same = training.get("run") == facts["run"] and UNFINISHED not in training
        if not same or training.get("iterations") != facts["iterations"]:
            return None
        # A codec is no expert, but is what a training of one ends with.
        learns_codec = isinstance(network, PictureCodec)
        expert = material.expert(network) if learns_codec else load_folder(folder, facts["device"])
        check_folder(folder)
    except CheckpointError:
        return None
    return expert


def publish(config: TrainConfig) -> None:
    """Uploads what was written.

    Raises:
        OSError: If the Hub does not take it; the message says how to try again.
    """
    folder, repository = config.model_folder, config.push_to_hub
    try:
        tqdm.write(f"uploaded to {push_to_hub(folder, repository)}")
    except OSError as error:
        raise OSError(
            f"the expert is in {folder}, but the Hub did not take it: {error} To try again: "
            f"composable_ebm.push_to_hub({str(folder)!r}, {repository!r})."
        ) from error
