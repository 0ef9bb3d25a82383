"""Energies of the leaves of a composition, with the work shared between them, and their gradient.

A composition is a function of the energies of its leaves, so its gradient is one backward pass
through one forward pass in which

    leaves that read one network (values of one conditional expert)  share its output;
    networks for which a form is registered                          run as one pass of its making;
    networks of one architecture                                     run as one batched pass (CUDA);
    everything else                                                  is traced, or evaluated by autograd.

Weighted sums of outputs need no graph around this, see `linear`. Each form equals the plain one to
float tolerance. Only the input gradient is computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from composable_ebm.energy import Energy, naming, one_per_state, with_gradient
from composable_ebm.potential.evaluating import spell
from composable_ebm.potential.forms import Evaluate, Form, special_form
from composable_ebm.potential.forms.stacked import Stacked
from composable_ebm.potential.forms.traced import TracedForm
from composable_ebm.potential.linear import LinearPlan
from composable_ebm.potential.packed import Watch

__all__ = ["Plan"]


class _ByHand(torch.autograd.Function):
    """Outputs whose gradient is computed by hand: `evaluate` gives them and pulls cotangents back."""

    @staticmethod
    def forward(ctx, x: Tensor, noise_level: Tensor | None, evaluate: Evaluate) -> Tensor:
        outputs, ctx.pull_back = evaluate(x, noise_level)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pull_back(cotangent), None, None


PAUSE = 64
"""How many evaluations go by until a form that refused such states is asked again: to ask takes time."""

Reader = tuple[nn.Module, list[Energy]]
"""A network and the leaves that read it."""


class Group:
    """Networks that are evaluated together, in the fastest form that serves the states given.

    Args:
        readers: The networks, and who reads each.
    Attributes:
        form: What serves them without a graph, where anything does.
        single: Whether its outputs are those of one network, without an axis for networks.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = list(readers)
        self.networks = [network for network, _ in readers]
        first = self.networks[0]
        self.noise_conditioned = readers[0][1][0].noise_conditioned or isinstance(first, _Whole)
        special = special_form(first)
        self.single = special is None
        self.form: Form | None = None
        if special is not None:
            self.form = special(self.networks)
        elif len(readers) == 1:
            self.form = TracedForm(first, first.leaf if isinstance(first, _Whole) else None)
        self._by: Form | str = ""  # the form of the last evaluation, or what stopped it
        self._asked: tuple[Hashable, int | None, Evaluate | str] = (None, None, "")
        self._pause = 0
        self._watches = [Watch(network) for network in self.networks]
        self._stacked: Stacked | None = None
        self._stacked_version: tuple = ()

    @property
    def path(self) -> str:
        """The form of the last evaluation, in words."""
        if not isinstance(self._by, str):
            return self._by.path
        return self._by

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
            return None
        level, now = self.heard(noise_level), spell()
        kind = (x.shape, x.dtype, x.device, None if level is None else level.shape)
        known, then, found = self._asked
        if kind != known or not (self._pause if isinstance(found, str) else now is not None and now == then):
            found = self.form.ready(x, level)
            self._asked = kind, now, found
            self._pause = PAUSE
        if isinstance(found, str):
            self._pause -= 1
            return None
        self._by = self.form
        return found

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> Sequence[Tensor]:
        """Outputs of each network, at noise levels () or (batch,)."""
        level = self.heard(noise_level)
        if (evaluate := self.ready(x, noise_level)) is not None:
            outputs = _ByHand.apply(x, level, evaluate)
            return [outputs] if self.single else outputs
        refusal = self._asked[2]
        self._by = f"by autograd: {refusal}" if refusal else "by autograd"
        if len(self.networks) > 1 and self.single:
            version = tuple(watch() for watch in self._watches)
            if self._stacked is None or version != self._stacked_version:
                self._stacked, self._stacked_version = Stacked(self.networks), version
            return self._stacked(x, level)  # type: ignore
        return [network(x) if level is None else network(x, level) for network in self.networks]

    def describe(self) -> str:
        """How many networks of what kind, and how they ran."""
        first, count = self.networks[0], len(self.networks)
        kind = type(first.leaf if isinstance(first, _Whole) else first).__name__
        text = f"one {kind}" if count == 1 else f"{count} {kind}"
        if count > 1 and self.single:
            text += " in one batched pass"
        readers = sum(len(leaves) for _, leaves in self.readers)
        text += f", read by {readers} terms" if readers > count else ""
        return text + (f" ({self.path})" if self.path else "")


