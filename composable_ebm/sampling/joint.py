"""Several compositions in one batch, each on rows of its own.

    E(x)[row] = Σₜ w[row, t] Eₜ(x[row]),     t over the terms of all compositions

Terms that differ only in the coefficients inside them, as an OR of other weights does, are one term,
whose coefficients differ from row to row.

A row is evaluated only by networks that its own composition names: what it does not ask for costs
nothing, and cannot reach it, not even as 0 · ∞. On a CUDA device all rows go through all networks,
so that those of one architecture are one batched pass; there a term with weight 0 adds exactly 0 as
long as it is finite.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from composable_ebm.energy import Energy, Mixture, Not, Sum
from composable_ebm.energy.weights import Weight, coefficient_type, stack_weights
from composable_ebm.potential.plan import FusedPotential
from composable_ebm.sampling import graphs
from composable_ebm.sampling.block import Block, Rows, joined
from composable_ebm.sampling.chains import Batch

MAX_SUBSETS = 64
"""Sets of blocks whose potential a batch keeps, between changes of its blocks."""

__all__ = ["JointBatch", "JointPotential", "PotentialPool", "Saved", "as_one_batch"]


def as_one_batch(expressions: Sequence[Energy]) -> tuple[Sum, Tensor]:
    """Several compositions as one: a sum over all their terms, and a row of coefficients for each.

    Args:
        expressions: Compositions of one image space, whose weights are numbers.
    Returns:
        The sum, and coefficients (expressions, n) that make row i equal expression i.
    Raises:
        ValueError: If the weights of an expression differ from chain to chain.
    """
    for expression in expressions:
        if expression.coefficients.ndim > 1:
            raise ValueError(
                f"the weights of {expression} differ from chain to chain; here an expression is one row."
            )
    parts = [terms_of(expression) for expression in expressions]
    whole = Sum(list({key: term for each in parts for key, (term, _) in each.items()}.values()))
    terms = {term.key: term for term in whole.operands}
    return whole, coefficient_rows(terms, parts, [1] * len(expressions))


def terms_of(energy: Energy) -> dict[Hashable, tuple[Energy, Weight]]:
    """The terms of a composition and their weights, by key."""
    if isinstance(energy, Sum):
        return {term.key: (term, w) for term, w in zip(energy.operands, energy.weights, strict=True)}
    return {energy.key: (energy, 1.0)}


class Kind(NamedTuple):
    """What terms of several compositions are known by, whatever the coefficients inside them.

    Attributes:
        structure: See `structure_of`.
        repeat: How many terms of this structure come before it in its composition.
    """

    structure: Hashable
    repeat: int


def kinds_of(energy: Energy) -> dict[Kind, tuple[Energy, Weight]]:
    """The terms of a composition and their weights, by kind."""
    found: dict[Kind, tuple[Energy, Weight]] = {}
    seen: Counter[Hashable] = Counter()
    for term, weight in terms_of(energy).values():
        structure = structure_of(term)
        found[Kind(structure, seen[structure])] = term, weight
        seen[structure] += 1
    return found


def structure_of(energy: Energy) -> Hashable:
    """Equal for energies that are equal under equal coefficients."""
    if isinstance(energy, (Sum, Mixture, Not)):
        return type(energy), *map(structure_of, energy.operands)
    return energy.key


def coefficient_rows(
    terms: Mapping[Any, Energy],
    expressions: Sequence[Mapping[Any, tuple[Energy, Weight]]],
    sizes: Sequence[int],
) -> Tensor:
    """Coefficients of the sum of `terms` under which each block of rows has its own expression.

    Terms of an expression that are not among `terms` are left out.

    Args:
        terms: The terms of the sum, by key.
        expressions: The terms of one for each block and their weights, by the same keys.
        sizes: Rows of each block.
    Returns:
        float64, (Σ sizes, n).
    """
    blocks = []
    for own, size in zip(expressions, sizes, strict=True):
        found = {key: own.get(key, (term, 0.0)) for key, term in terms.items()}
        outer = stack_weights([weight for _, weight in found.values()])
        inner = [term.coefficients for term, _ in found.values() if term.num_coefficients]
        blocks.append(torch.cat([part.cpu().expand(size, -1) for part in (outer, *inner)], dim=1))
    return torch.cat(blocks)


class PotentialPool:
    """Potentials of sums of terms, made once: moving a weight or joining a batch makes none.

    Args:
        capacity: How many are kept; those not used for longest are dropped.
    """

    def __init__(self, capacity: int = 32) -> None:
        self.capacity = capacity
        self.made = 0
        self._potentials: OrderedDict[Hashable, FusedPotential] = OrderedDict()

    def get(self, terms: Mapping[Any, Energy], stack: bool) -> FusedPotential:
        """The potential of Σ terms, given by key, whose coefficients and noise level the caller sets."""
        key = (stack, *terms)
        if key not in self._potentials:
            self._potentials[key] = FusedPotential(Sum(list(terms.values())), stack=stack)
            self.made += 1
            if len(self._potentials) > self.capacity:
                self._potentials.popitem(last=False)
        self._potentials.move_to_end(key)
        return self._potentials[key]

    def of(self, energy: Energy, like: Tensor) -> FusedPotential:
        """The potential of one composition, with its coefficients, for states such as `like`."""
        own = kinds_of(energy)
        terms = {kind: term for kind, (term, _) in own.items()}
        potential = copy(self.get(terms, stack=like.device.type != "cpu"))
        potential.composition = Sum(list(terms.values()))  # with the coefficients inside terms, too
        rows = coefficient_rows(terms, [own], [len(like)])
        potential.coefficients = rows.to(device=like.device, dtype=coefficient_type(like))
        return potential


class _Share(NamedTuple):
    """Terms that the same rows ask for."""

    potential: FusedPotential
    coefficients: Tensor
    rows: slice | Tensor | None
    readers: tuple[int, ...]


class JointPotential:
    """x -> (E(x), ∂E/∂x), each block of rows by its own composition, at its own noise level.

    A `Potential`.

    Args:
        blocks: In the order of their rows.
        like: A state, for device and dtype.
        pool: Where potentials are kept.
    """

    def __init__(self, blocks: Sequence[Block], like: Tensor, pool: PotentialPool) -> None:
        self.blocks = list(blocks)
        self.sizes = [block.size for block in blocks]
        stack = like.device.type != "cpu"
        expressions = [kinds_of(block.energy) for block in blocks]
        self._shares = [
            _Share(
                pool.get(terms, stack),
                coefficient_rows(
                    terms, [expressions[i] for i in readers], [self.sizes[i] for i in readers]
                ).to(device=like.device, dtype=coefficient_type(like)),
                self._rows(readers, like.device),
                readers,
            )
            for terms, readers in _shared_out(expressions, stack)
        ]
        self.mask = self._masks(like)
        self._like = like[:0]
        self._given_level: tuple[Tensor | None] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.count(1)
        level = self._noise_level()
        gradient = torch.zeros_like(x)
        energy: Tensor | None = None
        for potential, coefficients, rows, _ in self._shares:
            own = level if rows is None or level is None or not level.ndim else level[rows]
            potential.coefficients, potential.noise_level = coefficients, own
            potential.may_be_constant = len(self._shares) > 1
            part, part_gradient = potential(x if rows is None else x[rows])
            energy = part.new_zeros(len(x)) if energy is None else energy
            for total, addend in ((energy, part), (gradient, part_gradient)):
                if isinstance(rows, Tensor):
                    total.index_add_(0, rows, addend)
                else:
                    total[slice(None) if rows is None else rows] += addend
        assert energy is not None
        return energy, gradient if self.mask is None else gradient * self.mask

    # -- for steps that are captured, see `graphs` -------------------------------------------------

    @cached_property
    def structure(self) -> Hashable:
        """Equal for batches of blocks whose rows ask for the same terms."""
        shares = [(share.potential.structure, share.readers) for share in self._shares]
        return "joint", tuple(self.sizes), tuple(shares)

    @property
    def copies_weights(self) -> bool:
        """Whether it works on copies of weights."""
        return any(share.potential.copies_weights for share in self._shares)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Noise level, mask, and the coefficients of each set of terms."""
        return self._noise_level(), self.mask, *(share.coefficients for share in self._shares)

    def reading(self, tensors: Sequence[Tensor | None]) -> Self:
        """The same potential for no blocks in particular, reading `tensors` instead of its own."""
        level, mask, *coefficients = tensors
        other = copy(self)
        other.blocks, other.mask, other._given_level = [], mask, (level,)
        other._shares = [
            share._replace(coefficients=own)  # type: ignore[arg-type]
            for share, own in zip(self._shares, coefficients, strict=True)
        ]
        return other

    def count(self, gradients: int) -> None:
        """Counts gradients of the rows of its blocks."""
        for block in self.blocks:
            block.evaluations += gradients

    @cached_property
    def composition(self) -> Sum:
        """The sum over all terms of all blocks."""
        return self._whole[0]

    @cached_property
    def coefficients(self) -> Tensor:
        """Coefficients of the sum that give each row its own composition, (batch, n)."""
        return self._whole[1]

    @cached_property
    def _whole(self) -> tuple[Sum, Tensor]:
        whole, rows = as_one_batch([block.energy for block in self.blocks])
        rows = rows.repeat_interleave(torch.tensor(self.sizes), dim=0)
        return whole, rows.to(device=self._like.device, dtype=coefficient_type(self._like))

    def _noise_level(self) -> Tensor | None:
        """() where all blocks are at one noise level, which networks are faster at, else (batch,)."""
        if self._given_level is not None:
            return self._given_level[0]
        levels = [block.noise_level for block in self.blocks]
        apart = any(level is not None and level.ndim for level in levels)
        if len({block.sigma for block in self.blocks}) == 1 and (len(levels) == 1 or not apart):
            return levels[0]
        return joined(levels, self.sizes)

    def _rows(self, readers: Sequence[int], device: torch.device) -> slice | Tensor | None:
        """The rows of some blocks: None for all, a slice where they lie together, else their indices."""
        if len(readers) == len(self.blocks):
            return None
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        if readers[-1] - readers[0] + 1 == len(readers):
            return slice(ends[readers[0]] - self.sizes[readers[0]], ends[readers[-1]])
        index = torch.cat([torch.arange(ends[i] - self.sizes[i], ends[i]) for i in readers])
        return index.to(device)

    def _masks(self, like: Tensor) -> Tensor | None:
        if all(block.mask is None for block in self.blocks):
            return None
        event = like.shape[1:]
        masks = [
            like.new_ones((block.size, *event))
            if block.mask is None
            else block.mask.expand(block.size, *event)
            for block in self.blocks
        ]
        return torch.cat(masks)


