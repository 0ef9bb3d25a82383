"""Anything as an energy: functions and classifiers. Scores and denoisers are in `diffusion`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy

__all__ = ["from_callable", "from_classifier"]


class _Callable(Energy):
    def __init__(
        self,
        function: Callable[..., Tensor],
        event_shape: tuple[int, ...] | None,
        data_range: tuple[float, float] | None,
        noise_conditioned: bool,
        name: str,
    ) -> None:
        super().__init__()
        self.function = function
        self.event_shape = None if event_shape is None else tuple(event_shape)
        self.data_range = data_range
        self.noise_conditioned = noise_conditioned
        self.name = name

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.function(x, noise_level) if self.noise_conditioned else self.function(x)

    def body(self) -> nn.Module | None:
        return self.function if isinstance(self.function, nn.Module) and not self.noise_conditioned else None

    @property
    def column(self) -> EllipsisType:
        return ...

    def read(self, outputs: Tensor) -> Tensor:
        return outputs


def from_callable(
    function: Callable[..., Tensor],
    *,
    name: str | None = None,
    event_shape: Sequence[int] | None = None,
    data_range: tuple[float, float] | None = None,
    noise_conditioned: bool = False,
) -> Energy:
    """Any function (batch, *event) -> (batch,) as an energy.

    Args:
        function: Differentiable by autograd, low where states are likely. If it is a module, its
            parameters belong to the energy.
        name: What recipes print; the function's own name unless given.
        event_shape: Shape of one state; None accepts any.
        data_range: Smallest and largest value of the data; None if unbounded.
        noise_conditioned: Calls `function(x, noise_level)`; the level is None outside annealing.
    Example:
        >>> bright = from_callable(lambda x: -x.mean(dim=(1, 2, 3)), name="bright")
        >>> mix = digit[3] + 5 * bright
    """
    if not callable(function):
        raise TypeError(f"`function` must be callable, got {type(function).__name__}.")
    fallback = getattr(function, "__name__", type(function).__name__)
    shape = None if event_shape is None else tuple(event_shape)
    label = name or ("function" if fallback == "<lambda>" else fallback)
    return _Callable(function, shape, data_range, noise_conditioned, label)


class _Classifier(Energy):
    def __init__(self, model: nn.Module, label: int, noise_conditioned: bool, name: str) -> None:
        super().__init__()
        self.model = model
        self.noise_conditioned = noise_conditioned
        self.label = label
        self.name = name

    @property
    def key(self) -> tuple:
        return ("classifier", id(self.model), self.label)

    def body(self) -> nn.Module:
        return self.model

    def read(self, outputs: Tensor) -> Tensor:
        if outputs.ndim != 2 or not -outputs.shape[1] <= self.label < outputs.shape[1]:
            raise ValueError(
                f"a classifier must return logits (batch, labels) with more than {self.label} labels, "
                f"got {tuple(outputs.shape)}."
            )
        return -torch.log_softmax(outputs.float(), dim=1)[:, self.label]

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.read(self.model(x, noise_level) if self.noise_conditioned else self.model(x))


def from_classifier(
    model: nn.Module,
    label: int,
    *,
    name: str | None = None,
    event_shape: Sequence[int] | None = None,
    data_range: tuple[float, float] | None = None,
    noise_conditioned: bool = False,
) -> Energy:
    """E(x) = -log p(label | x), the likelihood of an attribute as an energy.

    Added to an expert of p(x) it gives p(x | label) by Bayes' rule; several labels of one model
    share one forward pass. By itself it is no density: it says nothing about what images look like.

    Beside noise-conditioned experts it should know noisy states, p(label | x, σ): one that was
    trained on clean states only pushes noise in directions that mean nothing (Dhariwal and Nichol
    2021, arXiv 2105.05233, section 4).

    Args:
        model: Logits (batch, labels) from states.
        label: Index of the label asked for.
        name: What recipes print; "classifier[label]" unless given.
        event_shape: Shape of one state; None accepts any.
        data_range: Smallest and largest value of the data; None if unbounded.
        noise_conditioned: Calls `model(x, noise_level)`; the level is None outside annealing.
    """
    energy = _Classifier(model, int(label), noise_conditioned, name or f"classifier[{label}]")
    energy.event_shape = None if event_shape is None else tuple(event_shape)
    energy.data_range = data_range
    return energy
