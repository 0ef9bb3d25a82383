"""The nodes: AND, OR and NOT as functions of the energies of their leaves."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from composable_ebm.energy.base import Energy, LeafEnergies, parameter_count
from composable_ebm.energy.checks import require_values
from composable_ebm.energy.numbers import soft_minimum
from composable_ebm.energy.space import Codec
from composable_ebm.energy.weights import (
    Weight,
    as_weight,
    format_weight,
    stack_weights,
    weight_key,
    weight_on,
)

__all__ = ["Mixture", "Node", "Not", "Sum", "flatten", "shared", "shared_codec"]


class Node(Energy):
    """An energy made of others."""

    shares = ("children_",)

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
        self.in_space(shared_codec(children))
        self.event_shape = shared("event_shape", "image space", children)
        self.data_range = shared("data_range", "data range", children)
        self.noise_conditioned = any(child.noise_conditioned for child in children)
        self.binary = any(child.binary for child in children)
        self.has_value = all(child.has_value for child in children)
        self.given_weight = max(child.given_weight for child in children)

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

    @abstractmethod
    def _own(self) -> tuple[Weight, ...]:
        """This node's own coefficients."""

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

    def split(self, coefficients: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Coefficients (..., n) -> this node's own (..., own), and a block (..., m) for each child."""
        sizes = [len(self._own()), *(child.num_coefficients for child in self.operands)]
        own, *rest = coefficients.split(sizes, dim=-1)
        return own, rest

    def _child_energies(self, energies: LeafEnergies, blocks: list[Tensor]) -> Tensor:
        """Energies of the children, shape (batch, children)."""
        pairs = zip(self.operands, blocks, strict=True)
        return torch.stack([child.combine(energies, block) for child, block in pairs], dim=-1)

    def tree(self, indent: int = 0) -> str:
        head = "  " * indent + type(self).__name__
        lines = [head + parameter_count(self).replace(", ", "  ", 1)]
        for child, note in zip(self.operands, self._notes(), strict=True):
            first, *rest = child.tree(indent + 1).split("\n")
            pad = "  " * (indent + 1)
            lines += [f"{pad}{note} {first.strip()}".rstrip(), *rest]
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        return ["" for _ in self.operands]


class Sum(Node):
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
        merged = flatten(zip(terms, map(as_weight, weights), strict=True))
        super().__init__([term for term, _ in merged])
        self.weights: tuple[Weight, ...] = tuple(as_weight(weight) for _, weight in merged)

    @property
    def key(self) -> Hashable:
        if self._is_its_term:
            return self.operands[0].key
        return ("sum", *((t.key, weight_key(w)) for t, w in zip(self.operands, self.weights, strict=True)))

    @property
    def is_sum(self) -> bool:  # type: ignore[override]
        return all(term.is_sum for term in self.operands)

    def combine(self, energies: LeafEnergies, coefficients: Tensor) -> Tensor:
        own, blocks = self.split(coefficients)
        return (own * self._child_energies(energies, blocks)).sum(-1)

    def terms(self, x: Tensor, *, noise_level: Tensor | None = None) -> dict[str, Tensor]:
        pairs = zip(self.operands, self.weights, strict=True)
        return _labelled((_product(w, t), weight_on(w, x) * t(x, noise_level=noise_level)) for t, w in pairs)

    def _own(self) -> tuple[Weight, ...]:
        return self.weights

    def _notes(self) -> list[str]:
        return [f"{format_weight(w)} *" for w in self.weights]

    @property
    def _is_its_term(self) -> bool:
        """Whether there is one term, with coefficient 1."""
        return len(self.weights) == 1 and not isinstance(self.weights[0], Tensor) and self.weights[0] == 1

    def __str__(self) -> str:
        if self._is_its_term:
            return str(self.operands[0])
        if len(self.weights) > 1 and any(not isinstance(w, Tensor) and w == 0 for w in self.weights):
            # Operators would drop these terms.
            weights = ", ".join(map(format_weight, self.weights))
            return f"sum([{', '.join(map(str, self.operands))}], weights=[{weights}])"
        text = ""
        for term, weight in zip(self.operands, self.weights, strict=True):
            negative = not isinstance(weight, Tensor) and weight < 0
            joint = (" - " if negative else " + ") if text else ("-" if negative else "")
            text += joint + _product(-weight if negative else weight, term)
        return text


class Mixture(Node):
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
        own, blocks = self.split(coefficients)
        return soft_minimum(self._child_energies(energies, blocks) - own)

    @property
    def proportions(self) -> tuple[float, ...] | None:
        """Shares of the components, which the weights are once log Zᵢ are known; None before."""
        return tuple(w / sum(self.weights) for w in self.weights) if any(self.log_z) else None

    def responsibilities(self, energies: LeafEnergies, coefficients: Tensor) -> Tensor:
        """How likely each state is of each component, (batch, components), from energies of leaves."""
        own, blocks = self.split(coefficients)
        return torch.softmax(own - self._child_energies(energies, blocks), dim=1)

    def marginal(self) -> Energy | None:
        """The marginal that all components share: a | b are then two values of one attribute."""
        marginals = [component.marginal() for component in self.operands]
        keys = {None if m is None else m.key for m in marginals}
        return marginals[0] if len(keys) == 1 and self._plain else None

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


class Not(Node):
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
        own, (block,) = self.split(coefficients)
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
            return f"~{operand}" if not isinstance(operand, Node) else f"~({operand})"
        return f"negate({operand}, threshold={format_weight(self.threshold)})"


def flatten(pairs: Iterable[tuple[Energy, Weight]]) -> list[tuple[Energy, Weight]]:
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


def shared(attribute: str, noun: str, energies: Sequence[Energy]):
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


def shared_codec(energies: Sequence[Energy]) -> Codec | None:
    """The codec whose latents all energies are about; None where states are what they are.

    An energy without a codec may join those of latents if it takes states of any shape, or of theirs.

    Raises:
        ValueError: If some are about latents, and others about those of another codec, or about pictures.
    """
    first = next((energy for energy in energies if energy.codec is not None), None)
    if first is None or first.codec is None:
        return None
    for energy in energies:
        if energy.codec is None:
            if energy.event_shape in (None, first.codec.event_shape):
                continue
            what = f"states of shape {energy.event_shape}"
        elif energy.codec.key != first.codec.key:
            what = f"those of another, {_codec_name(energy.codec)}"
        else:
            continue
        raise ValueError(
            f"energies compose only in one image space: {first} is about the latents of "
            f"{_codec_name(first.codec)}, shape {first.codec.event_shape}, and {energy} about {what}. "
            "Experts of one family share their codec."
        )
    return first.codec


def _codec_name(codec: Codec) -> str:
    return f"the codec {codec.digest[:12]}" if codec.digest else f"a {type(codec).__name__}"


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
