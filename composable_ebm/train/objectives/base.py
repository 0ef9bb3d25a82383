"""What a training minimises.

An objective is a frozen description. `begin` puts it to work in one training, as a `Phase` that
holds what lasts between iterations, such as persistent chains.

Symbols: x⁺ data, x⁻ samples of the model, y their labels, f(x)[y] = E(x, y) the network's outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from composable_ebm.sampling.block import Sampler

Figures = dict[str, Tensor]
"""What to log of an iteration: name -> a scalar; or (total, count), (2,), of what not every batch
has, whose mean is over what there was."""

__all__ = ["Figures", "Objective", "Phase", "Setting"]


@dataclass(frozen=True)
class Setting:
    """What an objective may know of the training it works in.

    Attributes:
        event_shape: Shape of one image.
        num_values: Values of the attribute.
        data_range: Smallest and largest value of the data.
        batch_size: Images of an iteration, on this process.
        sampler: The kernel of chains, for objectives that run some.
        generator: Draws everything the objective draws; its own on each process.
        binary: Whether states are bits.
    """

    event_shape: tuple[int, ...]
    num_values: int
    data_range: tuple[float, float] | None
    batch_size: int
    sampler: Sampler
    generator: torch.Generator
    binary: bool = False


class Phase(ABC):
    """An objective at work in one training."""

    @abstractmethod
    def loss(self, model: nn.Module, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        """The loss of one batch and figures to log, scalars on the device.

        Args:
            model: The network as wrapped for training; called once, so that gradients of several
                processes synchronise once.
            network: The bare network, for sampling.
            x: Images, (batch, *event).
            y: Their labels, (batch,).
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved for an exact resume, besides the generator."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the state back."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {', '.join(state)}.")


@dataclass(frozen=True)
class Objective(ABC):
    """What a training minimises."""

    noise_conditioned: ClassVar[bool] = False

    def prepare(self, network: nn.Module) -> None:  # noqa: B027 (most train all of it)
        """Stops what it does not train, before there is an optimiser."""

    @abstractmethod
    def begin(self, setting: Setting) -> Phase:
        """Puts the objective to work."""
