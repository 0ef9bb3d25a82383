"""What energies are held to where they are evaluated, and what is said where they break it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from composable_ebm.energy.base import Energy

__all__ = ["changed_states", "independent", "naming", "one_per_state", "parameter_type", "require_values"]


def require_values(reason: str, energies: Iterable[Energy]) -> None:
    """Raises ValueError, with the reason, if an energy is known only by its gradient."""
    for energy in energies:
        if not energy.has_value:
            raise ValueError(
                f"{reason}, and {energy} is known only by its gradient (it is a score, as of a diffusion "
                "model). Sums, weights and ratios of it are right; sample them with a kernel that compares "
                "no energies, such as Langevin under an Annealed schedule."
            )


class naming:
    """Errors inside `with naming(...)` say which leaf of which expression they came from.

    Args:
        leaf: What is evaluated.
        whole: What it is part of.
        x: The states, which must come out as they went in; what PyTorch counts as a change is noticed.
    """

    __slots__ = ("before", "leaf", "whole", "x")

    def __init__(self, leaf: Energy, whole: Energy, x: Tensor | None = None) -> None:
        self.leaf, self.whole = leaf, whole
        self.x = x
        self.before = 0 if x is None or x.is_inference() else x._version

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            if self._changed():
                self._told(changed := ValueError(changed_states(self.leaf)))
                raise changed
        elif isinstance(error, Exception):
            self._told(error)

    def _changed(self) -> bool:
        return self.x is not None and not self.x.is_inference() and self.x._version != self.before

    def _told(self, error: Exception) -> None:
        leaf, whole, x = self.leaf, self.whole, self.x
        if x is not None and "in-place operation" in str(error):
            error.add_note(changed_states(leaf))
        if x is not None and (kind := parameter_type(leaf)) not in (None, x.dtype):
            error.add_note(f"`x` is {x.dtype}, the parameters of {leaf} are {kind}: give x.to({kind}).")
        if leaf is not whole:
            keys = [other.key for other in whole.leaves()]
            place = f"leaf {keys.index(leaf.key) + 1} of {len(keys)}, {leaf}"
            error.add_note(f"while evaluating {place}, of {whole}")


def one_per_state(leaf: Energy, energies: Tensor, x: Tensor) -> Tensor:
    """`energies`, checked to be one a state of `x`: (batch,), also of (batch, 1), in 32 bits at least."""
    if not isinstance(energies, Tensor):
        raise TypeError(f"{leaf} must return a tensor of energies, got {type(energies).__name__}.")
    if energies.ndim == 2 and energies.shape == (len(x), 1):
        energies = energies[:, 0]
    if energies.dtype in (torch.float16, torch.bfloat16):
        energies = energies.float()
    if energies.shape != x.shape[:1]:
        hint = " Sum over the other axes: .flatten(1).sum(1)." if energies.shape[:1] == x.shape[:1] else ""
        raise ValueError(
            f"{leaf} must return one energy per state, shape ({x.shape[0]},), "
            f"got {tuple(energies.shape)}.{hint}"
        )
    return energies


def changed_states(leaf: Energy) -> str:
    """What to say of an energy that changes its states."""
    return (
        f"{leaf} changes the states that it is given in place, which would move the chains: let it work on a "
        "copy, x = x.clone(), or use operations without a trailing underscore (and layers without "
        "inplace=True)."
    )


def independent(energy: Energy) -> str:
    """What to say of an energy whose gradient by states cannot be taken."""
    return (
        f"the energy of {energy} does not depend on `x` by a path that autograd follows, so it cannot be "
        "sampled by its gradient; keep tensors attached."
    )


def parameter_type(leaf: Energy) -> torch.dtype | None:
    """The type of the first parameter that has a floating type of 16 bits or more."""
    kinds = (p.dtype for p in leaf.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    kind = next(kinds, None)
    return kind if kind is None or not leaf.wide_states else torch.promote_types(kind, torch.float32)
