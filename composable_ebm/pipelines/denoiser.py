"""A network that denoises states, given what they are to be of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from composable_ebm.energy import Codec

Condition = Mapping[str, Tensor]
"""What a network is told besides states and times: tensors of one row each."""

RECENT = 64
"""Prompts whose conditions are kept though nobody holds them, as of a page that asks for them again."""

__all__ = ["RECENT", "Condition", "PromptedDenoiser"]


class _Told(dict[str, Tensor]):
    """A condition, which lives as long as whoever holds it."""


class PromptedDenoiser(nn.Module, ABC):
    """D(x, σ, what): the best guess of the clean data, given what it shows.

    Subclass it for a network of your own; `diffusers`' pipelines have theirs in `kinds`.

    Attributes:
        event_shape: Shape of one state.
        data_range: Smallest and largest value of the data, None for latents.
        noise_range: Smallest and largest σ that it was trained for.
        weight: That prompts are taken with unless told otherwise, the guidance scale.
        num_steps: Noise levels of a run unless told otherwise.
        codec: What makes pictures of states, or None.
        rows_at_once: Rows of one pass, chains times prompts; None for all of them.
        may_be_captured: Whether steps may be captured and replayed, see `sampling.graphs`: not of networks
            whose weights are brought to the device when needed, or that decide in Python what to do.
    """

    event_shape: tuple[int, ...]
    noise_range: tuple[float, float]
    data_range: tuple[float, float] | None = None
    weight: float = 1.0
    num_steps: int = 50
    codec: Codec | None = None
    rows_at_once: int | None = None
    may_be_captured: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._conditions: WeakValueDictionary[Hashable, _Told] = WeakValueDictionary()
        self._recent: OrderedDict[Hashable, _Told] = OrderedDict()

    @abstractmethod
    def encode(self, what: Hashable) -> Condition:
        """The condition of a prompt, or of nothing in particular for None. Called once a prompt in use."""

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """D, (rows, *event), of states (rows, *event) at σ (rows,), each with its row of the condition."""

    def levels(self, num_steps: int) -> list[float]:
        """The noise levels of a run, falling."""
        low, high = self.noise_range
        t = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        return ((high ** (1 / 7) + t * (low ** (1 / 7) - high ** (1 / 7))) ** 7).tolist()

    def recognised(self, what: object) -> Hashable:
        """A prompt in the form that it is known by.

        Raises:
            KeyError: If it can make nothing of it.
        """
        if not isinstance(what, str):
            raise KeyError(f"a prompt is text, got {type(what).__name__}")
        return what

    def condition(self, what: Hashable) -> Condition:
        """The condition of a prompt, encoded when first asked for, kept while it is held or recent."""
        told = self._conditions.get(what)
        if told is None:
            with torch.no_grad():
                told = self._conditions[what] = _Told(self.encode(what))
        self._recent[what] = told
        self._recent.move_to_end(what)
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return told

    def forward(self, x: Tensor, sigma: Tensor, prompts: Sequence[Hashable]) -> Tensor:
        """D of every state for every prompt, in one pass.

        Args:
            x: States, (batch, *event).
            sigma: σ, () or (batch,).
            prompts: As `recognised` gives them, None for nothing in particular.
        Returns:
            (prompts, batch, *event).
        """
        count, batch = len(prompts), len(x)
        told = [self.condition(what) for what in prompts]
        rows = {
            name: torch.cat([each[name] for each in told]).to(x.device).repeat_interleave(batch, 0)
            for name in told[0]
        }
        many, levels = x.repeat(count, *[1] * (x.ndim - 1)), sigma.expand(batch).repeat(count)
        at_once = self.rows_at_once or len(many)
        parts = [
            self.denoise(many[i : i + at_once], levels[i : i + at_once], _some(rows, i, at_once))
            for i in range(0, len(many), at_once)
        ]
        return torch.cat(parts).reshape(count, *x.shape)


def _some(condition: Condition, start: int, count: int) -> Condition:
    return {name: value[start : start + count] for name, value in condition.items()}
