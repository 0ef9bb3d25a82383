"""Energies and the algebra that composes them.

An energy E defines a density up to a constant,

    p(x) = exp(-E(x)) / Z,      Z = ∫ exp(-E(x)) dx,

so adding energies multiplies densities, scaling an energy raises its density to a power, and no Z
is needed to sample the result. The symbols, once for all nodes below:

    Eᵢ   energy of child i, in nats, shape (batch,)
    wᵢ   its coefficient: a number, or a tensor (batch,) with one value per row

Every node is a function of the energies of its *leaves* alone. That splits an evaluation in two:
the leaves turn `x` into numbers (all the work), `combine` turns those numbers into one (the
theory). Structure (which leaves, which nodes) is fixed when the expression is written;
coefficients are data, given at call time or taken from the expression.

Reference:
    Hinton (2002), Training products of experts by minimizing contrastive divergence.
    Du, Li and Mordatch (2020), Compositional visual generation with energy based models,
    arXiv 2004.06030, sections 3.2 to 3.4.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from composable_ebm.weights import (
    Weight,
    as_weight,
    format_weight,
    is_weight,
    stack_weights,
    weight_key,
    weight_on,
)

if TYPE_CHECKING:
    from composable_ebm.conditionals import Conditionals

LeafEnergies = Mapping[Hashable, Tensor]

__all__ = [
    "Energy",
    "Mixture",
    "Not",
    "Sum",
    "known_by_gradient",
    "log_ratio",
    "mixture",
    "negate",
    "ratio",
    "require_values",
]


class Energy(nn.Module, ABC):
    """Anything with an energy: `E: (batch, *event) -> (batch,)` in nats, low = likely.

    A subclass is a leaf and defines `energy`; the operators build the nodes of this file.

    Attributes:
        name: What recipes call it.
        event_shape: Shape of one state, or None where any shape will do.
        data_range: Smallest and largest value of the data, or None where unbounded.
        energy_range: Energies between which nearly all (99.8 %) of its own samples lie, or None
            where unknown. Negation takes its threshold from it, and `SampleResult.report` tells
            by it whether a request was met.
        sampler_settings: Sampler and number of steps it was calibrated with, or None.
        noise_conditioned: Whether `energy` uses the noise level.
        binary: Whether states are bits, 0 or 1. A composition with such a term lives on bits.
        has_value: Whether the number that `energy` returns is an energy. Of a diffusion model only
            the score is known: sums of such energies have the right gradient, see
            `known_by_gradient`, and whatever compares values refuses them.
    Example:
        >>> both = smile + 2 * glasses        # p ∝ p_smile · p_glasses²
        >>> either = smile | glasses          # p ∝ p_smile + p_glasses
        >>> without = smile + ~glasses
    """

    # An array on the left of an operator must not become an array of objects.
    __array_ufunc__ = None

    name: str = ""
    event_shape: tuple[int, ...] | None = None
    data_range: tuple[float, float] | None = None
    energy_range: tuple[float, float] | None = None
    sampler_settings: Mapping | None = None
    noise_conditioned: bool = False
    binary: bool = False
    has_value: bool = True

    @abstractmethod
    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        """Energies in nats, shape (batch,), of states `x`, shape (batch, *event).

        `noise_level` is the standard deviation of the noise that `x` carries, in data units; only
        noise-conditioned energies use it.
        """

    # -- evaluation -----------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        coefficients: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Energies in nats, shape (batch,).

        Args:
            x: States, shape (batch, *event).
            coefficients: Replaces `self.coefficients`, shape (n,) or (batch, n).
            noise_level: Noise that `x` carries, in data units, for noise-conditioned leaves.
        Raises:
            ValueError: If `x` or `coefficients` has the wrong shape.
        """
        self.check_states(x)
        if coefficients is None:
            coefficients = self.coefficients
        self.check_coefficients(coefficients, len(x))
        coefficients = coefficients.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        energies: dict[Hashable, Tensor] = {}
        for leaf in self.leaves():
            with naming(leaf, self):
                energies[leaf.key] = one_per_state(leaf, leaf.energy(x, noise_level), x)
        return self.combine(energies, coefficients)

    def score(self, x: Tensor, **options: Tensor | None) -> Tensor:
        """-∂E/∂x, shape of `x`: the direction in which states become more likely.

        Args:
            x: States, shape (batch, *event).
            options: `coefficients` and `noise_level`, as in a call.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self(x, **options).sum(), x)[0]

    def terms(self, x: Tensor, *, noise_level: Tensor | None = None) -> dict[str, Tensor]:
        """What each term contributes at `x`: text of the term -> energies in nats, (batch,)."""
        return {str(self): self(x, noise_level=noise_level)}

    def check_states(self, x: Tensor) -> None:
        """Raises ValueError unless `x` is a batch of states of this energy."""
        if self.event_shape is None or (tuple(x.shape[1:]) == self.event_shape and x.ndim):
            return
        event = ", ".join(map(str, self.event_shape))
        message = f"`x` must have shape (batch, {event}) for {self}, got {tuple(x.shape)}."
        if tuple(x.shape) == self.event_shape:
            message += " Add the batch axis: x[None]."
        elif x.ndim == 4 and len(self.event_shape) == 3 and x.shape[-1] == self.event_shape[0]:
            message += " Images are channels first: x.permute(0, 3, 1, 2)."
        elif x.ndim == 3 and len(self.event_shape) == 3 and x.shape[-1] == self.event_shape[0]:
            message += " Images are channels first: x.permute(2, 0, 1)[None]."
        raise ValueError(message)

    def check_coefficients(self, coefficients: Tensor, batch: int) -> None:
        """Raises ValueError unless `coefficients` fit this expression and a batch of that size."""
        count, shape = self.num_coefficients, tuple(coefficients.shape)
        if shape not in ((count,), (1, count), (batch, count)):
            raise ValueError(
                f"`coefficients` must have shape ({count},) or (batch, {count}) for {self} "
                f"and a batch of {batch}, got {shape}."
            )

    def unlike(self, energies: Tensor) -> Tensor | None:
        """Which states, given their energies (batch,), are unlike this energy's own samples.

        None where it cannot tell, for want of a range.
        """
        if self.energy_range is None:
            return None
        low, high = self.energy_range
        return energies > high + (high - low)

    # -- structure ------------------------------------------------------------------------------

    @property
    def key(self) -> Hashable:
        """Equal keys mean the same energy: like terms merge, equal leaves are evaluated once."""
        return id(self)

    def leaves(self) -> Iterator[Energy]:
        """The distinct leaves of this expression, in order of appearance."""
        yield self

    def combine(self, energies: LeafEnergies, coefficients: Tensor) -> Tensor:
        """The energy of this node, (batch,), from the energies of its leaves, by key."""
        return energies[self.key]

    @property
    def num_coefficients(self) -> int:
        """How many coefficients the expression has, its own first, then those of its children."""
        return 0

    @property
    def coefficients(self) -> Tensor:
        """The coefficients written in the expression, float64, shape (n,) or (batch, n)."""
        return torch.zeros(0, dtype=torch.float64)

    def complement(self) -> Energy:
        """What `~` gives; a finite attribute overrides it with the expert of its other values."""
        return negate(self)

    def conditionals(self) -> Conditionals | None:
        """What Gibbs sampling has to know; None where conditionals have no closed form."""
        return None

    def named(self, name: str) -> Energy:
        """Sets the name that recipes and reports print, and returns the energy itself."""
        self.name = name
        return self

    def extra_repr(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return self.name or type(self).__name__

    def tree(self, indent: int = 0) -> str:
        """An indented view: kinds, weights, parameter counts."""
        return "  " * indent + f"{self}  ({type(self).__name__}{_parameters(self)})"

    def body(self) -> nn.Module | None:
        """The network that this leaf reads, if leaves may share it; then `read` reads its output."""
        return None

    def read(self, outputs: Tensor) -> Tensor:
        """Energies (batch,) from the outputs of `body()`."""
        raise TypeError(f"{self} has no body to read")

    # -- operators ------------------------------------------------------------------------------

    def __add__(self, other: object) -> Energy:
        return _collect([(self, 1.0), (other, 1.0)]) if isinstance(other, Energy) else NotImplemented

    def __radd__(self, other: object) -> Energy:
        # sum([...]) starts from the number 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    __and__ = __add__

    def __sub__(self, other: object) -> Energy:
        return _collect([(self, 1.0), (other, -1.0)]) if isinstance(other, Energy) else NotImplemented

    def __mul__(self, weight: object) -> Energy:
        return _collect([(self, as_weight(weight))]) if is_weight(weight) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, temperature: object) -> Energy:
        if not is_weight(temperature):
            return NotImplemented
        if not isinstance(temperature, Tensor) and temperature == 0:
            raise ValueError(f"a temperature must not be zero, got ({self}) / {temperature}.")
        return self * (1.0 / temperature)  # type: ignore[operator]

    def __neg__(self) -> Energy:
        return self * -1.0

    def __or__(self, other: object) -> Energy:
        if not isinstance(other, Energy):
            return NotImplemented
        parts = [_components(self), _components(other)]
        terms, weights, log_z = (sum(column, ()) for column in zip(*parts, strict=True))
        return Mixture(terms, weights, log_z)

    def __invert__(self) -> Energy:
        return self.complement()


class _Node(Energy):
    """An energy made of others."""

    def __init__(self, children: Sequence[Energy]) -> None:
        super().__init__()
        if not children:
            raise ValueError(f"a {type(self).__name__} needs at least one energy, got none.")
        for child in children:
            if not isinstance(child, Energy):
                raise TypeError(
                    f"a {type(self).__name__} is made of energies, got {type(child).__name__}. "
                    "Wrap a function with composable_ebm.from_callable."
                )
        self.children_ = nn.ModuleList(children)
        self.event_shape = _shared("event_shape", "image space", children)
        self.data_range = _shared("data_range", "data range", children)
        self.noise_conditioned = any(child.noise_conditioned for child in children)
        self.binary = any(child.binary for child in children)
        self.has_value = all(child.has_value for child in children)

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self(x, noise_level=noise_level)

    @property
    def operands(self) -> tuple[Energy, ...]:
        """The energies this node is made of."""
        return tuple(self.children_)  # type: ignore[arg-type]

    def leaves(self) -> Iterator[Energy]:
        seen: set[Hashable] = set()
        for leaf in (leaf for child in self.operands for leaf in child.leaves()):
            if leaf.key not in seen:
                seen.add(leaf.key)
                yield leaf

    def _own(self) -> tuple[Weight, ...]:
        """This node's own coefficients."""
        raise TypeError(f"{type(self).__name__} has no coefficients")

    @property
    def num_coefficients(self) -> int:
        return len(self._own()) + sum(child.num_coefficients for child in self.operands)

    @property
    def coefficients(self) -> Tensor:
        blocks = [stack_weights(self._own()), *(child.coefficients for child in self.operands)]
        # Not torch.broadcast_shapes, whose first call loads sympy, half a second of a cold start.
        rows = max((block.shape[:-1] for block in blocks), key=lambda shape: (len(shape), *shape))
        blocks = [block.expand(*rows, block.shape[-1]) for block in blocks]
        return torch.cat([block.to(blocks[0].device) for block in blocks], dim=-1)

    def _split(self, coefficients: Tensor) -> tuple[Tensor, list[Tensor]]:
        sizes = [len(self._own()), *(child.num_coefficients for child in self.operands)]
        own, *rest = coefficients.split(sizes, dim=-1)
        return own, rest

    def _child_energies(self, energies: LeafEnergies, blocks: list[Tensor]) -> Tensor:
        """Energies of the children, shape (batch, children)."""
        pairs = zip(self.operands, blocks, strict=True)
        return torch.stack([child.combine(energies, block) for child, block in pairs], dim=-1)

    def tree(self, indent: int = 0) -> str:
        head = "  " * indent + type(self).__name__
        lines = [head + _parameters(self).replace(", ", "  ", 1)]
        for child, note in zip(self.operands, self._notes(), strict=True):
            first, *rest = child.tree(indent + 1).split("\n")
            pad = "  " * (indent + 1)
            lines += [f"{pad}{note} {first.strip()}".rstrip(), *rest]
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        return ["" for _ in self.operands]


