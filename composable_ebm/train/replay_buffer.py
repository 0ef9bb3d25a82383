"""The replay buffer of persistent contrastive divergence."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """Persistent chains, on the device of the model, each with the label it was sampled under.

    Every `draw` truly restarts a share of the chains from noise, under a fresh label: the
    chain in that place of the buffer is lost when the result is `put` back.

    Args:
        size: Number of chains.
        event_shape: Shape of one state.
        num_values: Labels run from 0 to num_values - 1.
        data_range: Noise is uniform over it.
        reinit_prob: Probability that a drawn chain restarts.
        generator: Draws places, labels and noise; on the device of the chains.
        binary: Whether states are bits; noise is then fair coins.
    Reference:
        Tieleman (2008), Training restricted Boltzmann machines using approximations to the
        likelihood gradient; Du and Mordatch (2019), arXiv 1903.08689, section 3.2.
    """

    def __init__(
        self,
        size: int,
        event_shape: tuple[int, ...],
        num_values: int,
        data_range: tuple[float, float],
        reinit_prob: float,
        generator: torch.Generator,
        binary: bool = False,
    ) -> None:
        self.num_values = num_values
        self.data_range = data_range
        self.reinit_prob = reinit_prob
        self.generator = generator
        self.binary = binary
        self.states = self._noise((size, *event_shape))
        self.labels = self._fresh_labels(size)

    def __len__(self) -> int:
        return len(self.states)

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Places (batch,), all different, states (batch, *event) and labels (batch,) of chains.

        Raises:
            ValueError: If the buffer holds fewer chains.
        """
        if batch > len(self):
            raise ValueError(f"a batch of {batch} does not fit a replay buffer of {len(self)} chains.")
        device = self.generator.device
        places = torch.randperm(len(self), generator=self.generator, device=device)[:batch]
        if not self.reinit_prob:  # draws of fresh noise are a tenth of an update of a small RBM
            return places, self.states[places], self.labels[places]
        restart = torch.rand(batch, generator=self.generator, device=device) < self.reinit_prob
        noise = self._noise((batch, *self.states.shape[1:]))
        states = torch.where(restart.reshape(-1, *[1] * (noise.ndim - 1)), noise, self.states[places])
        labels = torch.where(restart, self._fresh_labels(batch), self.labels[places])
        return places, states, labels

    def put(self, places: Tensor, states: Tensor, labels: Tensor) -> None:
        """Writes chains back to the places they were drawn from."""
        self.states[places] = states.detach()
        self.labels[places] = labels

    def state_dict(self) -> dict[str, Tensor]:
        """The chains and their labels; the generator is the owner's to save."""
        return {"states": self.states, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes chains and labels of the same shapes."""
        for name, mine in (("states", self.states), ("labels", self.labels)):
            if state[name].shape != mine.shape:
                raise ValueError(
                    f"the replay buffer holds {name} {tuple(mine.shape)}, got {tuple(state[name].shape)}."
                )
            mine.copy_(state[name])

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        low, high = self.data_range
        u = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return (u < 0.5).to(u.dtype) if self.binary else low + (high - low) * u

    def _fresh_labels(self, count: int) -> Tensor:
        options = {"generator": self.generator, "device": self.generator.device}
        return torch.randint(self.num_values, (count,), **options)  # type: ignore[call-overload]
