"""Energies of the leaves of a composition, with the work shared between them, and their gradient.

A composition is a function of the energies of its leaves, E = f(E₁(x), …, Eₙ(x)), so its gradient is

    ∂E/∂x = Σᵢ ∂f/∂Eᵢ ∂Eᵢ/∂x

Autograd takes ∂f/∂Eᵢ, of a few numbers a state, and what evaluates the networks pulls it back to x:

    leaves that read one network (values of one conditional expert)  share its output;
    networks for which a form is registered                          run as one pass of its making;
    networks of one architecture                                     run as one batched pass (CUDA);
    everything else                                                  is traced, or evaluated by autograd.

Each form equals the plain one to float tolerance. Only the input gradient is computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from composable_ebm.energy import Energy, naming, one_per_state, slopes
from composable_ebm.potential.evaluating import spell
from composable_ebm.potential.forms import Evaluate
from composable_ebm.potential.group import Group, Reader, Whole, grouped, readable
from composable_ebm.potential.memory import keep_freed_memory
from composable_ebm.potential.operations import Pullback
from composable_ebm.potential.packed import version_of

__all__ = ["Plan"]


class _Pass(NamedTuple):
    """Networks evaluated without a graph: their outputs, and what pulls cotangents back to the states."""

    group: Group
    outputs: Tensor
    pull_back: Pullback


class Plan:
    """How the leaves of a composition are evaluated: `plan(x, noise_level)` -> their energies, by key.

    Args:
        composition: Any energy.
        stack: Runs networks of one architecture as one batched pass.
    Attributes:
        alone: Leaves that nothing but autograd evaluates.
        groups: What evaluates the others.
        is_sum: Whether it is a weighted sum of what networks give, so that ∂E/∂outputs depends on the
            coefficients alone. Of a step of four face experts at 16 chains that is a twentieth.
    """

    def __init__(self, composition: Energy, stack: bool = False) -> None:
        keep_freed_memory()
        self.composition = composition
        leaves = list(composition.leaves())
        readers: dict[int, Reader] = {}
        self.alone: list[Energy] = []
        for leaf in leaves:
            if (body := leaf.body()) is not None:
                readers.setdefault(id(body), (body, []))[1].append(leaf)
            elif readable(leaf):
                readers[id(leaf)] = Whole(leaf), [leaf]
            else:
                self.alone.append(leaf)
        self.groups = grouped(list(readers.values()), stack)
        self.is_sum = composition.is_sum and not self.alone
        self._settled: tuple[Hashable, list[tuple[Group, Evaluate | None]]] = (None, [])
        self._made_for: tuple = ()
        self._cotangents: list[Tensor] = []
        self._coefficients: Tensor | None = None  # kept, so that its place is not taken by another

    def __call__(self, x: Tensor, noise_level: Tensor | None) -> dict[Hashable, Tensor]:
        ready = self._ready(x, noise_level)
        with torch.no_grad():
            passes = self._passes(x, noise_level, ready)
        return self._energies(x, noise_level, ready, {each.group: each.outputs for each in passes})

    @torch.no_grad()
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
        passes = self._passes(x, noise_level, ready)
        if not passes:  # all of it by autograd
            energy, _, gradient = self._differentiated(x, noise_level, composition, coefficients, ready, [])
            return energy, gradient
        made_for = (version_of(coefficients), x.dtype, [(p.group, p.outputs.shape) for p in passes])
        if made_for == self._made_for:
            return _pulled(passes, self._cotangents)
        energy, cotangents, gradient = self._differentiated(
            x, noise_level, composition, coefficients, ready, passes
        )
        known = [part for part in cotangents if part is not None and part.dtype == x.dtype]
        narrow = coefficients.dtype == x.dtype or not coefficients.numel()
        if self.is_sum and narrow and len(known) == len(ready):
            self._made_for, self._cotangents, self._coefficients = made_for, known, coefficients
            return _pulled(passes, known)  # where weights cancel, before they meet large energies
        for each, cotangent in zip(passes, cotangents, strict=True):
            if cotangent is not None:
                part = each.pull_back(cotangent)
                gradient = part if gradient is None else gradient + part
        return energy, gradient

    def _differentiated(
        self,
        x: Tensor,
        noise_level: Tensor | None,
        composition: Energy,
        coefficients: Tensor,
        ready: Sequence[tuple[Group, Evaluate | None]],
        passes: Sequence[_Pass],
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
        """Energies, ∂E/∂outputs of each pass, and ∂E/∂x of what is evaluated by autograd."""
        outputs = {each.group: each.outputs.detach().requires_grad_() for each in passes}
        with torch.enable_grad():
            x = x.detach()
            if self.alone or len(passes) < len(ready):
                x.requires_grad_()
            energies = self._energies(x, noise_level, ready, outputs)
            energy = composition.combine(energies, coefficients)
            if not energy.requires_grad:
                return energy, [None] * len(passes), None
            *cotangents, gradient = slopes(energy, [*outputs.values(), x])
        return energy.detach(), cotangents, gradient

    def _ready(self, x: Tensor, noise_level: Tensor | None) -> list[tuple[Group, Evaluate | None]]:
        """The groups that serve such states, and what evaluates each without a graph, if anything does.

        It is asked once for states of a kind in a spell of `evaluating`.
        """
        now = spell()
        kind = (now, x.shape, x.dtype, x.device, None if noise_level is None else noise_level.shape)
        if now is not None and kind == self._settled[0]:
            return self._settled[1]
        found: list[tuple[Group, Evaluate | None]] = []
        for group in self.groups:
            evaluate = group.ready(x, noise_level)
            if evaluate is None and group.apart:
                found += [(each, each.ready(x, noise_level)) for each in group.apart]
            else:
                found.append((group, evaluate))
        self._settled = kind, found
        return found

    def _passes(
        self, x: Tensor, noise_level: Tensor | None, ready: Sequence[tuple[Group, Evaluate | None]]
    ) -> list[_Pass]:
        """What is evaluated without a graph."""
        passes: list[_Pass] = []
        for group, evaluate in ready:
            if evaluate is not None:
                with naming(group.leaf, self.composition):
                    passes.append(_Pass(group, *evaluate(x, group.heard(noise_level))))
        return passes

    def _energies(
        self,
        x: Tensor,
        noise_level: Tensor | None,
        ready: Sequence[tuple[Group, Evaluate | None]],
        known: Mapping[Group, Tensor],
    ) -> dict[Hashable, Tensor]:
        """Energies of all leaves, from the outputs that are known, and from those of calling the rest."""
        energies = {}
        for leaf in self.alone:
            with naming(leaf, self.composition, x):
                energies[leaf.key] = one_per_state(leaf, leaf.energy(x, noise_level), x)
        for group, _ in ready:
            with naming(group.leaf, self.composition, x) as told:
                each: Sequence[Tensor] | Tensor
                if (outputs := known.get(group)) is None:
                    each = group.outputs(x, noise_level)
                else:
                    each = [outputs] if group.single else outputs
                for (network, leaves), output in zip(group.readers, each, strict=True):
                    for leaf in leaves:
                        told.leaf = leaf
                        energy = output if isinstance(network, Whole) else leaf.read(output)
                        energies[leaf.key] = one_per_state(leaf, energy, x)
        return energies

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
        for group in self.groups:
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


def _pulled(passes: Sequence[_Pass], cotangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ outputs · cotangents over all but the batch, and its gradient by the states."""
    energy: Tensor | None = None
    gradient: Tensor | None = None
    for (group, outputs, pull_back), cotangent in zip(passes, cotangents, strict=True):
        part, slope = outputs * cotangent, pull_back(cotangent)
        if part.ndim > 1:  # networks come first where there are several
            part = part.sum(1) if group.single else part.sum((0, 2))
        energy = part if energy is None else energy + part
        gradient = slope if gradient is None else gradient + slope
    assert energy is not None
    assert gradient is not None
    return energy, gradient
