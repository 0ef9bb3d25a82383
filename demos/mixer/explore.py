"""Looking around a recipe: all pictures between two ranges of weights, and each expert by itself.

Everything here starts from the same noise and is shaken by the same noise, so that what differs
between two pictures is what was asked for, and not chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from composable_ebm import Energy, Frame, Run

from .labelled import labelled_grid
from .live import Submit
from .terms import alone, parts, reweighted

FRAMES_PER_SECOND = 5

__all__ = ["Axis", "GridFrame", "Strip", "strip", "weight_grid"]


class Axis(NamedTuple):
    """A range of weights of one expert.

    Attributes:
        expert: Its name as in the recipe, with its value: `faces/smile`, `~faces/beard`, `digits/digit[3]`.
        low: First weight.
        high: Last weight.
        count: How many weights, evenly spaced; two at least.
    """

    expert: str
    low: float
    high: float
    count: int

    @property
    def values(self) -> list[float]:
        """The weights, from `low` to `high`."""
        return [self.low + (self.high - self.low) * i / (self.count - 1) for i in range(self.count)]


class GridFrame(NamedTuple):
    """A grid while it fills: the labelled picture, whether it is the last, and steps taken."""

    picture: Image.Image
    done: bool
    step: int


class Strip(NamedTuple):
    """A mix beside its experts.

    Attributes:
        labels: What each picture shows, the mix first.
        images: The pictures in [-1, 1], (1 + experts, channels, height, width).
        energies: What each was made of; `sample` makes the same picture of it.
    """

    labels: list[str]
    images: Tensor
    energies: list[Energy]


def weight_grid(
    energy: Energy,
    horizontal: Axis,
    vertical: Axis,
    submit: Submit,
    *,
    num_steps: int | None = None,
    seed: int = 0,
) -> Iterator[GridFrame]:
    """Samples at all pairs of two weights, as one labelled picture that fills while one looks on.

    Each cell is a run from the same noise, so that it shows what `sample` gives for its recipe; they
    run as one batch, and share the time of one run. Below zero a binary expert is asked for its other
    value.

    Args:
        energy: A composition that has both experts.
        horizontal: Weights from left to right.
        vertical: Weights from the bottom up.
        submit: Begins the runs. When they are cancelled, the last frame shows what was reached.
        num_steps: Steps of the sampler; what the experts were calibrated with unless given.
        seed: Seeds the noise.
    Yields:
        A frame now and then, the last of them with `done`.
    Raises:
        ValueError: If an axis has no range or names no expert of the recipe, both name one, or a cell cannot
            be sampled.
    """
    names = [_found(energy, axis.expert) for axis in (horizontal, vertical)]
    if names[0] == names[1]:
        raise ValueError(f"the axes must name two different experts, got {names[0]} twice.")
    for name, axis in zip(names, (horizontal, vertical), strict=True):
        if axis.low == axis.high:
            raise ValueError(f"the weights of {_label(name)} need a range, got {axis.low:g} twice.")
    cells = [(across, up) for up in vertical.values[::-1] for across in horizontal.values]
    energies = [reweighted(energy, dict(zip(names, cell, strict=True))) for cell in cells]
    labels = [_label(name) for name in names]
    axes = (horizontal.values, vertical.values)

    def drawn(images: Sequence[Tensor], frames: Sequence[Frame], done: bool) -> GridFrame:
        lost = torch.cat([~frame.alive for frame in frames])
        picture = labelled_grid(torch.cat([*images]), lost, labels, axes)
        return GridFrame(picture, done, frames[0].step)

    with _together(submit, energies, num_steps, seed) as runs:
        for _ in runs[0].frames():
            frames = [run.frame for run in runs if run.frame is not None]
            if len(frames) == len(runs):
                yield drawn([frame.images for frame in frames], frames, done=False)
        images = [run.result().images for run in runs]
        yield drawn(images, [run.frame for run in runs if run.frame is not None], done=True)


def _found(energy: Energy, expert: str) -> str:
    """The name of the one part that an axis names.

    Raises:
        ValueError: If there is none, or more than one.
    """
    names = [part.name for part in parts(energy)]
    if names.count(expert) == 1:
        return expert
    known = ", ".join(dict.fromkeys(names)) or "none"
    if expert not in names:
        raise ValueError(f"the recipe does not name the expert {expert!r}; it names: {known}.")
    raise ValueError(f"the recipe names {expert} {names.count(expert)} times; each weight needs one place.")


def _label(name: str) -> str:
    """What to call a part in a picture: without its family."""
    negated, text = name.startswith("~"), name.rpartition("/")[2]
    return ("not " if negated else "") + text.replace("[", " ").rstrip("]").replace("_", " ")


def strip(
    energy: Energy,
    is_base: Callable[[Energy], bool],
    submit: Submit,
    seed: int = 0,
    num_steps: int | None = None,
) -> Strip:
    """The mix and each of its experts alone, from the same noise, beside p(x) where the recipe has it.

    Args:
        energy: A composition.
        is_base: Whether an energy is the p(x) that all share.
        submit: Begins the runs. When they are cancelled, the strip shows what was reached.
        seed: Seeds the noise of each.
        num_steps: Steps of the sampler; what the experts were calibrated with unless given.
    Raises:
        ValueError: If the recipe cannot be sampled.
    """
    wanted = [("mix", energy), *((_label(name), each) for name, each in alone(energy, is_base))]
    energies = [each for _, each in wanted]
    with _together(submit, energies, num_steps, seed) as runs:
        images = torch.cat([run.result().images for run in runs])
    return Strip([label for label, _ in wanted], images, energies)


@contextmanager
def _together(
    submit: Submit, energies: Sequence[Energy], num_steps: int | None, seed: int
) -> Iterator[list[Run]]:
    """A run of each energy, all from the same noise, that share the time of one run."""
    runs: list[Run] = []
    try:
        for energy in energies:
            run = submit(
                energy,
                1,
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