class Sum(_Node):
    """AND, a product of experts: E(x) = Σᵢ wᵢ Eᵢ(x).

    Proportional to the product of the densities, each to the power wᵢ. A negative coefficient
    divides by a density: `a - b` is the likelihood ratio p_a/p_b. Such a composition can be
    improper (no Z exists), and samplers refuse one that has no positive term.

    Where experts share a base density p(x), as all experts trained on one data set do, a plain sum
    counts it once per term. Ratios count it once,

        base + Σᵢ wᵢ ratio(aᵢ, base)    i.e.    p(x) Πᵢ (p(x|aᵢ)/p(x))^wᵢ,

    which is exact for conditionally independent attributes and folds to one Sum.

    Nested sums are flattened and like terms are merged. Terms written with coefficient 0 are kept,
    so that a slider at zero does not change the structure; the operators drop them.

    Args:
        terms: Energies of one image space.
        weights: One coefficient each, a finite number or a tensor (batch,).
    Raises:
        ValueError: If there are no terms, the lengths differ, a weight is not finite, or the terms
            live in different image spaces.
    Reference:
        Hinton (2002); Du et al. (2020), arXiv 2004.06030, eq. 7; Liu et al. (2022),
        arXiv 2206.01714, eq. 11 for the ratio form.
    """

    def __init__(self, terms: Sequence[Energy], weights: Sequence[Weight] | None = None) -> None:
        weights = [1.0] * len(terms) if weights is None else list(weights)
        if len(terms) != len(weights):
            raise ValueError(f"a Sum of {len(terms)} terms needs as many weights, got {len(weights)}.")
        merged = _flatten(zip(terms, map(as_weight, weights), strict=True))
        super().__init__([term for term, _ in merged])
        self.weights: tuple[Weight, ...] = tuple(weight for _, weight in merged)

    @property
    def key(self) -> Hashable:
        return ("sum", *((t.key, weight_key(w)) for t, w in zip(self.operands, self.weights, strict=True)))

    def combine(self, energies: LeafEnergies, coefficients: Tensor) -> Tensor:
        own, blocks = self._split(coefficients)
        return (own * self._child_energies(energies, blocks)).sum(-1)

    def terms(self, x: Tensor, *, noise_level: Tensor | None = None) -> dict[str, Tensor]:
        pairs = zip(self.operands, self.weights, strict=True)
        return _labelled((_product(w, t), weight_on(w, x) * t(x, noise_level=noise_level)) for t, w in pairs)

    def _own(self) -> tuple[Weight, ...]:
        return self.weights

    def _notes(self) -> list[str]:
        return [f"{format_weight(w)} *" for w in self.weights]

    def __str__(self) -> str:
        text = ""
        for term, weight in zip(self.operands, self.weights, strict=True):
            negative = not isinstance(weight, Tensor) and weight < 0
            joint = (" - " if negative else " + ") if text else ("-" if negative else "")
            text += joint + _product(-weight if negative else weight, term)
        return text


