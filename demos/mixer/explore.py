"""Looking around a recipe: all pictures between two ranges of weights, and each expert by itself.

Everything here starts from the same noise and is shaken by the same noise, so that what differs
between two pictures is what was asked for, and not chance.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from composable_ebm import Annealed, Chain, Energy, parse, sample
from composable_ebm.sampling.kernel import Dynamics, Noise
from composable_ebm.sampling.sample import calibrated_sampler, check_positive_term, initial_states

from .factors import Factor, alone, find, with_weights
from .labelled import labelled_grid
from .state import MAX_WEIGHT
from .stream import denoised

MAX_VALUES = 12  # along an axis
MAX_CHAINS = 256
_SECONDS_PER_FRAME = 0.2

__all__ = ["Axis", "GridFrame", "Strip", "strip", "weight_grid"]


@dataclass(frozen=True)
class Axis:
    """A range of weights of one expert.

    Args:
        expert: Its name as in the recipe, `faces/smile`, with its value where the recipe names it
            more than once: `digits/digit[3]`.
        low: First weight.
        high: Last weight.
        count: How many weights, evenly spaced.
    Raises:
        ValueError: If a weight is not finite or too large, or there are too few or too many.
    """

    expert: str
    low: float
    high: float
    count: int = 5

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and abs(value) <= MAX_WEIGHT):
                raise ValueError(
                    f"`{name}` of an axis must be a weight from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, "
                    f"got {value!r}."
                )
        if not (isinstance(self.count, int) and 1 <= self.count <= MAX_VALUES):
            raise ValueError(
                f"`count` of an axis must be a whole number from 1 to {MAX_VALUES}, got {self.count!r}."
            )
        if self.count > 1 and self.low == self.high:
            raise ValueError(f"an axis of {self.count} weights needs a range, got {self.low:g} twice.")

    @property
    def values(self) -> list[float]:
        """The weights, from `low` to `high`."""
        last = max(1, self.count - 1)
        return [self.low + (self.high - self.low) * i / last for i in range(self.count)]


class GridFrame(NamedTuple):
    """A grid while it fills: the labelled picture, whether it is the last, and steps taken."""

    picture: Image.Image
    done: bool
    step: int


class Strip(NamedTuple):
    """A mix beside its experts.

    Attributes:
        labels: What each picture shows, the mix first.
        samples: The pictures, (1 + experts, *event).
        recipes: What each was made of; `sample` makes the same picture of it.
    """

    labels: list[str]
    samples: Tensor
    recipes: list[str]


def weight_grid(
    recipe: str,
    horizontal: Axis,
    vertical: Axis,
    library: Mapping[str, Energy],
    *,
    num_chains_per_cell: int = 1,
    num_steps: int | None = None,
    seed: int = 0,
    stop: threading.Event | None = None,
) -> Iterator[GridFrame]:
    """Samples at all pairs of two weights, as one labelled picture that fills while one looks on.

    All cells run as one batch. Each starts from the same noise and takes steps of the size that was
    calibrated for its weights, so that a cell shows what `sample` gives for its recipe.

    Args:
        recipe: A recipe that names both experts.
        horizontal: Weights from left to right.
        vertical: Weights from the bottom up.
        library: What names mean, as in `parse`.
        num_chains_per_cell: Pictures in each cell.
        num_steps: Steps of the sampler; what the experts were calibrated with unless given.
        seed: Seeds the noise.
        stop: Ends the run at its next step when set; the last frame then shows what was reached.
    Yields:
        A frame now and then, the last of them with `done`.
    Raises:
        ValueError: If an axis names no expert of the recipe or both name one, if it is too large,
            or a cell cannot be sampled.
    """
    factors = tuple(find(recipe, axis.expert) for axis in (horizontal, vertical))
    if factors[0] == factors[1]:
        raise ValueError(f"the axes must name two different experts, got {factors[0].expert} twice.")
    cells = [(across, up) for up in vertical.values[::-1] for across in horizontal.values]
    if not 1 <= num_chains_per_cell * len(cells) <= MAX_CHAINS:
        raise ValueError(
            f"a grid holds 1 to {MAX_CHAINS} pictures, got {len(cells)} cells of {num_chains_per_cell}."
        )
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"`num_steps` of a grid must be at least 1, got {num_steps}.")
    energy, coefficients = _coefficients(recipe, factors, cells, library)
    check_positive_term(energy, coefficients)
    chain, total = _chain(energy, coefficients, num_chains_per_cell, num_steps, seed)
    names = [factor.label for factor in factors]
    axes = (horizontal.values, vertical.values)
    shown = -math.inf
    while True:
        done = chain.num_steps == total or (stop is not None and stop.is_set())
        if done or time.perf_counter() - shown >= _SECONDS_PER_FRAME:
            states = chain.x if chain.num_steps == total else denoised(chain)
            lost = chain.divergence().chains
            picture = labelled_grid(states, lost, energy.data_range, names, axes)
            yield GridFrame(picture, done, chain.num_steps)
            shown = time.perf_counter()
        if done:
            return
        chain.advance(1)


def strip(
    recipe: str,
    library: Mapping[str, Energy],
    seed: int = 0,
    num_steps: int | None = None,
    stop: threading.Event | None = None,
) -> Strip:
    """The mix and each of its experts alone, from the same noise, beside p(x) where the recipe has it.

    Args:
        recipe: A recipe.
        library: What names mean, as in `parse`.
        seed: Seeds the noise of each.
        num_steps: Steps of the sampler; what the experts were calibrated with unless given.
        stop: Ends the run at its next step when set; the strip is then shorter.
    Raises:
        ValueError: If the recipe cannot be read or sampled.
    """
    parse(recipe, library)
    wanted = [("mix", recipe), *alone(recipe, library)]
    samples: list[Tensor] = []
    for _, text in wanted:
        result = sample(
            parse(text, library),
            num_chains=1,
            num_steps=num_steps,
            seed=seed,
            callback=lambda step, chain: stop is not None and stop.is_set(),
            on_divergence="report",
        )
        samples.append(result.samples)
        if stop is not None and stop.is_set():
            break
    made = wanted[: len(samples)]
    return Strip([label for label, _ in made], torch.cat(samples), [text for _, text in made])


def _coefficients(
    recipe: str,
    factors: Sequence[Factor],
    cells: Sequence[tuple[float, float]],
    library: Mapping[str, Energy],
) -> tuple[Energy, Tensor]:
    """The recipe, and its coefficients in each cell, (cells, n).

    A coefficient is a polynomial of the two weights, c = a + b u + d v + e u v: where one expert is
    divided by another, both of their coefficients move. Four recipes tell it.
    """
    probes = [(u, v) for u in (1.25, 2.75) for v in (1.25, 2.75)]
    parsed = [
        parse(with_weights(recipe, dict(zip(factors, probe, strict=True))), library) for probe in probes
    ]
    energy = parsed[0]
    if len({each.num_coefficients for each in parsed}) > 1:
        raise ValueError(f"the weights of {recipe} cannot be moved; write each expert once.")
    parts = torch.linalg.solve(_monomials(probes), torch.stack([each.coefficients for each in parsed]))
    return energy, _monomials(cells) @ parts


def _monomials(pairs: Sequence[tuple[float, float]]) -> Tensor:
    return torch.tensor([[1, u, v, u * v] for u, v in pairs], dtype=torch.float64)


def _chain(
    energy: Energy, coefficients: Tensor, num_chains: int, num_steps: int | None, seed: int
) -> tuple[Chain, int]:
    """Chains of all cells, `num_chains` of each, and how many steps they take."""
    samplers = [calibrated_sampler(energy, row) for row in coefficients]
    sampler, calibrated_steps = samplers[0]
    total = calibrated_steps if num_steps is None else num_steps
    device = next(energy.parameters(), torch.empty(0)).device
    generator = torch.Generator(device).manual_seed(seed)
    x = initial_states(energy, num_chains, None, generator, device)
    if isinstance(sampler, Annealed) and sampler.schedule.noise_level is not None:
        level = sampler.schedule.noise_level(0.0)
        x = level * torch.randn(x.shape, generator=generator, device=device)
    count = len(coefficients)
    chain = Chain(
        energy,
        x.repeat(count, *[1] * (x.ndim - 1)),
        sampler,
        _SharedNoise(generator, num_chains),
        num_steps=total,
        coefficients=coefficients.repeat_interleave(num_chains, 0),
        record=False,
    )
    kernels = [each.kernel if isinstance(each, Annealed) else each for each, _ in samplers]
    dynamics = [kernel.dynamics(x) for kernel in kernels]
    chain.dynamics = Dynamics(
        *(
            None if values[0] is None else torch.stack(values).repeat_interleave(num_chains)
            for values in zip(*dynamics, strict=True)
        )  # type: ignore[arg-type]
    )
    return chain, total


class _SharedNoise(Noise):
    """The same draws for every block of `num_rows` rows."""

    def __init__(self, generator: torch.Generator, num_rows: int) -> None:
        super().__init__((generator, num_rows))
        self.num_rows = num_rows

    def _draw(self, draw: Callable[..., Tensor], event: Sequence[int], like: Tensor) -> Tensor:
        block = super()._draw(draw, event, like)
        return block.repeat(len(like) // self.num_rows, *[1] * (block.ndim - 1))
