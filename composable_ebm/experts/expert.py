"""An expert: a trained energy of one attribute."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator
from operator import attrgetter
from typing import Self

from torch import Tensor, nn

from composable_ebm.energy import Codec, Energy, LeafEnergies, Mixture, negate, soft_minimum
from composable_ebm.energy.base import Axes
from composable_ebm.energy.conditionals import Conditionals
from composable_ebm.experts.card import Card

__all__ = ["Expert", "mark_loaded"]

_version = attrgetter("_version")


def mark_loaded(network: nn.Module, card: Card) -> None:
    """Notes which expert a network was loaded as: those of one file are one, until one of them changes."""
    tensors = [*network.parameters(), *network.buffers()]
    if not any(tensor.is_inference() for tensor in tensors):
        kinds = tuple(sorted({(str(t.device), str(t.dtype)) for t in tensors}))
        note = (
            id(network),
            (card.full_name, card.weights["sha256"], kinds),
            tensors,
            list(map(_version, tensors)),
        )
        object.__setattr__(network, "_loaded", note)


def _identity(network: nn.Module) -> Hashable:
    """Equal for networks whose weights are known to be the same."""
    owner, origin, tensors, versions = vars(network).get("_loaded", (None, None, (), ()))
    unchanged = owner == id(network) and list(map(_version, tensors)) == versions
    return origin if unchanged else id(network)


class Expert(Energy):
    """A trained energy, at one value of its attribute or at any.

    With a value y it is E(x, y). Without one it is what the expert itself says about x alone, the
    marginal E(x) = -log Σ_y exp(-E(x, y)), which takes its values to be equally likely a priori.

    `expert[value]` chooses a value by its name, `expert["any"]` the marginal. A whole number is a name too
    where values are named by numbers, as digits are, and counts values from 0 where they are words. So
    `digit[3]` and `digit["3"]` are the three, `smile["yes"]` and `smile[1]` the second of "no" and "yes",
    and a recipe reads them alike. A binary expert stands for its second value unless told otherwise, and
    `~expert` for its first.

    Args:
        network: x -> (batch, values).
        card: What is known about it.
        value: Index of the value, or None for the marginal.
        codec: What its states are latents of; None where they are pictures.
        base: The expert of p(x) whose density stands still, where the network only says how likely each
            value is: E(x, y) = E_base(x) - log p(y | x).
    Example:
        >>> digit = load_expert("digits/digit")
        >>> three, odd = digit[3], digit[1] | digit[3] | digit[5] | digit[7] | digit[9]
    Reference:
        Grathwohl et al. (2020), arXiv 1912.03263, eq. 4 and 5, for E(x, y) and its marginal.
    """

    shares: tuple[str, ...] = ("network",)

    def __init__(
        self,
        network: nn.Module,
        card: Card,
        value: int | None = None,
        codec: Codec | None = None,
        base: Expert | None = None,
    ) -> None:
        super().__init__()
        self.in_space(codec)
        self.network = network
        self.base = base
        self.card = card
        self.value = value
        self.event_shape = card.event_shape
        self.data_range = card.data_range
        self.sampler_settings = card.sampler or None
        self.noise_conditioned = card.noise_conditioned
        self.has_value = getattr(network, "has_value", True)
        self.binary = getattr(network, "binary", False)
        self.given_weight = card.weight
        self.temperature = card.temperature
        self.doubt = card.metrics.get("heldout_doubt", self.doubt)
        self.energy_range = card.energy_range.get("any" if value is None else card.values[value])
        self.posterior = None if base is None or value is None else Posterior(self)
        if base is not None:
            self.shares = ("network", "base", *(["posterior"] if self.posterior else []))

    @classmethod
    def standing(
        cls, network: nn.Module, card: Card, codec: Codec | None = None, base: Expert | None = None
    ) -> Self:
        """The expert as `load_expert` gives it: binary ones stand for their second value."""
        return cls(network, card, {1: 0, 2: 1}.get(len(card.values)), codec, base)

    def __getitem__(self, value: str | int) -> Expert:
        """The expert at one value of its attribute, given by name, by number, or at "any"."""
        if isinstance(value, str) and value == "any":
            if self.base is not None:
                return self.base
            return self._at(None if len(self.card.values) > 1 else 0)
        names, text = self.card.values, str(value)
        if text in names:
            return self._at(names.index(text))
        places = [] if any(name.isdecimal() for name in names) else [str(i) for i in range(len(names))]
        if text in places:
            return self._at(places.index(text))
        near = difflib.get_close_matches(text, names, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise KeyError(
            f"{self.card.full_name} has no value {value!r}; it has {', '.join(names)} and any.{hint}"
        )

    def _at(self, value: int | None) -> Expert:
        expert = Expert(self.network, self.card, value, self.codec, self.base)
        expert.name = self.name
        return expert

    # A class with __getitem__ would otherwise be iterable, without end.
    __iter__ = None

    def leaves(self) -> Iterator[Energy]:
        if self.base is None:
            yield self
        else:
            yield from self.base.leaves()
            yield from () if self.posterior is None else (self.posterior,)

    def combine(self, energies: LeafEnergies, coefficients: Tensor) -> Tensor:
        if self.base is None:
            return energies[self.key]
        base = self.base.combine(energies, coefficients)
        return base if self.posterior is None else base + energies[self.posterior.key]

    def body(self) -> nn.Module | None:
        return self.network if self.base is None else None

    @property
    def is_sum(self) -> bool:  # type: ignore[override]
        own = self.value is not None
        return own if self.base is None else self.base.is_sum and (own or self.posterior is None)

    def read(self, outputs: Tensor) -> Tensor:
        # A batched pass pads the outputs of networks with fewer values.
        outputs = outputs[:, : len(self.card.values)]
        return soft_minimum(outputs) if self.value is None else outputs[:, self.value]

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        own = self.read(self.network(x, noise_level) if self.noise_conditioned else self.network(x))
        return own if self.base is None else own + self.base.energy(x, noise_level)

    def prior(self, noise: Tensor, noise_level: float) -> Tensor | None:
        if self.base is not None:
            return self.base.prior(noise, noise_level)
        known = getattr(self.network, "prior", None)
        return super().prior(noise, noise_level) if known is None else known(noise, noise_level)

    def principal_axes(self, size: int) -> Axes | None:
        if self.base is not None:
            return self.base.principal_axes(size)
        known = getattr(self.network, "principal_axes", None)
        return super().principal_axes(size) if known is None else known(size)

    @property
    def key(self) -> Hashable:
        return ("expert", _identity(self.network), self.value)

    def marginal(self) -> Energy | None:
        return None if self.value is None else self["any"]

    def conditionals(self) -> Conditionals | None:
        offer = getattr(self.network, "conditionals", None)
        return None if offer is None or self.value is None else offer(self.value)

    def complement(self) -> Energy:
        """The expert of the other value, the mixture of the other values, or a bounded negation."""
        if self.value is None or len(self.card.values) == 1:
            return negate(self)
        others = [self._at(i) for i in range(len(self.card.values)) if i != self.value]
        return others[0] if len(others) == 1 else Mixture(others)

    def __str__(self) -> str:
        name, count = self.name or self.card.full_name, len(self.card.values)
        if count == 1:
            return name
        if count == 2:
            return f"{name}[any]" if self.value is None else ("~" if self.value == 0 else "") + name
        return name if self.value is None else f"{name}[{self.card.values[self.value]}]"


class Posterior(Energy):
    """E(x) = -log p(y | x, σ): what an expert at a value adds to the density that it stands on.

    Args:
        expert: At a value.
    """

    likelihood = True

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.in_space(expert.codec)
        self.network = expert.network
        self.value = expert.value
        self.name = f"p({expert.card.attribute} = {expert.card.values[expert.value or 0]} | x)"
        self.event_shape, self.data_range = expert.event_shape, expert.data_range
        self.noise_conditioned = expert.noise_conditioned
        self.doubt = expert.doubt

    def body(self) -> nn.Module:
        return self.network

    is_sum = True

    def read(self, outputs: Tensor) -> Tensor:
        return outputs[:, self.value]

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.read(self.network(x, noise_level) if self.noise_conditioned else self.network(x))

    @property
    def key(self) -> Hashable:
        return ("posterior", _identity(self.network), self.value)
