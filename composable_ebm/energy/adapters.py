"""Anything as an energy: functions and classifiers. Scores and denoisers are in `diffusion`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from composable_ebm.energy import Energy, as_name
from composable_ebm.energy.closures import Function, as_module
from composable_ebm.energy.shown import Normalisation, shown_to
from composable_ebm.energy.space import Codec
from composable_ebm.energy.weights import coefficient_type

__all__ = ["from_callable", "from_classifier", "name_of"]


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
        self.function = as_module(function)
        self.event_shape = None if event_shape is None else tuple(event_shape)
        self.data_range = data_range
        self.noise_conditioned = noise_conditioned
        self.name = name

    def energy(self, x: Tensor, noise_level: Tensor | None = None) -> Tensor:
        return self.function(x, noise_level) if self.noise_conditioned else self.function(x)

    def body(self) -> nn.Module | None:
        return None if isinstance(self.function, Function) or self.noise_conditioned else self.function

    is_sum = True

    def read(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs


def from_callable(
    function: Callable[..., Tensor],
    *,
    name: str | None = None,
    event_shape: Sequence[int] | None = None,
    data_range: tuple[float, float] | None = None,
    noise_conditioned: bool = False,
) -> Energy:
    """Any function (batch, *event) -> (batch,) or (batch, 1) as an energy.

    Chains start in the floating type and on the device of its parameters.

    Args:
        function: Differentiable by autograd, low where states are likely: a module, compiled, scripted,
            traced or wrapped as it may be, or any callable. Its parameters belong to the energy; those of
            a function are those of the modules it refers to, see `closures`.
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
    shape = None if event_shape is None else tuple(event_shape)
    return _Callable(function, shape, data_range, noise_conditioned, name_of(function, name))


def name_of(function: Callable[..., Any], name: str | None = None) -> str:
    """What recipes call an energy made of `function`: its own name, as a name that recipes can read.

    Raises:
        ValueError: If a name is given that recipes cannot read.
    """
    if name is not None:
        return as_name(name)
    own = getattr(function, "__name__", type(function).__name__)
    readable = re.sub(r"[^A-Za-z0-9_]+", "_", own).lstrip("_0123456789")
    return "function" if own == "<lambda>" or not readable else readable


class _Classifier(Energy):
    likelihood = True

    def __init__(self, model: nn.Module, label: int, noise_conditioned: bool, name: str) -> None:
        super().__init__()
        self.model = as_module(model)
        self.noise_conditioned = noise_conditioned
        self.label = label
        self.name = name

    @property
    def key(self) -> tuple:
        return ("classifier", id(self.model), self.label)

    def body(self) -> nn.Module:
        return self.model

    def read(self, outputs: Tensor) -> Tensor:
        if outputs.ndim == 1 or outputs.shape[1:] == (1,):
            logit = outputs.reshape(-1).to(coefficient_type(outputs))
            outputs = torch.stack([torch.zeros_like(logit), logit], dim=1)  # σ(z) is the softmax of (0, z)
        if outputs.ndim != 2 or not -outputs.shape[1] <= self.label < outputs.shape[1]:
            raise ValueError(
                f"a classifier must return logits (batch, labels) with more than {self.label} labels, "
                f"got {tuple(outputs.shape)}."
            )
        return -torch.log_softmax(outputs.to(coefficient_type(outputs)), dim=1)[:, self.label]

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
    normalise: Any = None,
    codec: Codec | None = None,
) -> Energy:
    """E(x) = -log p(label | x), the likelihood of an attribute as an energy.

    Added to an expert of p(x) it gives p(x | label) by Bayes' rule; several labels of one model
    share one forward pass. By itself it is no density: it says nothing about what images look like.

    Beside noise-conditioned experts it should know noisy states, p(label | x, σ): one that was
    trained on clean states only pushes noise in directions that mean nothing (Dhariwal and Nichol
    2021, arXiv 2105.05233, section 4).

    Args:
        model: Logits (batch, labels) from states. A single logit, (batch,) or (batch, 1), is that of
            label 1 against label 0.
        label: Index of the label asked for.
        name: What recipes print; "classifier[label]" unless given.
        event_shape: Shape of one state; None accepts any.
        data_range: Smallest and largest value of the data; None if unbounded.
        noise_conditioned: Calls `model(x, noise_level)`; the level is None outside annealing.
        normalise: How a pretrained model wants its pictures, see `Normalisation.of`: `weights.transforms()`
            of torchvision, a model of timm, (mean, std). States are shown as they are unless given.
        codec: Where states are latents, what decodes them for the model.
    Example:
        >>> weights = torchvision.models.ResNet18_Weights.DEFAULT
        >>> net = torchvision.models.resnet18(weights=weights)
        >>> castle = from_classifier(net, 483, normalise=weights.transforms(), data_range=(-1, 1))
    """
    label = operator.index(label)
    own = f"classifier[{label}]" if label >= 0 else f"classifier_minus_{-label}"
    if normalise is not None or codec is not None:
        how = Normalisation((0.5,), (0.5,)) if normalise is None else Normalisation.of(normalise)
        model = shown_to(model, how, data_range, codec)
    energy = _Classifier(model, label, noise_conditioned, as_name(name or own))
    energy.event_shape = None if event_shape is None else tuple(event_shape)
    energy.data_range = data_range
    return energy if codec is None else energy.in_space(codec)
