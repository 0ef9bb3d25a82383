"""The weights that did best on held-out pictures: what a long training of few pictures should end with."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["LOSS", "Best"]

LOSS = "heldout_loss"
PREFIX = "best."


class Best:
    """The weights of the evaluation with the least held-out loss, so far."""

    def __init__(self) -> None:
        self.loss = math.inf
        self.step = 0
        self.weights: dict[str, Tensor] = {}

    def offer(self, step: int, metrics: Mapping[str, float], network: nn.Module) -> bool:
        """Takes the weights of a network if its held-out loss is the least so far; whether it is."""
        loss = metrics.get(LOSS, math.inf)
        if not loss < self.loss:
            return False
        self.loss, self.step = loss, step
        self.weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
        return True

    def network(self, like: nn.Module) -> nn.Module:
        """A copy of a network with the best weights, or the network itself where none were offered."""
        if not self.weights:
            return like
        network = copy.deepcopy(like)
        network.load_state_dict(self.weights)
        return network

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {f"{PREFIX}{name}": value for name, value in self.weights.items()}

    def restore(self, facts: Mapping, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what a checkpoint holds."""
        self.weights = {n.removeprefix(PREFIX): v for n, v in tensors.items() if n.startswith(PREFIX)}
        if self.weights:
            self.loss, self.step = float(facts["best_loss"]), int(facts["best_step"])
