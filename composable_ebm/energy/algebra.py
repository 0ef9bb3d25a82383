"""What the operators and the functions of the algebra build, in canonical form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from composable_ebm.energy.base import Energy
from composable_ebm.energy.checks import require_values
from composable_ebm.energy.nodes import Mixture, Not, Sum, flatten, shared, shared_codec
from composable_ebm.energy.weights import Weight

__all__ = ["either", "given", "log_ratio", "mixture", "negate", "ratio", "weighted_sum"]


def weighted_sum(pairs: Iterable[tuple[Energy, Weight]]) -> Energy:
    """Σᵢ wᵢ Eᵢ as the operators write it: zero terms dropped, and 1*a written a."""
    merged = flatten(pairs)
    kept = [(t, w) for t, w in merged if isinstance(w, Tensor) or w != 0] or merged[:1]
    # Dropped or not, every term must live in the same image space.
    shared_codec([t for t, _ in merged])
    shared("event_shape", "image space", [t for t, _ in merged])
    if len(kept) == 1 and not isinstance(kept[0][1], Tensor) and kept[0][1] == 1:
        return kept[0][0]
    return Sum([t for t, _ in kept], [w for _, w in kept])


def either(first: Energy, second: Energy) -> Mixture:
    """OR, with no mixture inside a mixture."""
    parts = [_components(first), _components(second)]
    terms, weights, log_z = (sum(column, ()) for column in zip(*parts, strict=True))
    return Mixture(terms, weights, log_z)


def _components(energy: Energy) -> tuple[tuple, tuple, tuple]:
    """Components, weights and log Z of a mixture, or of one with a single component."""
    if isinstance(energy, Mixture):
        return energy.operands, energy.weights, energy.log_z
    return (energy,), (1.0,), (0.0,)


def ratio(a: Energy, b: Energy) -> Energy:
    """The likelihood ratio p_a/p_b as an energy, `a - b`. Proper only inside a larger sum.

    Example:
        >>> mix = face + ratio(smile, face) + ratio(glasses, face)   # counts p(face) once
    """
    return a - b


def mixture(
    components: Iterable[Energy],
    weights: Sequence[float] | None = None,
    log_z: Sequence[float] | None = None,
) -> Mixture:
    """OR with proportions; see `Mixture`."""
    return Mixture(list(components), weights, log_z)


def negate(energy: Energy, threshold: float | None = None) -> Energy:
    """Bounded NOT of any energy, see `Not`; τ is the top of its `energy_range` unless given.

    Raises:
        ValueError: If no threshold is given and the energy does not know its range.
    """
    if not energy.has_value:
        raise ValueError(
            f"a bounded NOT compares the energy with a threshold, and {energy} is known only by its gradient "
            "(it is a score, as of a diffusion model). To stay away from it take it off what is sampled: "
            f"2*base - {energy}, or base + w*(base - {energy}), with a base of the same states."
        )
    if threshold is None:
        if energy.energy_range is None:
            raise ValueError(
                f"~({energy}) needs an energy above which a state no longer belongs to it, and {energy} "
                f"does not know its range. Give one: negate({energy}, threshold=...)."
            )
        threshold = energy.energy_range[1]
    return Not(energy, threshold)


def given(base: Energy, *attributes: Energy, weight: float | None = None) -> Energy:
    """p(x) given attributes: an AND that counts what all experts share, p(x), once.

        E(x) = E_base(x) + Σᵢ wᵢ (Eᵢ(x, aᵢ) - Eᵢ(x)),      Eᵢ(x, aᵢ) - Eᵢ(x) = -log pᵢ(aᵢ | x)

    Exact for conditionally independent attributes at w = 1, by Bayes' rule. Each expert is taken
    against its own marginal, so that whatever it got wrong about p(x) cancels. A weight above 1
    asks for more than the data: attributes become surer and pictures less varied.

    Args:
        base: The expert of p(x).
        attributes: Experts at the value asked for; `~expert` for the other one. Anything that has a
            `marginal` will do: an OR of values of one expert, or prompts of a pipeline.
        weight: w of all of them; what each was calibrated with unless given.
    Raises:
        TypeError: If one of them has no marginal to be held against.
    Example:
        >>> mix = given(face, smile, ~beard)
    Reference:
        Liu et al. (2022), arXiv 2206.01714, eq. 11; Dhariwal and Nichol (2021), arXiv 2105.05233,
        section 4, for weights above 1.
    """
    energy = base
    for attribute in attributes:
        marginal = attribute.marginal() if isinstance(attribute, Energy) else None
        if marginal is None:
            raise TypeError(
                f"`given` takes experts at a value of their attribute, got {attribute}. An energy that is "
                f"not p(x | attribute) is added as it is: given(...) + {attribute}."
            )
        strength = attribute.given_weight if weight is None else weight
        energy = energy + strength * (attribute - marginal)
    return energy


def log_ratio(energy: Energy, x1: Tensor, x2: Tensor) -> Tensor:
    """log p(x1)/p(x2) = E(x2) - E(x1), exact, no normalising constant, shape (batch,).

    Args:
        energy: Any energy.
        x1: States, shape (batch, *event).
        x2: States, shape (batch, *event).
    Raises:
        ValueError: If only the gradient of the energy is known.
    """
    require_values("a log ratio is a difference of energies", [energy])
    return energy(x2) - energy(x1)
