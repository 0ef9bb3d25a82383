"""What a training begins with: pictures, a card, a network, and the memory for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import psutil
import torch
from torch import nn

from composable_ebm.data import LabelledImages
from composable_ebm.experts.card import Card
from composable_ebm.experts.expert import Expert
from composable_ebm.experts.networks import NETWORKS
from composable_ebm.experts.networks.codec import CODECS, PictureCodec
from composable_ebm.experts.store import CODEC
from composable_ebm.train.config import DataConfig, TrainConfig

COPIES = 10
"""Of the weights, that a training holds: gradients, two moments, the average, and states to go back to."""

__all__ = ["build", "card_of", "check_memory", "load_split"]


def load_split(wanted: DataConfig, split: str, between_is_value: bool = False) -> LabelledImages:
    """The images of a split that a training can use: all for p(x), the labelled ones for an attribute.

    Args:
        wanted: What to learn from.
        split: "train" or "validation".
        between_is_value: Whether what is `between` two values has a value of its own.
    Raises:
        ValueError: If there is nothing to tell apart, or nothing labelled.
    """
    data = wanted.load(split)
    attribute = wanted.attribute
    if "+" in attribute:
        data = data.jointly(attribute)
    if wanted.name == "folder" and split == "train" and (data.images == data.images[:1]).all():
        raise ValueError(
            f"the {len(data)} pictures of {data.name} are all the same at this size, so there is nothing to "
            "learn."
        )
    if not attribute:
        return data
    values = data.attribute(attribute)
    if len(values) < 2:
        raise ValueError(
            f"attribute {attribute!r} of {data.name} has only the value {values[0]!r}; an expert needs "
            f"images of two or more{_absent(values[0])}. Leave the attribute out to learn p(x)."
        )
    labelled = data.where(attribute)
    if not len(labelled):
        raise ValueError(
            f"none of the {len(data)} images of {data.name} has a label for {attribute!r}: add some."
        )
    if wanted.between and between_is_value:
        return data.with_between(attribute)
    return data if wanted.between and split == "train" else labelled


def _absent(value: str) -> str:
    """What to write where an attribute is absent, for those who wrote nothing."""
    other = {"yes": "no", "true": "false", "1": "0", "y": "n"}.get(value.lower())
    return f", and an empty entry is no label: write {other!r} where it is absent" if other else ""


def card_of(
    config: TrainConfig,
    data: LabelledImages,
    values: tuple[str, ...],
    codec: PictureCodec | None = None,
    base: Expert | None = None,
    pictures: int = 0,
) -> Card:
    """The card of what a configuration describes, before it has learned anything.

    Args:
        config: The configuration.
        data: What is learned from, pictures or latents.
        values: Those of the attribute.
        codec: Whose latents they are.
        base: The density that an expert of a classifier stands on.
        pictures: How many were learned from, where `data` holds copies of them.
    """
    kind = type(config.network).__name__
    learns_codec = kind in CODECS
    shape = list(data.event_shape)
    sizes = {"image_shape": shape} if learns_codec else {"event_shape": shape, "num_values": len(values)}
    card = Card(
        family=config.family,
        name=config.name,
        attribute=CODEC if learns_codec else config.data.attribute or "image",
        values=values,
        event_shape=data.event_shape,
        data_range=None if learns_codec else config.data_range,
        network={**sizes, **asdict(config.network), "type": kind},
        sampler=config.sampler_settings,
        temperature=1.0 if config.objective.noise_conditioned else config.kernel.implied_temperature,
        noise_conditioned=config.objective.noise_conditioned,
        data=f"{data.name}, {pictures or len(data)} images"
        + (f", without {', '.join(config.data.exclude)}" if config.data.exclude else ""),
        licence=config.licence,
        weight=config.weight,
        words=config.words,
        codec="" if codec is None else codec.digest,
        base="" if base is None else str(base.card.weights.get("sha256")),
    )
    if not learns_codec:
        return card
    with torch.device("meta"):
        learned = build(card)
    assert isinstance(learned, PictureCodec)
    return replace(card, event_shape=learned.event_shape)


def build(card: Card) -> nn.Module:
    """The network of a card, with first weights."""
    options = dict(card.network)
    networks: dict[str, Callable[..., nn.Module]] = {**NETWORKS, **CODECS}
    return networks[options.pop("type")](**options)


def check_memory(card: Card, device: torch.device) -> None:
    """Refuses a network that does not fit into memory, before any of it is taken.

    Raises:
        ValueError: If so; the message says how much it takes and what makes it smaller.
    """
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in build(card).state_dict().values())
    needed = 4 * COPIES * parameters
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{card.full_name} would have {parameters / 1e6:,.0f} million weights for {card.states}, and its "
            f"training takes {needed / 1e9:.1f} GB where {free / 1e9:.1f} are free: give a smaller "
            "--data.size or a smaller network, see --help."
        )