class Mixture(_Node):
    """OR, a mixture of densities: E(x) = -log Σᵢ exp(log wᵢ - log Zᵢ - Eᵢ(x)).

    The wᵢ are the proportions of the components only where the log Zᵢ are right. They are unknown
    for trained energies and 0 unless given; `composable_ebm.calibrate` estimates their differences
    and returns the mixture with them.

    The coefficients of the node are the log wᵢ - log Zᵢ.

    Args:
        components: Energies of one image space.
        weights: Positive and finite, relative (1 each unless given).
        log_z: Log normalising constants Zᵢ in nats, up to a shared constant (0 unless given).
    Raises:
        ValueError: If lengths differ, a weight is not positive, or image spaces differ.
    Reference:
        Du et al. (2020), arXiv 2004.06030, eq. 9.
    """

    def __init__(
        self,
        components: Sequence[Energy],
        weights: Sequence[float] | None = None,
        log_z: Sequence[float] | None = None,
    ) -> None:
        super().__init__(components)
        require_values("an OR weighs its components by their energies", components)
        self.weights = tuple(float(w) for w in ([1.0] * len(components) if weights is None else weights))
        self.log_z = tuple(float(z) for z in ([0.0] * len(components) if log_z is None else log_z))
        for label, values in (("weights", self.weights), ("log_z", self.log_z)):
            if len(values) != len(components):
                raise ValueError(
                    f"a Mixture of {len(components)} components needs as many `{label}`, got {len(values)}."
                )
        if not all(0 < w < math.inf for w in self.weights) or not all(map(math.isfinite, self.log_z)):
            raise ValueError(
                "`weights` of a Mixture must be positive and `log_z` finite, "
                f"got {self.weights}, {self.log_z}."
            )

    @property
    def key(self) -> Hashable:
        return ("mixture", *zip((c.key for c in self.operands), self.weights, self.log_z, strict=True))

    @property
    def energy_range(self) -> tuple[float, float] | None:  # type: ignore[override]
        """Bounds from the ranges of the components, where all are known."""
        ranges = [component.energy_range for component in self.operands]
        shifts = [float(own) for own in self._own()]
        known = [(r[0] - s, r[1] - s) for r, s in zip(ranges, shifts, strict=True) if r is not None]
        if len(known) < len(ranges):
            return None
        return min(low for low, _ in known) - math.log(len(known)), max(high for _, high in known)

    def combine(self, energies: LeafEnergies, coefficients: Tensor) -> Tensor:
        own, blocks = self._split(coefficients)
        return -torch.logsumexp(own - self._child_energies(energies, blocks), dim=-1)

    def terms(self, x: Tensor, *, noise_level: Tensor | None = None) -> dict[str, Tensor]:
        return _labelled((str(c), c(x, noise_level=noise_level)) for c in self.operands)

    def _own(self) -> tuple[Weight, ...]:
        return tuple(math.log(w) - z for w, z in zip(self.weights, self.log_z, strict=True))

    @property
    def _plain(self) -> bool:
        """Whether a | b says it all. Of mixtures inside mixtures it does not: | would flatten them."""
        nested = any(isinstance(component, Mixture) for component in self.operands)
        return set(self.weights) == {1.0} and not any(self.log_z) and len(self.operands) > 1 and not nested

    def _notes(self) -> list[str]:
        return [f"{format_weight(w)} of" for w in self.weights]

    def __str__(self) -> str:
        if self._plain:
            return " | ".join(map(str, self.operands))
        options = f", weights=[{', '.join(map(format_weight, self.weights))}]"
        if any(self.log_z):
            options += f", log_z=[{', '.join(map(format_weight, self.log_z))}]"
        return f"mixture([{', '.join(map(str, self.operands))}]{options})"


