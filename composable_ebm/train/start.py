"""Where a training starts: from another expert, or from what the data tells at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from composable_ebm.data import LabelledImages
from composable_ebm.data.ranges import rescaled
from composable_ebm.experts.card import CheckpointError
from composable_ebm.experts.catalogue import load_expert
from composable_ebm.experts.networks.codec import PictureCodec
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.experts.networks.skeleton import GaussianSkeleton, images_to_fit
from composable_ebm.experts.store import load_codec

__all__ = ["start_from"]

FOR_VALUES = ("value_", "choose", "look.")
"""What the names of parameters that only networks with values have begin with."""


def start_from(
    network: nn.Module, init: str, data: LabelledImages, num_values: int = 1, codec: str = ""
) -> None:
    """The weights of another expert, but for those that tell values apart, or else what the data tells.

    Args:
        network: Gets the weights.
        init: Name or folder of the other expert, of a codec its folder; "" for none.
        data: What is learned from.
        num_values: Outputs of the network.
        codec: Digest of the codec whose latents the data are.
    Raises:
        ValueError: If there is no such expert, or it is one of other states or another network.
    """
    if isinstance(network, PictureCodec):
        if init:
            _start_codec(network, init)
        return
    if not init:
        if isinstance(network, RBM):
            network.fit(rescaled(_some(data), network.data_range))
        elif isinstance(network, GaussianSkeleton):
            network.fit(_some(data))
        return
    try:
        expert = load_expert(init)
    except (KeyError, CheckpointError) as error:
        raise ValueError(f"`init`: {error.args[0]}") from error
    card = expert.card
    if card.codec != codec or card.event_shape != data.event_shape:
        raise ValueError(
            f"`init`: {card.full_name} is an expert of {card.states}, but this training is of images "
            f"{'×'.join(map(str, data.event_shape))}. {_other_size(card.event_shape)}"
        )
    theirs, mine = expert.network.state_dict(), network.state_dict()
    shared = {n: v for n, v in theirs.items() if n in mine and v.shape == mine[n].shape}
    outputs = (num_values, len(card.values))
    left = [n for n, v in mine.items() if n not in shared and not _tells_values(n, v, theirs, outputs)]
    if left or not shared:
        name = left[0] if left else next(iter(mine))
        kind, size = type(network).__name__, tuple(mine[name].shape)
        other = f"{tuple(theirs[name].shape)} there" if name in theirs else "missing there"
        raise ValueError(
            f"`init`: {card.full_name} is another kind of network ({card.network.get('type')}) than this "
            f"{kind}: {name} has the shape {size} here and is {other}. Give both the same network settings, "
            'or start without it: --init "".'
        )
    network.load_state_dict(shared, strict=False)
    if isinstance(network, GaussianSkeleton):
        # Theirs may have been other pictures, and chains begin at the mean and the width of the data.
        network.refit(_some(data))


def _some(data: LabelledImages) -> Tensor:
    """Enough images to take a mean and principal components from, (n, *event)."""
    generator = torch.Generator().manual_seed(0)  # folders come sorted by class
    some = torch.randperm(len(data), generator=generator)[: images_to_fit(data.images[0].numel())]
    return data.batch(some.to(data.images.device))


def _start_codec(codec: PictureCodec, init: str) -> None:
    """The weights of a codec of the same sizes, of pictures of any size, grey or in colour."""
    try:
        other = load_codec(init)
    except CheckpointError as error:
        raise ValueError(f"`init`: {error}") from error
    theirs, mine = other.state_dict(), codec.state_dict()
    colours = other.image_shape[0], codec.image_shape[0]
    state = dict(theirs)
    for name, value in theirs.items():
        if name in mine and value.shape != mine[name].shape and colours[0] != colours[1]:
            state[name] = _recoloured(value, name, *colours)
    unlike = [name for name in mine if name not in state or state[name].shape != mine[name].shape]
    if unlike or len(state) > len(mine):
        raise ValueError(
            f"`init`: the codec in {init} has other sizes: {other.options} there, {codec.options} here. Give "
            'both the same network settings, or start without it: --init "".'
        )
    codec.load_state_dict(state)


def _recoloured(value: Tensor, name: str, theirs: int, mine: int) -> Tensor:
    """The first or last layer of a codec for another number of colours: each is taken as grey."""
    if name.startswith("encoder"):
        each = value.unflatten(1, (theirs, -1)).sum(1) / mine
        return each.repeat(1, mine, *[1] * (value.ndim - 2))
    each = value.unflatten(0, (theirs, -1)).mean(0)
    return each.repeat(mine, *[1] * (value.ndim - 1))


def _other_size(shape: tuple[int, ...]) -> str:
    return f'Train at its size (--data.size {shape[-1]}), or start without it: --init "".'


def _tells_values(name: str, mine: Tensor, theirs: dict[str, Tensor], outputs: tuple[int, int]) -> bool:
    """Whether a parameter belongs to the values: absent in the other, or with another number of them."""
    if name not in theirs:
        return name.startswith(FOR_VALUES)
    pairs = zip(mine.shape, theirs[name].shape, strict=False)
    return mine.ndim == theirs[name].ndim and all(a == b or (a, b) == outputs for a, b in pairs)
