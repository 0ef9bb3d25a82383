"""Energy and input gradient of a composition, with the work shared between its leaves.

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
from copy import copy
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from composable_ebm.energy import Energy, Sum, naming, one_per_state
from composable_ebm.potential.forms import Evaluate, Form, special_form
from composable_ebm.potential.forms.stacked import Stacked
from composable_ebm.potential.forms.traced import TracedForm
from composable_ebm.potential.linear import LinearPlan
from composable_ebm.potential.operations import Pullback
from composable_ebm.potential.packed import Watch

__all__ = ["FusedPotential", "fuse"]


class _ByHand(torch.autograd.Function):
    """Outputs whose gradient is computed by hand: `evaluate` gives them and pulls cotangents back."""

    @staticmethod
    def forward(ctx, x: Tensor, evaluate: Evaluate) -> Tensor:
        outputs, ctx.pull_back = evaluate(x)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor, None]:
        return ctx.pull_back(cotangent), None


PAUSE = 64
"""How many evaluations go by until a form that refused such states is asked again: to ask takes time."""

Reader = tuple[nn.Module, list[Energy]]
"""A network and the leaves that read it."""


class Group:
    """Networks that are evaluated together, in the fastest form that serves the states given.

    Args:
        readers: The networks, and who reads each.
    Attributes:
        path: The form of the last evaluation, in words.
        refusal: What stopped the better form from serving the last states, or None.
    """

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = list(readers)
        self.networks = [network for network, _ in readers]
        self.noise_conditioned = readers[0][1][0].noise_conditioned or isinstance(self.networks[0], _Whole)
        self.path = ""
        self.refusal: str | None = None
        self._pause = 0
        self._refused: tuple[object, ...] = ()
        special = special_form(self.networks[0])
        self.special: Form | None = None if special is None else special(self.networks)
        single = len(readers) == 1 and special is None
        first = self.networks[0]
        owner = first.leaf if isinstance(first, _Whole) else None
        self.traced = TracedForm(self.networks[0], owner) if single else None
        self._watches = [Watch(network) for network in self.networks]
        self._stacked: Stacked | None = None
        self._stacked_version: tuple = ()

    @property
    def copies_weights(self) -> bool:
        """Whether it works on copies of the networks' weights."""
        return self.special is not None or len(self.networks) > 1

    def by_hand(self, x: Tensor, noise_level: Tensor | None) -> Evaluate | None:
        """The form that gives outputs and pulls cotangents back without a graph, or None where none serves:
        outputs (networks, batch, ...), or those of the one network alone if `single`."""
        level = noise_level if self.noise_conditioned else None
        kind = (x.shape, x.dtype, x.device)
        if self._pause and kind == self._refused:
            self._pause -= 1
            return None
        self.refusal = None
        for form in (self.special, self.traced):
            if form is not None:
                self.refusal = form.refuses(x, level)
                if self.refusal is None:
                    return partial(self._evaluate, form, level)
        self._pause, self._refused = PAUSE, kind
        return None

    def _evaluate(self, form: Form, level: Tensor | None, x: Tensor) -> tuple[Tensor, Pullback]:
        result = form(x, level)
        self.path = form.path
        return result

    @property
    def single(self) -> bool:
        """Whether outputs by hand are those of one network, without an axis for networks."""
        return self.special is None

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> Sequence[Tensor]:
        """Outputs of each network, at noise levels () or (batch,)."""
        if (evaluate := self.by_hand(x, noise_level)) is not None:
            outputs = _ByHand.apply(x, evaluate)
            return [outputs] if self.single else outputs
        level = noise_level if self.noise_conditioned else None
        self.path = "by autograd" + (f": {self.refusal}" if self.refusal else "")
        if len(self.networks) > 1 and self.special is None:
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
        if count > 1 and self.special is None:
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