class Not(_Node):
    """NOT, bounded: E(x) = log(1 + exp(τ - E₁(x))), between 0 and τ - min E₁.

    Against a background of constant density exp(-τ), a state belongs to E₁ with probability
    σ(τ - E₁), and this is the negative log of the other outcome: it pushes away where E₁ is
    likely, and is flat (never downhill for ever, as -E₁ would be) where E₁ is already unlikely.

    The only coefficient of the node is τ.

    Args:
        operand: The energy to stay away from.
        threshold: τ in nats: states with E₁ < τ count as belonging to it.
    Raises:
        ValueError: If the threshold is not finite.
    """

    def __init__(self, operand: Energy, threshold: float) -> None:
        super().__init__([operand])
        require_values("a bounded NOT compares the energy with a threshold", [operand])
        self.threshold = float(threshold)
        if not math.isfinite(self.threshold):
            raise ValueError(f"`threshold` of a Not must be finite, got {threshold}.")

    @property
    def key(self) -> Hashable:
        return ("not", self.operands[0].key, self.threshold)

    def combine(self, energies: LeafEnergies, coefficients: Tensor) -> Tensor:
        own, (block,) = self._split(coefficients)
        return nn.functional.softplus(own[..., 0] - self.operands[0].combine(energies, block))

    def complement(self) -> Energy:
        return self.operands[0]

    def unlike(self, energies: Tensor) -> Tensor:
        return energies > math.log(2)  # there E₁ < τ: the state belongs to what is negated

    def _own(self) -> tuple[Weight, ...]:
        return (self.threshold,)

    def __str__(self) -> str:
        operand = self.operands[0]
        # ~ of some energies, such as binary experts, is another energy than this node.
        if operand.energy_range is not None and operand.complement().key == self.key:
            return f"~{operand}" if not isinstance(operand, _Node) else f"~({operand})"
        return f"negate({operand}, threshold={format_weight(self.threshold)})"


