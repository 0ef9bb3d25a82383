"""Networks that are evaluated together, in the fastest form that serves the states given."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy
from composable_ebm.potential.forms import Evaluate, Form, special_form
from composable_ebm.potential.forms.stacked import Stacked
from composable_ebm.potential.forms.traced import TracedForm
from composable_ebm.potential.packed import Watch

__all__ = ["Group", "Whole", "grouped", "readable"]

Reader = tuple[nn.Module, list[Energy]]
"""A network and the leaves that read it."""


class Whole(nn.Module):
    """A leaf that reads no network of its own as a network that gives energies."""

    def __init__(self, leaf: Energy) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.leaf.energy(x, noise_level)


class Group:
    """Networks that are evaluated together.

    Args:
        readers: The networks, and who reads each.
        special: The form of all of them, if one is registered.
        apart: What evaluates them where that does not serve.
    Attributes:
        form: What serves them without a graph, where anything does.
        single: Whether its outputs are those of one network, without an axis for networks.
    """

    def __init__(
        self, readers: Sequence[Reader], special: Form | None = None, apart: Sequence[Group] = ()
    ) -> None:
        self.readers = list(readers)
        self.apart = list(apart)
        self.networks = [network for network, _ in readers]
        first = self.networks[0]
        self.noise_conditioned = readers[0][1][0].noise_conditioned or isinstance(first, Whole)
        self.single = special is None
        self.form = special
        if special is None and len(readers) == 1:
            self.form = TracedForm(first, first.leaf if isinstance(first, Whole) else None)
        self._by: Form | str | None = None  # the form of the last evaluation, or what stopped it
        self._watches = [Watch(network) for network in self.networks]
        self._stacked: Stacked | None = None
        self._stacked_version: tuple = ()

    @property
    def leaf(self) -> Energy:
        """The first leaf that reads it."""
        return self.readers[0][1][0]

    @property
    def path(self) -> str:
        """The form of the last evaluation, in words."""
        if self._by is None or not isinstance(self._by, str):
            return "" if self._by is None else self._by.path
        return f"by autograd: {self._by}" if self._by else "by autograd"

    @property
    def copies_weights(self) -> bool:
        """Whether it works on copies of the networks' weights."""
        return not self.single or len(self.networks) > 1

    def heard(self, noise_level: Tensor | None) -> Tensor | None:
        """What the networks are told of a noise level."""
        return noise_level if self.noise_conditioned else None

    def ready(self, x: Tensor, noise_level: Tensor | None) -> Evaluate | None:
        """What gives outputs and pulls cotangents back without a graph, or None where no form serves such
        states: outputs (networks, batch, ...), or those of the one network alone if `single`."""
        if self.form is None:
            self._by = ""
            return None
        found = self.form.ready(x, self.heard(noise_level))
        self._by = found if isinstance(found, str) else self.form
        return None if isinstance(found, str) else found

    def outputs(self, x: Tensor, noise_level: Tensor | None) -> Sequence[Tensor]:
        """Outputs of each network, by calling them."""
        level = self.heard(noise_level)
        if len(self.networks) > 1 and self.single:
            version = tuple(watch() for watch in self._watches)
            if self._stacked is None or version != self._stacked_version:
                self._stacked, self._stacked_version = Stacked(self.networks), version
            return self._stacked(x, level)  # type: ignore
        return [network(x) if level is None else network(x, level) for network in self.networks]

    def kinds(self) -> list[tuple[str, int, int, str]]:
        """Of what kind its networks are, how many, how many terms read them, and how they ran."""
        if self.apart and isinstance(self._by, str):
            return [kind for group in self.apart for kind in group.kinds()]
        first, count = self.networks[0], len(self.networks)
        name = type(first.leaf if isinstance(first, Whole) else first).__name__
        batched = "in one batched pass" if count > 1 and self.single else ""
        path = ", ".join(filter(None, (batched, self.path)))
        return [(name, count, sum(len(leaves) for _, leaves in self.readers), path)]


def grouped(readers: Sequence[Reader], stack: bool) -> list[Group]:
    """Networks sorted into groups that are evaluated together: by a special form, or else by their kind."""
    kinds: dict[Hashable, list[Reader]] = {}
    for network, leaves in readers:
        special = special_form(network)
        kind = id(network) if special is None else (special, leaves[0].noise_conditioned)
        kinds.setdefault(kind, []).append((network, leaves))
    groups, others = [], []
    for members in kinds.values():
        if (special := special_form(members[0][0])) is None:
            others += members
            continue
        for part in special.groups([network for network, _ in members]):
            together = [members[i] for i in part]
            groups.append(Group(together, special(list(dict(together))), _alike(together, stack)))
    return [*groups, *_alike(others, stack)]


def _alike(readers: Sequence[Reader], stack: bool) -> list[Group]:
    """Each network by itself, or those of one architecture together where they are stacked."""
    kinds: dict[Hashable, list[Reader]] = {}
    for network, leaves in readers:
        kind: Hashable = id(network)
        if stack:
            kind = (type(network), getattr(network, "architecture", id(network)), leaves[0].noise_conditioned)
        kinds.setdefault(kind, []).append((network, leaves))
    return [Group(members) for members in kinds.values()]


OF_MODULES = frozenset(vars(nn.Module()))


def readable(leaf: Energy) -> bool:
    """Whether a leaf has something to gain, parameters, and nothing that changes unseen.

    What it holds beside modules must be numbers, names and tuples of them, which are seen when replaced.
    """
    own = (value for name, value in vars(leaf).items() if name not in OF_MODULES)
    return next(leaf.parameters(), None) is not None and all(map(_fixed, own))


def _fixed(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_fixed, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
