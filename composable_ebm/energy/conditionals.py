"""What an energy can tell of its conditional distributions, for Gibbs sampling.

Energies whose hidden units can be summed out and whose visible units interact at most in pairs
(restricted and full Boltzmann machines, harmoniums) are described by a few arrays, over the states
x flattened to `size` units:

    E(x) = constant - Σᵢ bᵢxᵢ + ½ Σᵢ λᵢxᵢ² - ½ Σᵢₖ xᵢCᵢₖxₖ - Σⱼ log(1 + exp aⱼ),   aⱼ = cⱼ + Σᵢ xᵢWᵢⱼ

    b  field      λ  precision (0 for bits)      C  coupling, symmetric, zero diagonal
    c  bias of the hidden units                  W  weight, (size, hidden)

Each softplus is a hidden bit that was summed out, so that with hidden bits h drawn first

    p(hⱼ = 1 | x) = σ(aⱼ)
    bits:   p(xᵢ = 1 | h, the other x) = σ(ηᵢ)                 η = b + W h + C x
    reals:  p(xᵢ | h) = N(ηᵢ/λᵢ, 1/λᵢ)

Reference:
    Welling, Rosen-Zvi and Hinton (2004), Exponential family harmoniums with an application to
    information retrieval; Smolensky (1986), harmony theory; Osindero and Hinton (2008), Modeling
    image patches with a directed hierarchy of Markov random fields, for W and C together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Conditionals"]


@dataclass(frozen=True, eq=False)
class Conditionals:
    """The arrays of the formula above. An energy that has them returns them from `conditionals()`.

    Attributes:
        field: b, (size,).
        precision: λ, (size,), positive; None for bits.
        weight: W, (size, hidden); None without hidden units.
        hidden_bias: c, (hidden,); given with `weight`.
        coupling: C, (size, size); None where units meet only through hidden ones. Bits only.
        groups: With a coupling, a number for each unit; units of one number are not coupled to
            each other and are drawn together.
        constant: In nats, ().
    """

    field: Tensor
    precision: Tensor | None = None
    weight: Tensor | None = None
    hidden_bias: Tensor | None = None
    coupling: Tensor | None = None
    groups: tuple[int, ...] = ()
    constant: Tensor | float = 0.0

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.hidden_bias is None):
            raise ValueError("`weight` and `hidden_bias` of hidden units are given together.")
        if self.coupling is not None:
            if len(self.groups) != len(self.field):
                raise ValueError(
                    f"a coupling of {len(self.field)} units needs as many `groups`, got {len(self.groups)}."
                )
            if self.precision is not None:
                raise ValueError("a coupling is between bits; real units take a precision only.")

    @property
    def size(self) -> int:
        """Number of visible units."""
        return len(self.field)

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return 0 if self.hidden_bias is None else len(self.hidden_bias)

    def hidden_fields(self, x: Tensor) -> Tensor:
        """a, (batch, hidden), of states (batch, size)."""
        assert self.weight is not None
        assert self.hidden_bias is not None
        return torch.addmm(self.hidden_bias, x, self.weight)

    def energy(self, x: Tensor, fields: Tensor | None = None) -> Tensor:
        """E(x), (batch,), of states (batch, size); `fields` are their `hidden_fields` where known."""
        energy = self.constant - x @ self.field
        if self.precision is not None:
            energy = energy + x.square() @ self.precision / 2
        if self.coupling is not None:
            energy = energy - ((x @ self.coupling) * x).sum(1) / 2
        if self.weight is not None:
            fields = self.hidden_fields(x) if fields is None else fields
            energy = energy - F.softplus(fields).sum(1)
        return energy

    def log_z(self) -> Tensor:
        """log ∫ exp(-E), (), where units do not interact: weight and coupling zero or absent.

        log Z = -constant + hidden log 1+exp(c) + Σᵢ log(1 + exp bᵢ) for bits, and for reals
        Σᵢ (bᵢ²/λᵢ + log 2π/λᵢ)/2.
        """
        if self.precision is None:
            visible = F.softplus(self.field).sum()
        else:
            visible = (self.field.square() / self.precision + (2 * torch.pi / self.precision).log()).sum() / 2
        hidden = 0.0 if self.hidden_bias is None else F.softplus(self.hidden_bias).sum()
        return visible + hidden - self.constant