class Saved(NamedTuple):
    """A batch between two steps: what to go back to if the next one fails."""

    rows: Rows
    clock: int
    blocks: list[tuple]
    generators: list[tuple[torch.Generator, Tensor]]


class JointBatch(Batch):
    """A batch whose blocks have compositions of their own.

    Args:
        kind: What its blocks have alike.
        like: A state, for shape, device and dtype.
        pool: Where potentials are kept.
        clock: Steps that it has taken.
    Attributes:
        charged: Time that each of its runs has been charged for, in seconds.
        due: When it may take its next step, by `time.perf_counter`.
    """

    def __init__(self, kind: Hashable, like: Tensor, pool: PotentialPool, clock: int = 0) -> None:
        super().__init__(graphs.shared(like.device))
        self.kind = kind
        self.like = like
        self.clock = clock
        self.charged = 0.0
        self.due = 0.0
        self._pool = pool
        self._potentials: dict[tuple[Block, ...], JointPotential] = {}

    def potential_of(self, blocks: Sequence[Block]) -> JointPotential:
        key = tuple(blocks)
        if key not in self._potentials:
            if len(self._potentials) >= MAX_SUBSETS:
                self._potentials.clear()
            self._potentials[key] = JointPotential(blocks, self.like, self._pool)
        return self._potentials[key]

    def carrier_of(self, block: Block) -> FusedPotential:
        assert block.carrier is not None
        potential = self._pool.of(block.carrier, self.like)
        potential.mask = block.mask
        return potential

    def push(self, block: Block, momentum: Tensor) -> None:
        """Gives the chains of a block their momentum, (rows, *event)."""
        parts, place = self.rows.split(self.sizes), self.blocks.index(block)
        parts[place] = parts[place]._replace(state=parts[place].state._replace(momentum=momentum))
        self.rows = Rows.cat(parts)

    def saved(self) -> Saved:
        """What `restore` goes back to; noise included."""
        return Saved(
            self.rows,
            self.clock,
            [block.snapshot() for block in self.blocks],
            [(g, g.get_state()) for block in self.blocks for g, _ in block.noise.sources],
        )

    def restore(self, saved: Saved) -> None:
        """Undoes the steps since `saved`."""
        self.rows, self.clock = saved.rows, saved.clock
        for block, snapshot in zip(self.blocks, saved.blocks, strict=True):
            block.restore(snapshot)
        for generator, state in saved.generators:
            generator.set_state(state)

    def _regroup(self, blocks: list[Block]) -> None:
        super()._regroup(blocks)
        self._potentials.clear()


