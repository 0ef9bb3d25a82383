"""The deep belief network: restricted Boltzmann machines, each above the hidden units of the last."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from composable_ebm.experts.networks.rbm import RBM
from composable_ebm.sampling.gibbs import Gibbs
from composable_ebm.sampling.result import SampleResult
from composable_ebm.sampling.sample import sample

__all__ = ["DeepBelief"]


class DeepBelief(nn.Module):
    """The top two layers are an RBM, all others a directed network that it feeds from above:

        p(v, h¹, …, hᴸ) = p(v | h¹) p(h¹ | h²) … p(hᴸ⁻¹, hᴸ),     p(hᵏ⁻¹ᵢ = 1 | hᵏ) = σ(bᵢ + Σⱼ Wᵏᵢⱼhᵏⱼ)

    It is no energy of v: summing the hidden layers out has no closed form, so it cannot be a term of a
    composition. Its top RBM is one, over the units below it. Trained greedily, each RBM on the hidden
    units of the one below (`composable_ebm.train.train_layers`), which raises a bound on log p(v).

    Args:
        layers: RBMs of bits from the lowest up, each as wide as the one below has hidden units.
    Raises:
        ValueError: If the layers do not fit on each other.
    Example:
        >>> network = DeepBelief([expert.network for expert in train_layers([first, second])])
        >>> images = network.sample(num_chains=16, num_steps=500).samples
    Reference:
        Hinton, Osindero and Teh (2006), A fast learning algorithm for deep belief nets.
    """

    def __init__(self, layers: Sequence[RBM]) -> None:
        super().__init__()
        if not layers or not all(layer.binary and layer.value_weight is None for layer in layers):
            raise ValueError("a deep belief network is made of RBMs of bits without values, one at least.")
        for below, above in pairwise(layers):
            units, hidden = len(above.visible_bias), len(below.hidden_bias)
            if units != hidden:
                raise ValueError(f"a layer of {units} visible units does not fit on {hidden} hidden ones.")
        self.stack = nn.ModuleList(layers)

    @property
    def layers(self) -> list[RBM]:
        """The RBMs from the lowest up."""
        return list(self.stack)  # type: ignore[arg-type]

    @property
    def top(self) -> RBM:
        """The RBM at the top, which is sampled."""
        return self.layers[-1]

    @torch.no_grad()
    def features(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Probabilities of the hidden units, going up, (batch, hidden).

        Args:
            x: Visible states, (batch, *event); grey levels are taken as probabilities.
            depth: How many layers up; all unless given.
        """
        for layer in self.layers[:depth]:
            x = layer.features(x)
        return x

    @torch.no_grad()
    def down(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """Visible units (batch, *event) drawn from states h, (batch, units), below the top RBM.

        Layers between are drawn as bits; of the lowest the probabilities are given back.
        """
        for layer in reversed(self.layers[:-1]):
            told = layer.conditionals()
            assert told.weight is not None
            h = (told.field + h @ told.weight.T).sigmoid()
            if layer is not self.layers[0]:
                h = torch.bernoulli(h, generator=generator)
        return h.reshape(len(h), *self.layers[0].event_shape)

    def sample(
        self, *, num_chains: int = 16, num_steps: int = 500, init: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, SampleResult]:
        """Images from Gibbs sampling in the top RBM, and one pass down.

        Args:
            num_chains: Number of chains; that of `init` if given.
            num_steps: Sweeps of the top RBM.
            init: States of the units below the top RBM to start from, (num_chains, units).
            seed: Seeds everything.
        Returns:
            Probabilities of the visible units, (num_chains, *event), and the run of the top RBM.
        """
        device = self.top.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        if init is not None:
            init = init.reshape(-1, *self.top.event_shape)
        energy = self.top.free_energy(name="top")
        run = sample(
            energy,
            num_chains=None if init is not None else num_chains,
            num_steps=num_steps,
            sampler=Gibbs(),
            init=init,
            generator=generator,
        )
        return self.down(run.samples.flatten(1), generator), run