class LeafPlan:
    """How to evaluate the leaves of a composition: `plan(x, noise_level)` -> energies by key."""

    def __init__(self, composition: Energy, stack: bool) -> None:
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

    def describe(self) -> str:
        """One line for reports: which networks, and by which path they were last evaluated."""
        parts = [group.describe() for group in (*self.groups, *(group for _, group in self.wholes))]
        if self.alone:
            parts.append(f"{len(self.alone)} energ{'y' if len(self.alone) == 1 else 'ies'} alone")
        return "; ".join(parts)


def fuse(energy: Energy, stack: bool = True) -> LeafPlan:
    """The plan that evaluates the leaves of `energy` with the least work.

    Args:
        energy: A composition.
        stack: Runs networks of one architecture as one batched pass.
    """
    return LeafPlan(energy, stack)


class FusedPotential:
    """x -> (E(x), ∂E/∂x) of a composition, at coefficients and a noise level that are tensors.

    Args:
        energy: A composition.
        coefficients: Shape (n,) or (batch, n); those of the expression unless given.
        mask: 1 where states may move, 0 where they are held; broadcasts over states. The gradient
            is zero where they are held, so kernels sample the free part given the rest.
        stack: See `fuse`.
    Attributes:
        evaluations: How many times a gradient was taken.
        may_be_constant: Whether an energy that does not depend on `x` is taken for constant; refused
            otherwise. For parts of a composition, of which the whole has been checked.
    """

    def __init__(
        self,
        energy: Energy,
        coefficients: Tensor | None = None,
        mask: Tensor | None = None,
        stack: bool = True,
    ) -> None:
        self.composition = energy
        self.coefficients = energy.coefficients if coefficients is None else coefficients
        self.noise_level: Tensor | None = None
        self.mask = mask
        self.plan = fuse(energy, stack)
        self.linear = LinearPlan.of(energy, self.plan)
        self.evaluations = 0
        self.may_be_constant = False

    def energy(self, x: Tensor) -> Tensor:
        """E(x), shape (batch,), without gradient."""
        with torch.no_grad():
            return self._evaluate(x)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        if self.linear is not None:
            with torch.no_grad():
                result = self.linear(x, self.noise_level, self.coefficients)
            if result is not None:
                energy, gradient = result
                return energy, gradient if self.mask is None else gradient * self.mask
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self._evaluate(x)
            if not energy.requires_grad and self.may_be_constant:
                return energy, torch.zeros_like(x)
            if not energy.requires_grad:
                raise ValueError(
                    f"the energy of {self.composition} does not depend on `x` by a path that autograd "
                    "follows, so it cannot be sampled by its gradient; keep tensors attached."
                )
            (gradient,) = torch.autograd.grad(energy.sum(), x, materialize_grads=True)
        return energy.detach(), gradient if self.mask is None else gradient * self.mask

    # -- for steps that are captured, see `graphs` -------------------------------------------------

    @cached_property
    def structure(self) -> Hashable:
        """Equal for potentials of one composition up to the weights of its terms."""
        whole = self.composition
        terms = whole.operands if isinstance(whole, Sum) else ()
        key = (type(whole), *(term.key for term in terms)) if terms else whole.key
        return key, tuple(len(group.networks) for group in self.plan.groups)

    @property
    def copies_weights(self) -> bool:
        """Whether it works on copies of weights, in layouts of their own or stacked."""
        return any(group.copies_weights for group in self.plan.groups)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Coefficients, noise level and mask."""
        return self.coefficients, self.noise_level, self.mask

    def reading(self, tensors: Sequence[Tensor | None]) -> Self:
        """The same potential, reading `tensors` instead of its own."""
        other = copy(self)
        coefficients, other.noise_level, other.mask = tensors
        assert coefficients is not None
        other.coefficients = coefficients
        return other

    def count(self, gradients: int) -> None:
        """Counts gradients that were taken elsewhere."""
        self.evaluations += gradients

    def _evaluate(self, x: Tensor) -> Tensor:
        return self.composition.combine(self.plan(x, self.noise_level), self.coefficients)