def _shared_out(
    expressions: Sequence[Mapping[Kind, tuple[Energy, Weight]]], stack: bool
) -> list[tuple[dict[Kind, Energy], tuple[int, ...]]]:
    """The terms of all expressions, those that the same expressions need together, and who needs them.

    Terms that read one network go together, so that it is evaluated once; those of one structure do
    not, since a sum would merge them if their coefficients were equal too.
    """
    terms: dict[Kind, Energy] = {}
    readers: dict[Hashable, set[int]] = {}  # of each source
    for i, expression in enumerate(expressions):
        for kind, (term, _) in expression.items():
            terms.setdefault(kind, term)
            readers.setdefault(_source(term, stack), set()).add(i)
    shares: dict[Hashable, tuple[dict[Kind, Energy], tuple[int, ...]]] = {}
    for kind, term in terms.items():
        who = tuple(sorted(readers[_source(term, stack)]))
        shares.setdefault((who, kind.repeat), ({}, who))[0][kind] = term
    return list(shares.values())


def _source(term: Energy, stack: bool) -> Hashable:
    """What is evaluated to know a term: its network, where it has just one, or else the term itself."""
    bodies = {id(body) if (body := leaf.body()) is not None else None for leaf in term.leaves()}
    if None in bodies or (len(bodies) > 1 and not stack):
        return structure_of(term)
    return "networks" if stack else bodies.pop()
