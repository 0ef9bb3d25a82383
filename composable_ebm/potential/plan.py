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
Ready = tuple["Group", Evaluate | None]
"""What evaluates some networks, and its way without a graph if it has one."""


class Group:
    """Networks that are evaluated together, in the fastest form that serves the states given.

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
        self.noise_conditioned = readers[0][1][0].noise_conditioned or isinstance(first, _Whole)
        self.single = special is None
        self.form = special
        if special is None and len(readers) == 1:
            self.form = TracedForm(first, first.leaf if isinstance(first, _Whole) else None)
        self._by: Form | str | None = None  # the form of the last evaluation, or what stopped it
        self._asked: tuple[Hashable, int | None, Evaluate | str] = (None, None, "")
        self._pause = 0
        self._watches = [Watch(network) for network in self.networks]
        self._stacked: Stacked | None = None
        self._stacked_version: tuple = ()

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
        level, now = self.heard(noise_level), spell()
        kind = (x.shape, x.dtype, x.device, None if level is None else level.shape)
        known, then, found = self._asked
        refused = isinstance(found, str)
        settled = self._pause and self.single if refused else now is not None and now == then
        if kind != known or not settled:
            found = self.form.ready(x, level)
            self._asked = kind, now, found
            self._pause = PAUSE
        if isinstance(found, str):
            self._pause -= 1
            self._by = found
            return None
        self._by = self.form
        return found

    def outputs(self, x: Tensor, noise_level: Tensor | None, evaluate: Evaluate | None) -> Sequence[Tensor]:
        """Outputs of each network, at noise levels () or (batch,), by what is `ready`."""
        level = self.heard(noise_level)
        if evaluate is not None:
            outputs = _ByHand.apply(x, level, evaluate)
            return [outputs] if self.single else outputs
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
        name = type(first.leaf if isinstance(first, _Whole) else first).__name__
        batched = "in one batched pass" if count > 1 and self.single else ""
        path = ", ".join(filter(None, (batched, self.path)))
        return [(name, count, sum(len(leaves) for _, leaves in self.readers), path)]


def _grouped(readers: Sequence[Reader], stack: bool) -> list[Group]:
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
        everything = [part for group in self.groups for part in (group, *group.apart)]
        self.linear = None if single else LinearPlan.of(composition, everything)

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> dict[Hashable, Tensor]:
        return self._energies(x, noise_level, self._ready(x, noise_level))

    def _ready(self, x: Tensor, noise_level: Tensor | None) -> list[Ready]:
        """The groups that serve such states, and what evaluates each; None for autograd."""
        found: list[Ready] = []
        for group in self.groups:
            evaluate = group.ready(x, noise_level)
            if evaluate is None and group.apart:
                found += [(each, each.ready(x, noise_level)) for each in group.apart]
            else:
                found.append((group, evaluate))
        return found

    def _energies(
        self, x: Tensor, noise_level: Tensor | None, ready: Sequence[Ready]
    ) -> dict[Hashable, Tensor]:
        energies = {}
        for leaf in self.alone:
            with naming(leaf, self.composition, x):
                energies[leaf.key] = one_per_state(leaf, leaf.energy(x, noise_level), x)
        for leaf, group in self.wholes:
            with naming(leaf, self.composition, x):
                outputs = group.outputs(x, noise_level, group.ready(x, noise_level))
                energies[leaf.key] = one_per_state(leaf, outputs[0], x)
        for group, evaluate in ready:
            with naming(group.readers[0][1][0], self.composition, x) as told:
                outputs = group.outputs(x, noise_level, evaluate)
                for (_, leaves), output in zip(group.readers, outputs, strict=True):
                    for leaf in leaves:
                        told.leaf = leaf
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
        ready = self._ready(x, noise_level)
        if self.linear is not None:
            found = self.linear(x, noise_level, coefficients, ready)
            if found is not None:
                return found
        return with_gradient(
            lambda x: composition.combine(self._energies(x, noise_level, ready), coefficients), x
        )

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
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for group in (*self.groups, *(group for _, group in self.wholes)):
            for name, count, readers, path in group.kinds():
                before = found.get((name, path), (0, 0))
                found[name, path] = before[0] + count, before[1] + readers
        parts = []
        for (name, path), (count, readers) in found.items():
            text = f"one {name}" if count == 1 else f"{count} {name}"
            text += f", read by {readers} terms" if readers > count else ""
            parts.append(text + (f" ({path})" if path else ""))
        if self.alone:
            parts.append(f"{len(self.alone)} energ{'y' if len(self.alone) == 1 else 'ies'} alone")
        return "; ".join(parts)