# -- functions that read like the theory ---------------------------------------------------------


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
    if threshold is None:
        if energy.energy_range is None:
            raise ValueError(
                f"~({energy}) needs an energy above which a state no longer belongs to it, and {energy} "
                f"does not know its range. Give one: negate({energy}, threshold=...)."
            )
        threshold = energy.energy_range[1]
    return Not(energy, threshold)


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


def known_by_gradient(x: Tensor, gradient: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """Numbers (batch,) whose gradient at `x` is `gradient`, for energies known by their score alone:

        E(x) = value + ⟨gradient, x - x₀⟩,    x₀ = x without its graph.

    Sums, weights and ratios of them then have the right score, by the same backward pass as every
    other energy. An energy that returns them says `has_value = False`.

    Args:
        x: States, shape (batch, *event).
        gradient: -score at `x`, the same shape; it may depend on parameters, but not on `x` through
            autograd: take it at `x.detach()`.
        value: The number itself, (batch,), where something is known of it.
    """
    return value + (gradient * (x - x.detach())).flatten(1).sum(1)


def require_values(reason: str, energies: Iterable[Energy]) -> None:
    """Raises ValueError, with the reason, if an energy is known only by its gradient."""
    for energy in energies:
        if not energy.has_value:
            raise ValueError(
                f"{reason}, and {energy} is known only by its gradient (it is a score, as of a diffusion "
                "model). Sums, weights and ratios of it are right; sample them with a kernel that compares "
                "no energies, such as Langevin under an Annealed schedule."
            )


# -- the machinery of evaluation ----------------------------------------------------------------


@contextmanager
def naming(leaf: Energy, whole: Energy) -> Iterator[None]:
    """Errors inside say which leaf of which expression they came from."""
    try:
        yield
    except Exception as error:
        if leaf is not whole:
            keys = [other.key for other in whole.leaves()]
            place = f"leaf {keys.index(leaf.key) + 1} of {len(keys)}, {leaf}"
            error.add_note(f"while evaluating {place}, of {whole}")
        raise


def one_per_state(leaf: Energy, energies: Tensor, x: Tensor) -> Tensor:
    """`energies`, checked to be one a state of `x`."""
    if not isinstance(energies, Tensor):
        raise TypeError(f"{leaf} must return a tensor of energies, got {type(energies).__name__}.")
    if energies.shape != x.shape[:1]:
        hint = " Sum over the other axes: .flatten(1).sum(1)." if energies.shape[:1] == x.shape[:1] else ""
        raise ValueError(
            f"{leaf} must return one energy per state, shape ({x.shape[0]},), "
            f"got {tuple(energies.shape)}.{hint}"
        )
    return energies


# -- the machinery of canonical form -------------------------------------------------------------


def _flatten(pairs: Iterable[tuple[Energy, Weight]]) -> list[tuple[Energy, Weight]]:
    """Σ in canonical form: no Sum inside a Sum, each key once, in order of appearance."""
    merged: dict[Hashable, tuple[Energy, Weight]] = {}
    for term, weight in pairs:
        if isinstance(term, Sum):
            inner: Iterable[tuple[Energy, Weight]] = (
                (t, weight * w) for t, w in zip(term.operands, term.weights, strict=True)
            )
        else:
            inner = [(term, weight)]
        for leaf, w in inner:
            key = leaf.key if isinstance(leaf, Energy) else id(leaf)
            merged[key] = (leaf, merged[key][1] + w if key in merged else w)
    return list(merged.values())


def _collect(pairs: Iterable[tuple[Energy, Weight]]) -> Energy:
    """What an operator returns: zero terms dropped, and 1*a written a."""
    merged = _flatten(pairs)
    kept = [(t, w) for t, w in merged if isinstance(w, Tensor) or w != 0] or merged[:1]
    # Dropped or not, every term must live in the same image space.
    _shared("event_shape", "image space", [t for t, _ in merged])
    if len(kept) == 1 and not isinstance(kept[0][1], Tensor) and kept[0][1] == 1:
        return kept[0][0]
    return Sum([t for t, _ in kept], [w for _, w in kept])


def _components(energy: Energy) -> tuple[tuple, tuple, tuple]:
    if isinstance(energy, Mixture):
        return energy.operands, energy.weights, energy.log_z
    return (energy,), (1.0,), (0.0,)


def _shared(attribute: str, noun: str, energies: Sequence[Energy]):
    """The one value of `attribute` that all energies which have one agree on."""
    known = [(e, getattr(e, attribute)) for e in energies if getattr(e, attribute) is not None]
    for energy, value in known[1:]:
        if value != known[0][1]:
            hint = ""
            if attribute == "data_range" and known[0][0].binary != energy.binary:
                real = known[0][0] if energy.binary else energy
                hint = f" To ask {real} about bits: on_bits({real})."
            raise ValueError(
                f"energies compose only in one {noun}: {known[0][0]} has {attribute} {known[0][1]}, "
                f"{energy} has {value}.{hint}"
            )
    return known[0][1] if known else None


def _product(weight: Weight, term: Energy) -> str:
    text = str(term)
    if isinstance(term, Sum) or (isinstance(term, Mixture) and term._plain):
        text = f"({text})"
    return text if not isinstance(weight, Tensor) and weight == 1 else f"{format_weight(weight)}*{text}"


def _labelled(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A dictionary of all pairs; the second energy called "a" is called "a #2"."""
    labelled: dict[str, Tensor] = {}
    for text, value in pairs:
        label, count = text, 1
        while label in labelled:
            count += 1
            label = f"{text} #{count}"
        labelled[label] = value
    return labelled


def _parameters(module: nn.Module) -> str:
    count = sum(p.numel() for p in module.parameters())
    return f", {count:,} parameters" if count else ""
