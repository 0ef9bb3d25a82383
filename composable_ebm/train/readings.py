"""Figures of iterations, which are read off the device together: the loop's only synchronisation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from composable_ebm.train.objectives.base import Figures

__all__ = ["Readings", "is_healthy"]


class Readings:
    """Figures that nobody has read yet.

    Args:
        accelerator: The processes whose figures they are.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._unread: list[Figures] = []

    def add(self, figures: Figures) -> None:
        """Keeps the figures of one iteration, scalars or a figure's (total, count) each."""
        self._unread.append(figures)

    def clear(self) -> None:
        """Forgets what was not read."""
        self._unread = []

    def read(self) -> dict[str, float]:
        """Means over the iterations since last time, over all ranks; {} where there was none.

        Figures of which nothing was seen are left out.
        """
        if not self._unread:
            return {}
        names = list(self._unread[0])
        table = torch.stack([torch.stack([_counted(figures[n]) for n in names]) for figures in self._unread])
        totals = self.accelerator.reduce(table.sum(dim=0), reduction="sum").tolist()
        self.clear()
        return {n: total / count for n, (total, count) in zip(names, totals, strict=True) if count}


def is_healthy(metrics: Mapping[str, float], largest_gap: float) -> bool:
    """Whether all figures are numbers, and the energy gap less than `largest_gap`, in nats either way."""
    return all(map(math.isfinite, metrics.values())) and abs(metrics.get("energy_gap", 0)) < largest_gap


def _counted(figure: Tensor) -> Tensor:
    """(total, count) of a figure, (2,)."""
    figure = figure.float()
    return figure if figure.ndim else torch.stack([figure, torch.ones_like(figure)])
