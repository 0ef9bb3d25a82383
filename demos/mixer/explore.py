"""Looking around a recipe: all pictures between two ranges of weights, and each expert by itself.

Everything here starts from the same noise and is shaken by the same noise, so that what differs
between two pictures is what was asked for, and not chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from composable_ebm import Energy, Frame, Run, parse

from .factors import alone, find, with_weights
from .labelled import labelled_grid
from .live import Submit
from .state import MAX_WEIGHT

MAX_VALUES = 12  # along an axis
MAX_CHAINS = 256
FRAMES_PER_SECOND = 5

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
    submit: Submit,
    *,
    num_chains_per_cell: int = 1,
    num_steps: int | None = None,
    seed: int = 0,
) -> Iterator[GridFrame]:
    """Samples at all pairs of two weights, as one labelled picture that fills while one looks on.

    Each cell is a run from the same noise, so that it shows what `sample` gives for its recipe; they
    run as one batch, and share the time of one run.

    Args:
        recipe: A recipe that names both experts.
        horizontal: Weights from left to right.
        vertical: Weights from the bottom up.
        library: What names mean, as in `parse`.
        submit: Begins the runs. When they are cancelled, the last frame shows what was reached.
        num_chains_per_cell: Pictures in each cell.
        num_steps: Steps of the sampler; what the experts were calibrated with unless given.
        seed: Seeds the noise.
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
    recipes = [with_weights(recipe, dict(zip(factors, cell, strict=True))) for cell in cells]
    energies = [parse(text, library) for text in recipes]
    names = [factor.label for factor in factors]
    axes = (horizontal.values, vertical.values)

    def drawn(frames: Sequence[Frame], done: bool) -> GridFrame:
        states = torch.cat([frame.denoised for frame in frames])
        lost = torch.cat([~frame.alive for frame in frames])
        picture = labelled_grid(states, lost, energies[0].data_range, names, axes)
        return GridFrame(picture, done, frames[0].step)

    with _together(submit, energies, num_chains_per_cell, num_steps, seed) as runs:
        for _ in runs[0].frames():
            frames = [run.frame for run in runs if run.frame is not None]
            if len(frames) == len(runs):
                yield drawn(frames, done=False)
        for run in runs:
            run.result()
        yield drawn([run.frame for run in runs if run.frame is not None], done=True)


def strip(
    recipe: str,
    library: Mapping[str, Energy],
    submit: Submit,
    seed: int = 0,
    num_steps: int | None = None,
) -> Strip:
    """The mix and each of its experts alone, from the same noise, beside p(x) where the recipe has it.

    Args:
        recipe: A recipe.
        library: What names mean, as in `parse`.
        submit: Begins the runs. When they are cancelled, the strip shows what was reached.
        seed: Seeds the noise of each.
        num_steps: Steps of the sampler; what the experts were calibrated with unless given.
    Raises:
        ValueError: If the recipe cannot be read or sampled.
    """
    parse(recipe, library)
    wanted = [("mix", recipe), *alone(recipe, library)]
    energies = [parse(text, library) for _, text in wanted]
    with _together(submit, energies, 1, num_steps, seed) as runs:
        samples = torch.cat([run.result().samples for run in runs])
    return Strip([label for label, _ in wanted], samples, [text for _, text in wanted])


@contextmanager
def _together(
    submit: Submit, energies: Sequence[Energy], num_chains: int, num_steps: int | None, seed: int
) -> Iterator[list[Run]]:
    """A run of each energy, all from the same noise, that share the time of one run."""
    runs: list[Run] = []
    try:
        for energy in energies:
            run = submit(
                energy,
                num_chains,
                "calibrated" if num_steps is None else num_steps,
                seed,
                frames_per_second=FRAMES_PER_SECOND,
                share=1 / len(energies),
                on_divergence="report",
            )
            run.frames()  # somebody looks on
            runs.append(run)
        yield runs
    finally:
        for run in runs:
            run.cancel()