def _grouped(readers: Sequence[Reader], stack: bool) -> list[Group]:
    """Networks sorted into groups that are evaluated together."""
    kinds: dict[Hashable, list[Reader]] = {}
    for network, leaves in readers:
        kind: Hashable = id(network)
        if (special := special_form(network)) is not None:
            kind = (special, leaves[0].noise_conditioned)
        elif stack:
            kind = (type(network), getattr(network, "architecture", id(network)), leaves[0].noise_conditioned)
        kinds.setdefault(kind, []).append((network, leaves))
    groups = []
    for members in kinds.values():
        networks = [network for network, _ in members]
        special = special_form(networks[0])
        parts = [list(range(len(members)))] if special is None else special.groups(networks)
        groups += [Group([members[i] for i in part]) for part in parts]
    return groups


OF_MODULES = frozenset(vars(nn.Module()))


class _Whole(nn.Module):
    """A leaf that reads no network of its own as a network that gives energies."""

    def __init__(self, leaf: Energy) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.leaf.energy(x, noise_level)


def _readable(leaf: Energy) -> bool:
    """Whether a leaf has something to gain, parameters, and nothing that changes unseen.

    What it holds beside modules must be numbers, names and tuples of them, which are seen when replaced.
    """
    own = (value for name, value in vars(leaf).items() if name not in OF_MODULES)
    return next(leaf.parameters(), None) is not None and all(map(_fixed, own))


def _fixed(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_fixed, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


class Plan:
    """How the leaves of a composition are evaluated: `plan(x, noise_level)` -> their energies, by key.

    Args:
        composition: Any energy.
        stack: Runs networks of one architecture as one batched pass.
    """

    def __init__(self, composition: Energy, stack: bool = False) -> None:
        self.composition = composition
        leaves = list(composition.leaves())
        single = [leaf for leaf in leaves if leaf.body() is None]
        self.wholes = [(leaf, Group([(_Whole(leaf), [leaf])])) for leaf in single if _readable(leaf)]
        self.alone = [leaf for leaf in single if not _readable(leaf)]
        readers: dict[int, Reader] = {}
        for leaf in leaves:
            if (body := leaf.body()) is not None:
                readers.setdefault(id(body), (body, []))[1].append(leaf)
        self.groups = _grouped(list(readers.values()), stack)
        self.linear = None if single else LinearPlan.of(composition, self.groups)

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> dict[Hashable, Tensor]:
        energies = {}
        for leaf in self.alone:
            with naming(leaf, self.composition, x):
                energies[leaf.key] = one_per_state(leaf, leaf.energy(x, noise_level), x)
        for leaf, group in self.wholes:
            with naming(leaf, self.composition, x):
                energies[leaf.key] = one_per_state(leaf, group(x, noise_level)[0], x)
        for group in self.groups:
            with naming(group.readers[0][1][0], self.composition, x):
                outputs = group(x, noise_level)
            for (_, leaves), output in zip(group.readers, outputs, strict=True):
                for leaf in leaves:
                    with naming(leaf, self.composition):
                        energies[leaf.key] = one_per_state(leaf, leaf.read(output), x)
        return energies

    def gradient(
        self, x: Tensor, noise_level: Tensor | None, composition: Energy, coefficients: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Energies of all that its leaves make up, and ∂E/∂x, None where they do not depend on `x`.

        Args:
            x: States, (batch, *event).
            noise_level: Noise that they carry, () or (batch,), or None.
            composition: Of the same leaves; the one that was planned, up to the coefficients inside it.
            coefficients: Those of the composition, (n,) or (batch, n).
        """
        if self.linear is not None:
            found = self.linear(x, noise_level, coefficients)
            if found is not None:
                return found
        return with_gradient(lambda x: composition.combine(self(x, noise_level), coefficients), x)

    @property
    def structure(self) -> Hashable:
        """What is evaluated together: how many networks in each group."""
        return tuple(len(group.networks) for group in self.groups)

    @property
    def copies_weights(self) -> bool:
        """Whether it works on copies of weights, in layouts of their own or stacked."""
        return any(group.copies_weights for group in self.groups)

    def describe(self) -> str:
        """One line for reports: which networks, and by which path they were last evaluated."""
        parts = [group.describe() for group in (*self.groups, *(group for _, group in self.wholes))]
        if self.alone:
            parts.append(f"{len(self.alone)} energ{'y' if len(self.alone) == 1 else 'ies'} alone")
        return "; ".join(parts)
