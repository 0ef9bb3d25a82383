"""Where a training starts: from another expert, or from what the data tells at once."""

from __future__ import annotations

import torch
from torch import nn

from composable_ebm.data import LabelledImages
from composable_ebm.data.ranges import rescaled
from composable_ebm.experts.catalogue import load_expert
from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.experts.networks.skeleton import GaussianSkeleton, images_to_fit

__all__ = ["start_from"]


def start_from(network: nn.Module, init: str, data: LabelledImages) -> None:
    """The weights of another expert wherever name and shape agree, or else what the data tells.

    Raises:
        ValueError: If the other expert has nothing in common with the network.
    """
    if not init:
        if isinstance(network, (GaussianSkeleton, RBM)):
            generator = torch.Generator().manual_seed(0)  # folders come sorted by class
            some = torch.randperm(len(data), generator=generator)[: images_to_fit(data.images[0].numel())]
            x = data.batch(some.to(data.images.device))
            network.fit(rescaled(x, network.data_range) if isinstance(network, RBM) else x)
        return
    theirs = load_expert(init).network.state_dict()
    mine = network.state_dict()
    shared = {n: v for n, v in theirs.items() if n in mine and v.shape == mine[n].shape}
    if not shared:
        raise ValueError(f"`init`: {init} is another kind of network than a {type(network).__name__}.")
    network.load_state_dict(shared, strict=False)
